//! The low-rank update of one module, `y += s B (E * (A drop(x)))`, forward and backward
//! (arXiv 2308.12043, eq. 3; E holds the singular values, s the scale).
//!
//! A holds `active + reserve` rows and E only the active ones: the reserve counts with the constant
//! [`RESERVE_E`], which is not trained ("advance learning", section 3.3 of the paper).
//!
//! The products are of contiguous matrices, whatever the strides of what is given: a BLAS rounds by the
//! layout, and eager mode and a compiled graph hand over the same numbers in different ones.

use tch::{Kind, Tensor};

use crate::checks;
use crate::errors::{Error, Result};
use crate::gauges::sensitivity::{self, Input};
use crate::kernels::cuda;
use crate::kernels::plain::contiguous;
use crate::ops::base::{self, Base, Start};
use crate::ops::dropout::Dropout;

mod cpu;

/// E of the components in reserve.
pub const RESERVE_E: f64 = 1e-5;

/// The parameters of one adapted module.
pub struct LowRank {
    /// Right vectors, (rows, in).
    pub a: Tensor,
    /// Left vectors, (out, rows).
    pub b: Tensor,
    /// Singular values of the active components, (active, 1), active <= rows.
    pub e: Tensor,
    /// The scale s.
    pub scale: f64,
    /// Where kernels for a CUDA device are queued.
    pub queue: cuda::Stream,
}

/// What the products of one call take.
struct Operands {
    /// A, (rows, in).
    a: Tensor,
    /// `P = s B diag(E)`, (out, rows).
    p: Tensor,
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

impl LowRank {
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

    /// A and P in the dtype of the products.
    fn operands(&self, kind: Kind) -> Result<Operands> {
        if let Some((a, p)) = cuda::scaled(self.parameters(), kind, self.queue)? {
            return Ok(Operands { a, p });
        }
        Ok(Operands { a: self.a.f_to_kind(kind)?, p: self.scaled_b()?.f_to_kind(kind)? })
    }

    /// The gradients of A, B and E from `right = u^T drop(x)`, (rows, in), without the dropout's gain, and
    /// `left = t^T gy`, (rows, out).
    fn gradients(&self, right: &Tensor, left: &Tensor, gain: f64) -> Result<[Tensor; 3]> {
        if let Some(made) = cuda::gradients(self.parameters(), right, left, gain, self.queue)? {
            return Ok(made);
        }
        let (kind, active) = (self.a.kind(), self.e.size()[0]);
        let left = left.f_to_kind(kind)?;
        let grad_a = right.f_to_kind(kind)?.f_mul_scalar(gain)?;
        // Contiguous: DDP copies gradients of other strides than the parameter's one by one.
        let grad_b = left.f_mul(&self.scaled_e()?.f_unsqueeze(1)?)?.f_tr()?.f_contiguous()?;
        let grad_e = left
            .f_narrow(0, 0, active)?
            .f_mul(&self.b.f_narrow(1, 0, active)?.f_tr()?)?
            .f_sum_dim_intlist([1i64].as_slice(), true, kind)?
            .f_mul_scalar(self.scale)?;
        Ok([grad_a, grad_b, grad_e])
    }

    fn parameters(&self) -> cuda::Parameters<'_> {
        let Self { a, b, e, scale, .. } = self;
        cuda::Parameters { a, b, e, scale: *scale, reserve_e: RESERVE_E }
    }

    /// `P = s B diag(E)`, so that dW = P A: (out, rows), in the parameters' dtype.
    pub fn scaled_b(&self) -> Result<Tensor> {
        Ok(self.b.f_mul(&self.scaled_e()?)?)
    }
}

/// Forward. Adds the update to `y` (tokens, out) in place and gives `t = A drop(x)`, (tokens, rows).
pub fn forward(
    low_rank: &LowRank,
    x: &Tensor,
    y: &mut Tensor,
    dropout: Option<&mut Dropout>,
) -> Result<Tensor> {
    low_rank.check(x)?;
    checks::shape("y", y, &[x.size()[0], low_rank.b.size()[0]])?;
    checks::float("y", y)?;
    checks::same_device("y", y, "x", x)?;
    let x = &x.f_contiguous()?;
    if let Some(t) = cpu::forward(low_rank, x, y, Start::Add, dropout.as_deref())? {
        return Ok(t);
    }
    let Operands { a, p } = low_rank.operands(x.kind())?;
    let t = down(low_rank, &a, x, dropout)?;
    if y.kind() == x.kind() {
        let _ = y.f_addmm_(&t, &p.f_tr()?)?;
    } else {
        let _ = y.f_add_(&t.f_mm(&p.f_tr()?)?)?;
    }
    Ok(t)
}

/// `A drop(x)` with the dropout's gain, (tokens, rows); keeps the mask where it has to be. `a` is A in the
/// dtype of x.
fn down(
    low_rank: &LowRank,
    a: &Tensor,
    x: &Tensor,
    dropout: Option<&mut Dropout>,
) -> Result<Tensor> {
    let gain = Dropout::gain(dropout.as_deref());
    let Some(dropout) = dropout else {
        return Ok(x.f_mm(&a.f_tr()?)?);
    };
    if dropout.mask.is_none() {
        if let Some((t, mask)) = cuda::down(x, a, gain, &dropout.stream, low_rank.queue)? {
            dropout.mask = Some(mask);
            return Ok(t);
        }
    }
    dropout.prepare(x)?;
    let a = low_rank.a.f_mul_scalar(gain)?.f_to_kind(x.kind())?;
    Ok(dropout.applied(x, &dropout.mask_for(x)?)?.f_mm(&a.f_tr()?)?)
}

/// Forward of a whole linear layer, x (..., in): `y = x W^T + bias` and the update, (..., out), and t of the
/// flat tokens.
pub fn linear(
    low_rank: &LowRank,
    x: &Tensor,
    base: &Base<'_>,
    dropout: Option<&mut Dropout>,
) -> Result<(Tensor, Tensor)> {
    checks::float("x", x)?;
    let features = x.size().last().copied().unwrap_or_default();
    let out = low_rank.b.size().first().copied().unwrap_or_default();
    let flat = x.f_reshape([-1, features.max(1)])?;
    low_rank.check(&flat)?;
    base.check(&flat, out)?;
    linear_of_fitting(low_rank, x, base, dropout)
}

/// [`linear`] of what fits together.
pub fn linear_of_fitting(
    low_rank: &LowRank,
    x: &Tensor,
    base: &Base<'_>,
    dropout: Option<&mut Dropout>,
) -> Result<(Tensor, Tensor)> {
    let (mut shape, out) = (x.size(), low_rank.b.size()[0]);
    let features = shape.pop().unwrap_or_default();
    shape.push(out);
    let y = Tensor::f_empty(&shape, (x.f_kind()?, x.device()))?;
    // A view of what is returned: autograd forbids to change a view made inside a function.
    let (x, mut flat) = match shape[..] {
        [_, _] => (x.shallow_clone(), y.shallow_clone()),
        _ => {
            let x = x.f_reshape([-1, features.max(1)])?;
            let tokens = x.size()[0];
            (x, y.f_view([tokens, out])?)
        }
    };
    let x = &contiguous(&x, x.kind())?;
    // The update first, into memory that nothing has written yet; the large product is added to it.
    let start = Start::Bias(base.bias);
    let t = match cpu::forward(low_rank, x, &mut flat, start, dropout.as_deref())? {
        Some(t) => {
            base.add_product(x, &mut flat)?;
            t
        }
        None => {
            base.write(x, &mut flat)?;
            forward(low_rank, x, &mut flat, dropout)?
        }
    };
    Ok((y, t))
}

/// Where the importance of a module goes: a vector and a slot of it.
pub type Slot<'a> = (&'a mut Tensor, i64);

/// Backward: the gradients for x, A, B, E from `gy`, the gradient of y (tokens, out).
///
/// Needs `x` and the `t` that [`forward`] gave. With the `weight` of the base layer the gradient of x
/// is the whole layer's, not the update's alone. Where `importance` is given, the module's importance
/// is added to that slot of that vector (see [`sensitivity`]).
#[allow(clippy::too_many_arguments)]
pub fn backward(
    low_rank: &LowRank,
    x: &Tensor,
    t: &Tensor,
    gy: &Tensor,
    dropout: Option<&Dropout>,
    weight: Option<&Tensor>,
    needs_x: bool,
    importance: Option<Slot<'_>>,
) -> Result<Gradients> {
    low_rank.check(x)?;
    let (rows, _) = low_rank.a.size2()?;
    let out = low_rank.b.size()[0];
    for (name, tensor, width) in [("gy", gy, out), ("t", t, rows)] {
        checks::float(name, tensor)?;
        checks::same_device(name, tensor, "x", x)?;
        checks::shape(name, tensor, &[x.size()[0], width])?;
    }
    if let Some(weight) = weight {
        base::check_weight(weight, x, out)?;
    }
    backward_of_fitting(low_rank, x, t, gy, dropout, weight, needs_x, importance)
}

/// [`backward`] of what fits together.
#[allow(clippy::too_many_arguments)]
pub fn backward_of_fitting(
    low_rank: &LowRank,
    x: &Tensor,
    t: &Tensor,
    gy: &Tensor,
    dropout: Option<&Dropout>,
    weight: Option<&Tensor>,
    needs_x: bool,
    importance: Option<Slot<'_>>,
) -> Result<Gradients> {
    let (x, gy) = (&contiguous(x, x.kind())?, contiguous(gy, x.kind())?);
    if let Some(mut gradients) = cpu::backward(low_rank, x, t, &gy, dropout, needs_x)? {
        if let Some(slot) = importance {
            let input = match dropout {
                Some(dropout) => Input::Dropped(x, &dropout.stream),
                None => Input::Whole(x),
            };
            let p = low_rank.scaled_b()?;
            let gain = Dropout::gain(dropout);
            sensitivity::accumulate(slot, &p, &low_rank.a, &gy, input, gain, low_rank.queue)?;
        }
        if let (Some(grad_x), Some(weight)) = (&mut gradients.x, weight) {
            base::add_grad_x(weight, &gy, grad_x)?;
        }
        return Ok(gradients);
    }
    let t = t.f_to_kind(x.kind())?.f_contiguous()?;
    let gain = Dropout::gain(dropout);
    let Operands { a, p } = low_rank.operands(x.kind())?;
    let u = gy.f_mm(&p)?;
    let masked = match dropout {
        Some(dropout) => Some((dropout, dropout.mask_for(x)?)),
        None => None,
    };
    let dropped = masked.as_ref().map(|(dropout, mask)| dropout.applied(x, mask)).transpose()?;
    let dropped = dropped.as_ref().unwrap_or(x);

    let right = u.f_tr()?.f_mm(dropped)?;
    // (rows, out): t^T gy reads gy row by row; gy^T t would be several times slower.
    let left = t.f_tr()?.f_mm(&gy)?;
    let [grad_a, grad_b, grad_e] = low_rank.gradients(&right, &left, gain)?;
    if let Some(slot) = importance {
        let input = Input::Whole(dropped);
        let p = if p.kind() == low_rank.a.kind() { p } else { low_rank.scaled_b()? };
        sensitivity::accumulate(slot, &p, &low_rank.a, &gy, input, gain, low_rank.queue)?;
    }
    let grad_x = if needs_x {
        let masked = masked.as_ref().map(|(dropout, mask)| (*dropout, mask));
        let mut grad_x = up(low_rank, &a, &u, masked)?;
        if let Some(weight) = weight {
            base::add_grad_x(weight, &gy, &mut grad_x)?;
        }
        Some(grad_x)
    } else {
        None
    };
    Ok(Gradients { x: grad_x, a: grad_a, b: grad_b, e: grad_e })
}

/// The importance `sum |dW * (gy^T x)|` of one call by itself, a float64 scalar tensor, from x (tokens, in) and
/// gy (tokens, out).
pub fn importance(low_rank: &LowRank, x: &Tensor, gy: &Tensor) -> Result<Tensor> {
    low_rank.check(x)?;
    checks::float("gy", gy)?;
    checks::same_device("gy", gy, "x", x)?;
    checks::shape("gy", gy, &[x.size()[0], low_rank.b.size()[0]])?;
    let mut vector = Tensor::f_zeros([1], (Kind::Double, x.device()))?;
    let (gy, p) = (gy.f_to_kind(x.kind())?, low_rank.scaled_b()?);
    let (slot, input) = ((&mut vector, 0), Input::Whole(x));
    sensitivity::accumulate(slot, &p, &low_rank.a, &gy, input, 1.0, low_rank.queue)?;
    Ok(vector.f_squeeze()?)
}

/// `drop(u A)` with the dropout's gain, (tokens, in). `a` is A in the dtype of u.
fn up(
    low_rank: &LowRank,
    a: &Tensor,
    u: &Tensor,
    masked: Option<(&Dropout, &Tensor)>,
) -> Result<Tensor> {
    let gain = Dropout::gain(masked.map(|(dropout, _)| dropout));
    let size = [u.size()[0], low_rank.a.size()[1]];
    if cuda::takes(u, low_rank.queue) {
        let mut out = Tensor::f_empty(size, (u.kind(), u.device()))?;
        let mask = masked.map(|(_, mask)| mask);
        if cuda::add_grad_x(&mut out, false, u, a, mask, gain, low_rank.queue)? {
            return Ok(out);
        }
    }
    let mut out = u.f_mm(&low_rank.a.f_mul_scalar(gain)?.f_to_kind(u.kind())?)?;
    if let Some((dropout, mask)) = masked {
        dropout.zero_(&mut out, mask)?;
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    fn matrix(rows: i64, values: &[f64]) -> Tensor {
        Tensor::from_slice(values).reshape([rows, -1])
    }

    fn low_rank() -> LowRank {
        LowRank {
            a: matrix(1, &[3.0, 4.0]),
            b: matrix(2, &[1.0, -1.0]),
            e: matrix(1, &[2.0]),
            scale: 0.5,
            queue: cuda::Stream(0),
        }
    }

    #[test]
    fn forward_adds_the_update() {
        let mut y = matrix(1, &[100.0, 200.0]);
        let t = forward(&low_rank(), &matrix(1, &[1.0, 2.0]), &mut y, None).unwrap();
        assert_eq!((t, y), (matrix(1, &[11.0]), matrix(1, &[111.0, 189.0])));
    }

    #[test]
    fn backward_gives_the_gradients() {
        let (x, t, gy) = (matrix(1, &[1.0, 2.0]), matrix(1, &[11.0]), matrix(1, &[1.0, 2.0]));
        let got = backward(&low_rank(), &x, &t, &gy, None, None, true, None).unwrap();
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
        backward(&low_rank(), &x, &t, &gy, None, None, false, slot).unwrap();
        // |[[3, 4], [-3, -4]] * [[1, 2], [2, 4]]|
        assert_eq!(importance, Tensor::from_slice(&[5.0, 7.0 + 33.0]));
    }

    #[test]
    fn the_reserve_counts_with_its_constant() {
        let low_rank =
            LowRank { e: Tensor::zeros([0, 1], (Kind::Double, Device::Cpu)), ..low_rank() };
        assert_eq!(low_rank.scaled_b().unwrap(), matrix(2, &[0.5 * RESERVE_E, -0.5 * RESERVE_E]));
    }
}
