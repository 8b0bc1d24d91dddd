//! The gates of SoRA (arXiv 2311.11696), the E of its modules: the proximal step that sets them to 0, and the
//! gradient of their L1 term, `weight * sum |g| / (number of gates of all modules)`.

use tch::{Device, Kind, Tensor};

use crate::checks;
use crate::errors::{Error, Result};
use crate::kernels::plain::{self, Plain, Real};

/// Moves every gate by `xi` towards 0, in place, in its own dtype, to which xi is rounded.
///
/// The soft threshold gives `sign(v) max(|v| - xi, 0)`. The `official` one is what SoRA's code does:
/// `v > xi` is lowered by xi, `v < -xi` raised, and then every `|v| < xi` becomes 0, so that 0 takes in all up
/// to 2 xi but xi itself, which stays. A zero is never -0. What is not a number stays so.
pub fn shrink_(gates: &mut [Tensor], xi: f64, official: bool) -> Result<()> {
    checks::not_negative("xi", xi)?;
    check(gates)?;
    check_apart(gates)?;
    let mut rest = Vec::new();
    for gate in gates {
        let row = row(gate)?;
        match row.as_ref().and_then(Plain::of) {
            Some(plain) => {
                shrink_slice::<f32>(plain, xi, official);
                shrink_slice::<f64>(plain, xi, official);
            }
            None => rest.push(gate),
        }
    }
    for group in groups(rest, |gate| gate) {
        let all = shrunk_with_torch(&flat(group.iter().map(|gate| &**gate))?, xi, official)?;
        let mut start = 0;
        for gate in group {
            gate.f_copy_(&piece(&all, &mut start, gate)?)?;
        }
    }
    Ok(())
}

fn shrink_slice<T: Real>(gates: Plain<'_>, xi: f64, official: bool) {
    let (xi, minus_xi) = (T::nearest(xi), T::nearest(-xi));
    let bound = xi.wide();
    for gate in gates.elements_mut::<T>() {
        let value = gate.wide();
        let moved = if value > bound {
            *gate + minus_xi
        } else if value < -bound {
            *gate + xi
        } else {
            *gate
        };
        let zero = if official { moved.wide().abs() < bound } else { value.abs() <= bound };
        // 0 added makes 0 of -0.
        *gate = if zero { T::default() } else { moved + T::default() };
    }
}

/// As [`shrink_slice`], of a vector.
fn shrunk_with_torch(gates: &Tensor, xi: f64, official: bool) -> Result<Tensor> {
    // Else torch compares with the rounded xi, and moves by the one that is not.
    let xi = Tensor::from(xi).f_to_kind(gates.kind())?.f_double_value(&[])?;
    let size = gates.f_abs()?;
    let moved = gates.f_sub(&gates.f_clamp(-xi, xi)?)?.f_where_self(&size.f_gt(xi)?, gates)?;
    let zero = if official { moved.f_abs()?.f_lt(xi)? } else { size.f_le(xi)? };
    Ok(moved.f_masked_fill(&zero, 0.0)?.f_add_scalar(0.0)?)
}

/// Adds the gradient of `weight * sum |g| / (number of gates)` to `gradients`, in place; that of `|g|` at 0 is 0.
///
/// A module whose gates have no gradient is left out, and counts in the number all the same. With a
/// `grad_scale`, one number, the gradients carry that scale: it stays on its device.
pub fn add_l1_(
    gates: &[Tensor],
    gradients: &mut [Option<Tensor>],
    weight: f64,
    grad_scale: Option<&Tensor>,
) -> Result<()> {
    checks::finite("weight", weight)?;
    check(gates)?;
    checks::one_each("gradients", gradients, gates.len())?;
    for (k, (gate, gradient)) in gates.iter().zip(&*gradients).enumerate() {
        if let Some(gradient) = gradient {
            let name = format!("gradients[{k}]");
            checks::float(&name, gradient)?;
            checks::shape(&name, gradient, &gate.size())?;
            checks::same_device(&name, gradient, "its gate", gate)?;
        }
    }
    if let Some(scale) = grad_scale {
        checks::one_number("grad_scale", scale)?;
    }
    let count: usize = gates.iter().map(Tensor::numel).sum();
    if weight == 0.0 || count == 0 {
        return Ok(());
    }
    let factor = Factor::new(weight / count as f64, grad_scale)?;
    let mut rest = Vec::new();
    for (gate, gradient) in gates.iter().zip(gradients) {
        let Some(gradient) = gradient else { continue };
        if !add_to_slice(gate, gradient, &factor) {
            rest.push((gate, gradient));
        }
    }
    for group in groups(rest, |(_, gradient)| gradient) {
        let kind = group[0].1.kind();
        let wide = if kind == Kind::Double { Kind::Double } else { Kind::Float };
        let signs = flat(group.iter().map(|(gate, _)| *gate))?.f_sign()?.f_to_kind(wide)?;
        let all = factor.times(&signs)?;
        let mut start = 0;
        for (_, gradient) in group {
            let _ = gradient.f_add_(&piece(&all, &mut start, gradient)?)?;
        }
    }
    Ok(())
}

/// What the sign of a gate is multiplied by.
enum Factor {
    Host(f64),
    /// A scalar on a device, which would have to be waited for.
    Device(Tensor),
}

impl Factor {
    fn new(weight: f64, grad_scale: Option<&Tensor>) -> Result<Self> {
        Ok(match grad_scale {
            None => Self::Host(weight),
            Some(scale) if scale.device() == Device::Cpu => {
                Self::Host(weight * scale.f_reshape([0_i64; 0])?.f_double_value(&[])?)
            }
            Some(scale) => Self::Device(
                scale.f_reshape([0_i64; 0])?.f_to_kind(Kind::Double)?.f_mul_scalar(weight)?,
            ),
        })
    }

    fn times(&self, signs: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::Host(factor) => signs.f_mul_scalar(*factor)?,
            Self::Device(factor) => {
                signs.f_mul(&factor.f_to_device(signs.device())?.f_to_kind(signs.kind())?)?
            }
        })
    }
}

/// False if the loop cannot do it.
fn add_to_slice(gate: &Tensor, gradient: &Tensor, factor: &Factor) -> bool {
    let &Factor::Host(factor) = factor else { return false };
    let (Ok(Some(gate)), Ok(Some(gradient))) = (row(gate), row(gradient)) else { return false };
    let (Some(gates), Some(gradients)) = (Plain::of(&gate), Plain::of(&gradient)) else {
        return false;
    };
    let apart = plain::disjoint(std::iter::once(gates), std::iter::once(gradients));
    if !apart || !gates.is_like(&gradients) {
        return false;
    }
    add_slice::<f32>(gates, gradients, factor);
    add_slice::<f64>(gates, gradients, factor);
    true
}

fn add_slice<T: Real>(gates: Plain<'_>, gradients: Plain<'_>, factor: f64) {
    let (plus, minus) = (T::nearest(factor), T::nearest(-factor));
    for (gradient, gate) in gradients.elements_mut::<T>().iter_mut().zip(gates.elements::<T>()) {
        let gate = gate.wide();
        if gate > 0.0 {
            *gradient += plus;
        } else if gate < 0.0 {
            *gradient += minus;
        }
    }
}

/// The entries by dtype and device of a tensor of theirs.
fn groups<T>(entries: Vec<T>, of: fn(&T) -> &Tensor) -> Vec<Vec<T>> {
    let place = |entry: &T| (of(entry).kind(), of(entry).device());
    let mut found: Vec<Vec<T>> = Vec::new();
    for entry in entries {
        match found.iter_mut().find(|group| place(&group[0]) == place(&entry)) {
            Some(group) => group.push(entry),
            None => found.push(vec![entry]),
        }
    }
    found
}

/// All elements in one vector: a few launches then do for all modules.
fn flat<'a>(tensors: impl Iterator<Item = &'a Tensor>) -> Result<Tensor> {
    let rows = tensors.map(|tensor| Ok(tensor.f_reshape([-1])?)).collect::<Result<Vec<_>>>()?;
    Ok(Tensor::f_cat(&rows, 0)?)
}

/// The part of a flat vector that belongs to the next tensor, in its shape.
fn piece(flat: &Tensor, start: &mut i64, like: &Tensor) -> Result<Tensor> {
    let length = like.numel() as i64;
    let piece = flat.f_narrow(0, *start, length)?.f_view(like.size().as_slice())?;
    *start += length;
    Ok(piece)
}

/// A contiguous tensor as a matrix of one row: a view.
fn row(tensor: &Tensor) -> Result<Option<Tensor>> {
    let contiguous = tensor.is_contiguous();
    Ok(contiguous.then(|| tensor.f_view([1, tensor.numel() as i64])).transpose()?)
}

/// Fails unless there are gates, of floating-point numbers.
fn check(gates: &[Tensor]) -> Result<()> {
    if gates.is_empty() {
        return Err(Error::Value("gates is empty; give those of one module or more".into()));
    }
    gates.iter().enumerate().try_for_each(|(k, gate)| checks::float(&format!("gates[{k}]"), gate))
}

/// Fails if a gate is given twice: whether it would be moved once or twice would lie in its dtype.
fn check_apart(gates: &[Tensor]) -> Result<()> {
    let filled = gates.iter().enumerate().filter(|(_, gate)| gate.numel() > 0);
    let mut places: Vec<_> = filled.map(|(k, gate)| (gate.data_ptr() as usize, k)).collect();
    places.sort_unstable();
    match places.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        Some(pair) => Err(Error::Value(format!(
            "gates[{}] is gates[{}] again; give each once",
            pair[1].1, pair[0].1
        ))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VALUES: [f64; 8] = [-3.0, -1.5, -0.5, 0.5, 1.1, 1.9, 2.0, 3.0];

    /// The same numbers by the loop and, with gaps between them, by torch.
    fn both(official: bool) -> [Tensor; 2] {
        let mut plain = [Tensor::from_slice(&VALUES)];
        let mut spread = [plain[0].repeat_interleave_self_int(2, 0, None).slice(0, 0, None, 2)];
        shrink_(&mut plain, 1.0, official).unwrap();
        shrink_(&mut spread, 1.0, official).unwrap();
        [plain, spread].map(|[gate]| gate)
    }

    #[test]
    fn the_soft_threshold_moves_every_gate_by_xi() {
        for gate in both(false) {
            let want = [-2.0, -0.5, 0.0, 0.0, 1.1 - 1.0, 1.9 - 1.0, 1.0, 2.0];
            assert_eq!(gate, Tensor::from_slice(&want));
        }
    }

    #[test]
    fn the_official_one_has_a_gap() {
        for gate in both(true) {
            assert_eq!(gate, Tensor::from_slice(&[-2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 2.0]));
        }
    }

    #[test]
    fn the_l1_term_is_a_mean_over_all_gates() {
        let gates = [Tensor::from_slice(&[2.0, 0.0, -3.0]), Tensor::from_slice(&[-1.0])];
        let mut gradients = [Some(Tensor::from_slice(&[1.0, 1.0, 1.0])), None];
        let scale = Tensor::from_slice(&[4.0f32]);
        add_l1_(&gates, &mut gradients, 0.5, Some(&scale)).unwrap();
        assert_eq!(gradients[0].as_ref().unwrap(), &Tensor::from_slice(&[1.5, 1.0, 0.5]));
    }
}
