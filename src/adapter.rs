//! The low-rank update of one module, `y += s B (E * (A drop(x)))`, forward and backward
//! (arXiv 2308.12043, eq. 3; E holds the singular values, s the scale).
//!
//! A holds `active + reserve` rows and E only the active ones: the reserve counts with the constant
//! [`RESERVE_E`], which is not trained ("advance learning", section 3.3 of the paper).

use tch::{Device, Kind, Tensor};

use crate::checks;
use crate::errors::{Error, Result};
use crate::kernels::dropout;

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

/// A dropout mask: packed bits on the CPU, a byte an element elsewhere.
pub struct Dropout {
    /// The mask, uint8.
    pub mask: Tensor,
    /// Probability with which it keeps an element.
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
    /// Draws a mask for a tensor like `x`. On the CPU it is a function of `seed`; on another device it
    /// comes from that device's torch generator.
    pub fn draw(x: &Tensor, p: f64, seed: u64) -> Result<Self> {
        if x.device() == Device::Cpu {
            return Ok(Self::from_mask(dropout::draw(x.numel(), p, seed)?, p));
        }
        let mut mask = Tensor::f_empty(x.size(), (Kind::Uint8, x.device()))?;
        let _ = mask.f_bernoulli_float_(1.0 - p)?;
        Ok(Self::from_mask(mask, p))
    }

    /// The mask that [`Dropout::draw`] made for probability `p`.
    pub fn from_mask(mask: Tensor, p: f64) -> Self {
        let keep =
            if mask.device() == Device::Cpu { dropout::keep_probability(p) } else { 1.0 - p };
        Self { mask, keep }
    }

    /// Checks that the mask is one for `x`.
    fn check(&self, x: &Tensor) -> Result<()> {
        checks::kind("mask", &self.mask, Kind::Uint8)?;
        checks::same_device("mask", &self.mask, "x", x)?;
        if !self.mask.is_contiguous() {
            return Err(Error::Value("mask is not contiguous; give the one of the forward".into()));
        }
        if x.device() == Device::Cpu {
            return checks::shape("mask", &self.mask, &[(x.numel() as i64 + 7) / 8]);
        }
        checks::shape("mask", &self.mask, &x.size())
    }

    /// Zeroes what is dropped. The division by `keep` is left to the caller, who folds it into a
    /// smaller factor.
    fn zero_(&self, values: &mut Tensor) -> Result<()> {
        if values.device() == Device::Cpu {
            return dropout::zero_(values, &self.mask);
        }
        let _ = values.f_mul_(&self.mask)?;
        Ok(())
    }

    /// `x` with zeros where it is dropped, contiguous.
    fn applied(&self, x: &Tensor) -> Result<Tensor> {
        let mut dropped = x.f_empty_like()?.f_contiguous()?;
        dropped.f_copy_(x)?;
        self.zero_(&mut dropped)?;
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
    dropout: Option<&Dropout>,
) -> Result<Tensor> {
    adapter.check(x)?;
    checks::shape("y", y, &[x.size()[0], adapter.b.size()[0]])?;
    checks::float("y", y)?;
    checks::same_device("y", y, "x", x)?;
    let a = adapter.a.f_mul_scalar(Dropout::gain(dropout))?.f_to_kind(x.kind())?;
    let p = adapter.scaled_b()?.f_to_kind(x.kind())?;
    let t = match dropout {
        Some(dropout) => dropout.applied(x)?.f_mm(&a.f_tr()?)?,
        None => x.f_mm(&a.f_tr()?)?,
    };
    if y.kind() == x.kind() {
        let _ = y.f_addmm_(&t, &p.f_tr()?)?;
    } else {
        let _ = y.f_add_(&t.f_mm(&p.f_tr()?)?)?;
    }
    Ok(t)
}

/// Backward: the gradients for x, A, B, E from `gy`, the gradient of y (tokens, out).
///
/// Needs `x` and the `t` that [`forward`] gave. Where `importance` is given, the module's importance
/// is added to that slot of that vector (see [`crate::importance`]).
pub fn backward(
    adapter: &Adapter,
    x: &Tensor,
    t: &Tensor,
    gy: &Tensor,
    dropout: Option<&Dropout>,
    needs_x: bool,
    importance: Option<(&mut Tensor, i64)>,
) -> Result<Gradients> {
    adapter.check(x)?;
    let (rows, _) = adapter.a.size2()?;
    let out = adapter.b.size()[0];
    for (name, tensor, width) in [("gy", gy, out), ("t", t, rows)] {
        checks::float(name, tensor)?;
        checks::same_device(name, tensor, "x", x)?;
        checks::shape(name, tensor, &[x.size()[0], width])?;
    }
    if let Some(dropout) = dropout {
        dropout.check(x)?;
    }
    let (gy, t) = (gy.f_to_kind(x.kind())?, t.f_to_kind(x.kind())?);
    let gain = Dropout::gain(dropout);
    let kind = adapter.a.kind();

    let scaled_e = adapter.scaled_e()?;
    let p = adapter.b.f_mul(&scaled_e)?;
    let u = gy.f_mm(&p.f_to_kind(x.kind())?)?;
    let dropped = dropout.map(|dropout| dropout.applied(x)).transpose()?;
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
        if let Some(dropout) = dropout {
            dropout.zero_(&mut grad_x)?;
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
        let got = backward(&adapter(), &x, &t, &gy, None, true, None).unwrap();
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
        backward(&adapter(), &x, &t, &gy, None, false, slot).unwrap();
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
        let dropout = Dropout { mask: Tensor::zeros([1], (Kind::Uint8, Device::Cpu)), keep: 0.0 };
        assert_eq!(Dropout::gain(Some(&dropout)), 1.0);
    }
}
