//! The low-rank update of one module, `y += s B (E * (A drop(x)))`, forward and backward
//! (arXiv 2308.12043, eq. 3; E holds the singular values, s the scale).
//!
//! A holds `active + reserve` rows and E only the active ones: the reserve counts with the constant
//! [`RESERVE_E`], which is not trained ("advance learning", section 3.3 of the paper).

use tch::{Device, Kind, Tensor};

use crate::checks;
use crate::errors::{Error, Result};
use crate::kernels::dropout::{self, Stream};

mod fast;

/// E of the components in reserve.
pub const RESERVE_E: f64 = 1e-5;

/// The parameters of one adapted module.
pub struct Adapter {
    /// Right vectors, (rows, in).
    pub a: Tensor,
    /// Left vectors, (out, rows).
    pub b: Tensor,
    /// Singular values of the active components, (active, 1), active <= rows.
    pub e: Tensor,
    /// The scale s.
    pub scale: f64,
}

/// The dropout of one call. On the CPU the mask is a function of `seed` and is drawn anew where it is
/// needed; elsewhere it comes from torch's generator and is kept, a byte an element.
pub struct Dropout {
    stream: Stream,
    /// The mask: packed bits on the CPU. `None`: draw it.
    pub mask: Option<Tensor>,
    /// Probability with which an element is kept.
    pub keep: f64,
}

/// What the backward pass gives.
pub struct Gradients {
    /// For x, flat (tokens, in); `None` where it was not asked for.
    pub x: Option<Tensor>,
    /// For A.
    pub a: Tensor,
    /// For B.
    pub b: Tensor,
    /// For E.
    pub e: Tensor,
}

impl Adapter {
    /// Checks that the shapes, dtypes and devices fit together, and fit `x` of shape (tokens, in).
    pub fn check(&self, x: &Tensor) -> Result<()> {
        for (name, tensor) in [("x", x), ("A", &self.a), ("B", &self.b), ("E", &self.e)] {
            checks::float(name, tensor)?;
            checks::same_device(name, tensor, "x", x)?;
        }
        checks::kind("B", &self.b, self.a.kind())?;
        checks::kind("E", &self.e, self.a.kind())?;
        let (rows, features) = checks::matrix("A", &self.a)?;
        let (out, _) = checks::matrix("B", &self.b)?;
        let (active, _) = checks::matrix("E", &self.e)?;
        let (tokens, _) = checks::matrix("x", x)?;
        checks::shape("B", &self.b, &[out, rows])?;
        checks::shape("E", &self.e, &[active, 1])?;
        checks::shape("x", x, &[tokens, features])?;
        if active > rows {
            return Err(Error::Value(format!(
                "E has {active} rows and A {rows}; E may not have more than A"
            )));
        }
        checks::finite("scale", self.scale)
    }

    /// `s * E` of every row, the reserve included: (rows).
    fn scaled_e(&self) -> Result<Tensor> {
        let active = self.e.f_reshape([-1])?;
        let reserve = self.a.size()[0] - active.size()[0];
        let all = if reserve == 0 {
            active
        } else {
            let rest = Tensor::f_full([reserve], RESERVE_E, (self.a.kind(), self.a.device()))?;
            Tensor::f_cat(&[active, rest], 0)?
        };
        Ok(all.f_mul_scalar(self.scale)?)
    }

    /// `P = s B diag(E)`, so that dW = P A: (out, rows), in the parameters' dtype.
    pub fn scaled_b(&self) -> Result<Tensor> {
        Ok(self.b.f_mul(&self.scaled_e()?)?)
    }
}

impl Dropout {
    /// For a tensor like `x`, dropout probability `p`, and the mask that [`forward`] used, if it was
    /// kept.
    pub fn new(x: &Tensor, p: f64, seed: u64, mask: Option<Tensor>) -> Self {
        let stream = Stream::new(p, seed, 0);
        let keep = if x.device() == Device::Cpu { stream.keep_probability() } else { 1.0 - p };
        Self { stream, mask, keep }
    }

    /// Draws what has to be kept until the backward pass.
    fn prepare(&mut self, x: &Tensor) -> Result<()> {
        if self.mask.is_none() && x.device() != Device::Cpu {
            let mut mask = Tensor::f_empty(x.size(), (Kind::Uint8, x.device()))?;
            let _ = mask.f_bernoulli_float_(self.keep)?;
            self.mask = Some(mask);
        }
        Ok(())
    }

    /// The mask for `x`, checked.
    fn mask_for(&self, x: &Tensor) -> Result<Tensor> {
        let on_cpu = x.device() == Device::Cpu;
        let Some(mask) = &self.mask else {
            if on_cpu {
                return dropout::draw(x.numel(), &self.stream);
            }
            return Err(Error::Value("mask is None; give the one of the forward".into()));
        };
        checks::kind("mask", mask, Kind::Uint8)?;
        checks::same_device("mask", mask, "x", x)?;
        if !mask.is_contiguous() {
            return Err(Error::Value("mask is not contiguous; give the one of the forward".into()));
        }
        let packed = [(x.numel() as i64 + 7) / 8];
        checks::shape("mask", mask, if on_cpu { packed.to_vec() } else { x.size() }.as_slice())?;
        Ok(mask.shallow_clone())
    }

    /// Zeroes what is dropped. The division by `keep` is left to the caller, who folds it into a
    /// smaller factor.
    fn zero_(values: &mut Tensor, mask: &Tensor) -> Result<()> {
        if values.device() == Device::Cpu {
            return dropout::zero_(values, mask);
        }
        let _ = values.f_mul_(mask)?;
        Ok(())
    }

    /// `x` with zeros where it is dropped, contiguous.
    fn applied(x: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let mut dropped = x.f_empty_like()?.f_contiguous()?;
        dropped.f_copy_(x)?;
        Self::zero_(&mut dropped, mask)?;
        Ok(dropped)
    }

    fn gain(dropout: Option<&Self>) -> f64 {
        match dropout {
            Some(dropout) if dropout.keep > 0.0 => 1.0 / dropout.keep,
            _ => 1.0,
        }
    }
}

/// Forward. Adds the update to `y` (tokens, out) in place and gives `t = A drop(x)`, (tokens, rows).
pub fn forward(
    adapter: &Adapter,
    x: &Tensor,
    y: &mut Tensor,
    mut dropout: Option<&mut Dropout>,
) -> Result<Tensor> {
    adapter.check(x)?;
    checks::shape("y", y, &[x.size()[0], adapter.b.size()[0]])?;
    checks::float("y", y)?;
    checks::same_device("y", y, "x", x)?;
    if let Some(dropout) = dropout.as_deref_mut() {
        dropout.prepare(x)?;
    }
    let dropout = dropout.as_deref();
    if let Some(t) = fast::forward(adapter, x, y, fast::Start::Add, dropout)? {
        return Ok(t);
    }
    let a = adapter.a.f_mul_scalar(Dropout::gain(dropout))?.f_to_kind(x.kind())?;
    let p = adapter.scaled_b()?.f_to_kind(x.kind())?;
    let t = match dropout {
        Some(dropout) => Dropout::applied(x, &dropout.mask_for(x)?)?.f_mm(&a.f_tr()?)?,
        None => x.f_mm(&a.f_tr()?)?,
    };
    if y.kind() == x.kind() {
        let _ = y.f_addmm_(&t, &p.f_tr()?)?;
    } else {
        let _ = y.f_add_(&t.f_mm(&p.f_tr()?)?)?;
    }
    Ok(t)
}

/// Forward of a whole linear layer: `y = x W^T + bias` and the update, into the contiguous `y`
/// (tokens, out), whatever it holds; gives t.
///
/// `weight` is (out, in), `bias` (out), both of the dtype of `x`, as `y` is.
pub fn linear(
    adapter: &Adapter,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    y: &mut Tensor,
    dropout: Option<&mut Dropout>,
) -> Result<Tensor> {
    adapter.check(x)?;
    check_weight(adapter, x, weight)?;
    let out = adapter.b.size()[0];
    checks::kind("y", y, x.kind())?;
    checks::shape("y", y, &[x.size()[0], out])?;
    if let Some(bias) = bias {
        checks::kind("bias", bias, x.kind())?;
        checks::shape("bias", bias, &[out])?;
        checks::same_device("bias", bias, "x", x)?;
    }
    // The update first, into memory that nothing has written yet; the large product is added to it.
    let start = fast::Start::Bias(bias);
    if let Some(t) = fast::forward(adapter, x, y, start, dropout.as_deref())? {
        let _ = y.f_addmm_(x, &weight.f_tr()?)?;
        return Ok(t);
    }
    let _ = match bias {
        Some(bias) => bias.f_addmm_out(y, x, &weight.f_tr()?)?,
        None => x.f_mm_out(y, &weight.f_tr()?)?,
    };
    forward(adapter, x, y, dropout)
}

fn check_weight(adapter: &Adapter, x: &Tensor, weight: &Tensor) -> Result<()> {
    checks::kind("weight", weight, x.kind())?;
    checks::same_device("weight", weight, "x", x)?;
    checks::shape("weight", weight, &[adapter.b.size()[0], x.size()[1]])
}

/// Where the importance of a module goes: a vector and a slot of it.
pub type Slot<'a> = (&'a mut Tensor, i64);

/// Backward: the gradients for x, A, B, E from `gy`, the gradient of y (tokens, out).
///
/// Needs `x` and the `t` that [`forward`] gave. With the `weight` of the base layer the gradient of x
/// is the whole layer's, not the update's alone. Where `importance` is given, the module's importance
/// is added to that slot of that vector (see [`crate::importance`]).
#[allow(clippy::too_many_arguments)]
pub fn backward(
    adapter: &Adapter,
    x: &Tensor,
    t: &Tensor,
    gy: &Tensor,
    dropout: Option<&Dropout>,
    weight: Option<&Tensor>,
    needs_x: bool,
    importance: Option<Slot<'_>>,
) -> Result<Gradients> {
    adapter.check(x)?;
    let (rows, _) = adapter.a.size2()?;
    let out = adapter.b.size()[0];
    for (name, tensor, width) in [("gy", gy, out), ("t", t, rows)] {
        checks::float(name, tensor)?;
        checks::same_device(name, tensor, "x", x)?;
        checks::shape(name, tensor, &[x.size()[0], width])?;
    }
    if let Some(weight) = weight {
        check_weight(adapter, x, weight)?;
    }
    let gy = gy.f_to_kind(x.kind())?;
    if let Some(mut gradients) = fast::backward(adapter, x, t, &gy, dropout, needs_x)? {
        if let Some(slot) = importance {
            let mask = dropout.map(|dropout| dropout.mask_for(x)).transpose()?;
            let dropped = mask.map(|mask| Dropout::applied(x, &mask)).transpose()?;
            let x = dropped.as_ref().unwrap_or(x);
            let p = adapter.scaled_b()?;
            let gain = Dropout::gain(dropout);
            crate::importance::accumulate(slot.0, slot.1, &p, &adapter.a, &gy, x, gain)?;
        }
        if let (Some(grad_x), Some(weight)) = (&mut gradients.x, weight) {
            let _ = grad_x.f_addmm_(&gy, weight)?;
        }
        return Ok(gradients);
    }
    let t = t.f_to_kind(x.kind())?;
    let gain = Dropout::gain(dropout);
    let kind = adapter.a.kind();

    let scaled_e = adapter.scaled_e()?;
    let p = adapter.b.f_mul(&scaled_e)?;
    let u = gy.f_mm(&p.f_to_kind(x.kind())?)?;
    let mask = dropout.map(|dropout| dropout.mask_for(x)).transpose()?;
    let dropped = mask.as_ref().map(|mask| Dropout::applied(x, mask)).transpose()?;
    let dropped = dropped.as_ref().unwrap_or(x);

    let grad_a = u.f_tr()?.f_mm(dropped)?.f_to_kind(kind)?.f_mul_scalar(gain)?;
    // (rows, out): t^T gy reads gy row by row; gy^T t would be several times slower.
    let q = t.f_tr()?.f_mm(&gy)?.f_to_kind(kind)?;
    // Contiguous: DDP copies gradients of other strides than the parameter's one by one.
    let grad_b = q.f_mul(&scaled_e.f_unsqueeze(1)?)?.f_tr()?.f_contiguous()?;
    let active = adapter.e.size()[0];
    let grad_e = q
        .f_narrow(0, 0, active)?
        .f_mul(&adapter.b.f_narrow(1, 0, active)?.f_tr()?)?
        .f_sum_dim_intlist([1i64].as_slice(), true, kind)?
        .f_mul_scalar(adapter.scale)?;
    if let Some((vector, slot)) = importance {
        crate::importance::accumulate(vector, slot, &p, &adapter.a, &gy, dropped, gain)?;
    }
    let grad_x = if needs_x {
        let a = adapter.a.f_mul_scalar(gain)?.f_to_kind(x.kind())?;
        let mut grad_x = u.f_mm(&a)?;
        if let Some(mask) = &mask {
            Dropout::zero_(&mut grad_x, mask)?;
        }
        if let Some(weight) = weight {
            let _ = grad_x.f_addmm_(&gy, weight)?;
        }
        Some(grad_x)
    } else {
        None
    };
    Ok(Gradients { x: grad_x, a: grad_a, b: grad_b, e: grad_e })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(rows: i64, values: &[f64]) -> Tensor {
        Tensor::from_slice(values).reshape([rows, -1])
    }

    fn adapter() -> Adapter {
        Adapter {
            a: matrix(1, &[3.0, 4.0]),
            b: matrix(2, &[1.0, -1.0]),
            e: matrix(1, &[2.0]),
            scale: 0.5,
        }
    }

    #[test]
    fn forward_adds_the_update() {
        let mut y = matrix(1, &[100.0, 200.0]);
        let t = forward(&adapter(), &matrix(1, &[1.0, 2.0]), &mut y, None).unwrap();
        assert_eq!((t, y), (matrix(1, &[11.0]), matrix(1, &[111.0, 189.0])));
    }

    #[test]
    fn backward_gives_the_gradients() {
        let (x, t, gy) = (matrix(1, &[1.0, 2.0]), matrix(1, &[11.0]), matrix(1, &[1.0, 2.0]));
        let got = backward(&adapter(), &x, &t, &gy, None, None, true, None).unwrap();
        assert_eq!(got.x, Some(matrix(1, &[-3.0, -4.0])));
        assert_eq!(got.a, matrix(1, &[-1.0, -2.0]));
        assert_eq!(got.b, matrix(2, &[11.0, 22.0]));
        assert_eq!(got.e, matrix(1, &[-5.5]));
    }

    #[test]
    fn backward_adds_the_importance_to_its_slot() {
        let (x, t, gy) = (matrix(1, &[1.0, 2.0]), matrix(1, &[11.0]), matrix(1, &[1.0, 2.0]));
        let mut importance = Tensor::from_slice(&[5.0, 7.0]);
        let slot = Some((&mut importance, 1));
        backward(&adapter(), &x, &t, &gy, None, None, false, slot).unwrap();
        // |[[3, 4], [-3, -4]] * [[1, 2], [2, 4]]|
        assert_eq!(importance, Tensor::from_slice(&[5.0, 7.0 + 33.0]));
    }

    #[test]
    fn the_reserve_counts_with_its_constant() {
        let adapter =
            Adapter { e: Tensor::zeros([0, 1], (Kind::Double, Device::Cpu)), ..adapter() };
        assert_eq!(adapter.scaled_b().unwrap(), matrix(2, &[0.5 * RESERVE_E, -0.5 * RESERVE_E]));
    }

    #[test]
    fn a_mask_that_keeps_nothing_divides_by_nothing() {
        let dropout = Dropout::new(&matrix(1, &[1.0]), 1.0, 0, None);
        assert_eq!(Dropout::gain(Some(&dropout)), 1.0);
    }
}
