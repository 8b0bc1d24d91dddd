//! The low-rank update of one module, `y += s B (E * (A drop(x)))`, forward and backward
//! (arXiv 2308.12043, eq. 3; E holds the singular values, s the scale).
//!
//! A holds `active + reserve` rows and E only the active ones: the reserve counts with the constant
//! [`RESERVE_E`], which is not trained ("advance learning", section 3.3 of the paper).
//!
//! The products are of contiguous matrices, whatever the strides of what is given: a BLAS rounds by the
//! layout, and eager mode and a compiled graph hand over the same numbers in different ones.

use tch::{Device, Kind, Tensor};

use crate::checks;
use crate::errors::{Error, Result};
use crate::importance::{self, Input};
use crate::kernels::cuda;
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

/// The dropout of one call. The mask is a function of `seed`: the CPU draws it anew where it is needed,
/// the kernels of a CUDA device keep it, a bit an element. Where there are no such kernels it comes from
/// torch's generator and is kept, a byte an element.
pub struct Dropout {
    stream: Stream,
    /// The mask, if it is kept, or given.
    pub mask: Option<Tensor>,
    /// Probability with which an element is kept.
    pub keep: f64,
    packed: bool,
    queue: cuda::Stream,
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

    /// A and P in the dtype of the products.
    fn operands(&self, kind: Kind) -> Result<Operands> {
        if let Some((a, p)) = cuda::factors(self.parameters(), kind, self.queue)? {
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
        cuda::Parameters { a: &self.a, b: &self.b, e: &self.e, scale: self.scale }
    }

    /// `P = s B diag(E)`, so that dW = P A: (out, rows), in the parameters' dtype.
    pub fn scaled_b(&self) -> Result<Tensor> {
        Ok(self.b.f_mul(&self.scaled_e()?)?)
    }
}

impl Dropout {
    /// For a tensor like `x`, dropout probability `p`, and the mask that [`forward`] used, if it was
    /// kept.
    pub fn new(x: &Tensor, p: f64, seed: u64, mask: Option<Tensor>, queue: cuda::Stream) -> Self {
        let stream = Stream::new(p, seed, 0);
        let packed = x.device() == Device::Cpu || cuda::takes(x, queue);
        let keep = if packed { stream.keep_probability() } else { 1.0 - p };
        Self { stream, mask, keep, packed, queue }
    }

    /// Draws what has to be kept until the backward pass, if it is not there yet.
    fn prepare(&mut self, x: &Tensor) -> Result<()> {
        if self.mask.is_none() && !self.packed {
            let mut mask = Tensor::f_empty(x.size(), (Kind::Uint8, x.device()))?;
            let _ = mask.f_bernoulli_float_(self.keep)?;
            self.mask = Some(mask);
        }
        Ok(())
    }

    /// The mask for `x`, checked.
    fn mask_for(&self, x: &Tensor) -> Result<Tensor> {
        let Some(mask) = &self.mask else {
            if x.device() == Device::Cpu {
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
        let shape = if self.packed { packed.to_vec() } else { x.size() };
        checks::shape("mask", mask, &shape)?;
        Ok(mask.shallow_clone())
    }

    /// Zeroes what is dropped. The division by `keep` is left to the caller, who folds it into a
    /// smaller factor.
    fn zero_(&self, values: &mut Tensor, mask: &Tensor) -> Result<()> {
        if self.packed {
            return dropout::zero_(values, mask);
        }
        let _ = values.f_mul_(mask)?;
        Ok(())
    }

    /// `x` with zeros where it is dropped, contiguous.
    fn applied(&self, x: &Tensor, mask: &Tensor) -> Result<Tensor> {
        if let Some(dropped) = cuda::apply_mask(x, mask, self.queue)? {
            return Ok(dropped);
        }
        if self.packed {
            return dropout::applied(x, mask);
        }
        Ok(x.f_mul(mask)?.f_contiguous()?)
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
    dropout: Option<&mut Dropout>,
) -> Result<Tensor> {
    adapter.check(x)?;
    checks::shape("y", y, &[x.size()[0], adapter.b.size()[0]])?;
    checks::float("y", y)?;
    checks::same_device("y", y, "x", x)?;
    let x = &x.f_contiguous()?;
    if let Some(t) = fast::forward(adapter, x, y, fast::Start::Add, dropout.as_deref())? {
        return Ok(t);
    }
    let Operands { a, p } = adapter.operands(x.kind())?;
    let t = down(adapter, &a, x, dropout)?;
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
    adapter: &Adapter,
    a: &Tensor,
    x: &Tensor,
    dropout: Option<&mut Dropout>,
) -> Result<Tensor> {
    let gain = Dropout::gain(dropout.as_deref());
    let Some(dropout) = dropout else {
        return Ok(x.f_mm(&a.f_tr()?)?);
    };
    if dropout.mask.is_none() {
        if let Some((t, mask)) = cuda::down(x, a, gain, &dropout.stream, adapter.queue)? {
            dropout.mask = Some(mask);
            return Ok(t);
        }
    }
    dropout.prepare(x)?;
    let a = adapter.a.f_mul_scalar(gain)?.f_to_kind(x.kind())?;
    Ok(dropout.applied(x, &dropout.mask_for(x)?)?.f_mm(&a.f_tr()?)?)
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
    let x = &x.f_contiguous()?;
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
    let (x, gy) = (&x.f_contiguous()?, gy.f_to_kind(x.kind())?.f_contiguous()?);
    if let Some(mut gradients) = fast::backward(adapter, x, t, &gy, dropout, needs_x)? {
        if let Some(slot) = importance {
            let input = match dropout {
                Some(dropout) => Input::Dropped(x, &dropout.stream),
                None => Input::Whole(x),
            };
            let p = adapter.scaled_b()?;
            let gain = Dropout::gain(dropout);
            importance::accumulate(slot, &p, &adapter.a, &gy, input, gain, adapter.queue)?;
        }
        if let (Some(grad_x), Some(weight)) = (&mut gradients.x, weight) {
            let _ = grad_x.f_addmm_(&gy, weight)?;
        }
        return Ok(gradients);
    }
    let t = t.f_to_kind(x.kind())?.f_contiguous()?;
    let gain = Dropout::gain(dropout);
    let Operands { a, p } = adapter.operands(x.kind())?;
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
    let [grad_a, grad_b, grad_e] = adapter.gradients(&right, &left, gain)?;
    if let Some(slot) = importance {
        let input = Input::Whole(dropped);
        let p = if p.kind() == adapter.a.kind() { p } else { adapter.scaled_b()? };
        importance::accumulate(slot, &p, &adapter.a, &gy, input, gain, adapter.queue)?;
    }
    let grad_x = if needs_x {
        let masked = masked.as_ref().map(|(dropout, mask)| (*dropout, mask));
        let mut grad_x = up(adapter, &a, &u, masked)?;
        if let Some(weight) = weight {
            let _ = grad_x.f_addmm_(&gy, weight)?;
        }
        Some(grad_x)
    } else {
        None
    };
    Ok(Gradients { x: grad_x, a: grad_a, b: grad_b, e: grad_e })
}

/// `drop(u A)` with the dropout's gain, (tokens, in). `a` is A in the dtype of u.
fn up(
    adapter: &Adapter,
    a: &Tensor,
    u: &Tensor,
    masked: Option<(&Dropout, &Tensor)>,
) -> Result<Tensor> {
    let gain = Dropout::gain(masked.map(|(dropout, _)| dropout));
    let size = [u.size()[0], adapter.a.size()[1]];
    if cuda::takes(u, adapter.queue) {
        let mut out = Tensor::f_empty(size, (u.kind(), u.device()))?;
        let mask = masked.map(|(_, mask)| mask);
        if cuda::add_grad_x(&mut out, false, u, a, mask, gain, adapter.queue)? {
            return Ok(out);
        }
    }
    let mut out = u.f_mm(&adapter.a.f_mul_scalar(gain)?.f_to_kind(u.kind())?)?;
    if let Some((dropout, mask)) = masked {
        dropout.zero_(&mut out, mask)?;
    }
    Ok(out)
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
            queue: cuda::Stream(0),
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
        let dropout = Dropout::new(&matrix(1, &[1.0]), 1.0, 0, None, cuda::Stream(0));
        assert_eq!(Dropout::gain(Some(&dropout)), 1.0);
    }
}
