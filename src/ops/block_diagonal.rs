//! The block-diagonal update of one module, `y_i += s B_i (A_i drop(x)_i)` for n equal slices of x and y, forward
//! and backward (MELoRA, arXiv 2402.17263): in loops over tokens, or all slices in one batched product.

use tch::{Kind, Tensor};

use crate::checks;
use crate::errors::Result;
use crate::ops::base::{self, Start};
use crate::ops::dropout::Dropout;

mod cpu;

/// The parameters of one adapted module.
pub struct BlockDiagonal {
    /// A of every slice, (n, rows, in / n).
    pub a: Tensor,
    /// B of every slice, (n, out / n, rows).
    pub b: Tensor,
    /// The scale s.
    pub scale: f64,
}

/// What the backward pass gives.
pub struct Gradients {
    /// For x, flat (tokens, in); `None` where it was not asked for.
    pub x: Option<Tensor>,
    /// For A.
    pub a: Tensor,
    /// For B.
    pub b: Tensor,
}

impl BlockDiagonal {
    /// Features that come out.
    pub fn out(&self) -> Result<i64> {
        let (slices, width, _) = checks::stack("B", &self.b)?;
        Ok(slices * width)
    }

    /// Checks that the shapes, dtypes and devices fit together, and fit `x` of shape (tokens, in).
    fn check(&self, x: &Tensor) -> Result<()> {
        for (name, tensor) in [("x", x), ("A", &self.a), ("B", &self.b)] {
            checks::float(name, tensor)?;
            checks::same_device(name, tensor, "x", x)?;
        }
        checks::kind("B", &self.b, self.a.kind())?;
        let (slices, rows, width) = checks::stack("A", &self.a)?;
        let (_, out, _) = checks::stack("B", &self.b)?;
        let (tokens, _) = checks::matrix("x", x)?;
        checks::shape("B", &self.b, &[slices, out, rows])?;
        checks::shape("x", x, &[tokens, slices * width])?;
        checks::finite("scale", self.scale)
    }

    /// A matrix (tokens, n width) by slices, (n, tokens, width): a view.
    fn slices(&self, matrix: &Tensor) -> Result<Tensor> {
        let (tokens, columns) = matrix.size2()?;
        let slices = self.a.size()[0];
        Ok(matrix.f_view([tokens, slices, columns / slices.max(1)])?.f_transpose(0, 1)?)
    }

    /// A times the dropout's gain, in the dtype of the products.
    fn down(&self, gain: f64, kind: Kind) -> Result<Tensor> {
        scaled(&self.a, gain, kind)
    }

    /// `s B`, likewise.
    fn up(&self, kind: Kind) -> Result<Tensor> {
        scaled(&self.b, self.scale, kind)
    }
}

fn scaled(tensor: &Tensor, factor: f64, kind: Kind) -> Result<Tensor> {
    if factor == 1.0 {
        return Ok(tensor.f_to_kind(kind)?);
    }
    Ok(tensor.f_mul_scalar(factor)?.f_to_kind(kind)?)
}

/// Forward. Puts the update into `y` (tokens, out), contiguous, which holds what `start` says, and gives
/// `t = A drop(x)`, (n, tokens, rows).
pub fn forward(
    update: &BlockDiagonal,
    x: &Tensor,
    y: &mut Tensor,
    start: Start<'_>,
    dropout: Option<&mut Dropout>,
) -> Result<Tensor> {
    update.check(x)?;
    checks::float("y", y)?;
    checks::shape("y", y, &[x.size()[0], update.out()?])?;
    checks::same_device("y", y, "x", x)?;
    let x = &x.f_contiguous()?;
    if let Some(t) = cpu::forward(update, x, y, start, dropout.as_deref())? {
        return Ok(t);
    }
    start.write(y)?;
    let a = update.down(Dropout::gain(dropout.as_deref()), x.kind())?;
    let x = Dropout::drop(dropout, x)?;
    let t = update.slices(&x)?.f_bmm(&a.f_transpose(1, 2)?)?;
    let p = update.up(x.kind())?.f_transpose(1, 2)?;
    let mut slices = update.slices(y)?;
    if y.kind() == x.kind() {
        let _ = slices.f_baddbmm_(&t, &p)?;
    } else {
        let _ = slices.f_add_(&t.f_bmm(&p)?)?;
    }
    Ok(t)
}

/// Backward: the gradients for x, A and B from `gy`, the gradient of y (tokens, out).
///
/// Needs `x` and the `t` that [`forward`] gave. With the `weight` of the base layer the gradient of x is the
/// whole layer's, not the update's alone.
pub fn backward(
    update: &BlockDiagonal,
    x: &Tensor,
    t: &Tensor,
    gy: &Tensor,
    dropout: Option<&Dropout>,
    weight: Option<&Tensor>,
    needs_x: bool,
) -> Result<Gradients> {
    update.check(x)?;
    let (tokens, out) = (x.size()[0], update.out()?);
    let (slices, rows, _) = checks::stack("A", &update.a)?;
    for (name, tensor, want) in
        [("gy", gy, &[tokens, out][..]), ("t", t, &[slices, tokens, rows][..])]
    {
        checks::float(name, tensor)?;
        checks::same_device(name, tensor, "x", x)?;
        checks::shape(name, tensor, want)?;
    }
    if let Some(weight) = weight {
        base::check_weight(weight, x, out)?;
    }
    let (kind, gain) = (x.kind(), Dropout::gain(dropout));
    let (x, gy) = (x.f_contiguous()?, gy.f_to_kind(kind)?.f_contiguous()?);
    if let Some(gradients) = cpu::backward(update, &x, t, &gy, dropout, weight, needs_x)? {
        return Ok(gradients);
    }
    let dropped = Dropout::drop_again(dropout, &x)?;
    let by_slice = update.slices(&gy)?;
    let u = by_slice.f_bmm(&update.up(kind)?)?;
    let grad_a = u.f_transpose(1, 2)?.f_bmm(&update.slices(&dropped)?)?;
    // (n, rows, out / n): t^T gy reads gy row by row.
    let left = t.f_to_kind(kind)?.f_transpose(1, 2)?.f_bmm(&by_slice)?;
    let grad_b = scaled(&left.f_transpose(1, 2)?, update.scale, update.b.kind())?.f_contiguous()?;
    let grad_x = if needs_x {
        let mut grad_x = Tensor::f_empty(x.size(), (kind, x.device()))?;
        let _ = u.f_bmm_out(&update.slices(&grad_x)?, &update.down(gain, kind)?)?;
        Dropout::zero_gradient_(dropout, &mut grad_x)?;
        if let Some(weight) = weight {
            base::add_grad_x(weight, &gy, &mut grad_x)?;
        }
        Some(grad_x)
    } else {
        None
    };
    Ok(Gradients { x: grad_x, a: scaled(&grad_a, gain, update.a.kind())?, b: grad_b })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cuda;

    fn tensor(shape: &[i64], values: &[f64]) -> Tensor {
        Tensor::from_slice(values).reshape(shape)
    }

    fn two_slices() -> BlockDiagonal {
        BlockDiagonal {
            a: tensor(&[2, 1, 2], &[1.0, 2.0, 3.0, 4.0]),
            b: tensor(&[2, 1, 1], &[5.0, 6.0]),
            scale: 0.5,
        }
    }

    #[test]
    fn forward_adds_each_slice_to_its_own() {
        let mut y = tensor(&[1, 2], &[100.0, 200.0]);
        let t =
            forward(&two_slices(), &tensor(&[1, 4], &[1.0; 4]), &mut y, Start::Add, None).unwrap();
        assert_eq!(t, tensor(&[2, 1, 1], &[3.0, 7.0]));
        assert_eq!(y, tensor(&[1, 2], &[107.5, 221.0]));
    }

    #[test]
    fn backward_gives_the_gradients() {
        let (x, gy) = (tensor(&[1, 4], &[1.0, 2.0, 3.0, 4.0]), tensor(&[1, 2], &[2.0, -1.0]));
        let t = tensor(&[2, 1, 1], &[5.0, 25.0]);
        let got = backward(&two_slices(), &x, &t, &gy, None, None, true).unwrap();
        assert_eq!(got.x, Some(tensor(&[1, 4], &[5.0, 10.0, -9.0, -12.0])));
        assert_eq!(got.a, tensor(&[2, 1, 2], &[5.0, 10.0, -9.0, -12.0]));
        assert_eq!(got.b, tensor(&[2, 1, 1], &[5.0, -12.5]));
    }

    #[test]
    fn the_loops_and_libtorch_give_the_same() {
        let random = |shape: &[i64]| Tensor::randn(shape, (Kind::Double, tch::Device::Cpu));
        let (x, gy, bias) = (random(&[37, 60]), random(&[37, 105]), random(&[105]));
        let weight = random(&[105, 60]);
        let wide = BlockDiagonal { a: random(&[3, 5, 20]), b: random(&[3, 35, 5]), scale: 0.5 };
        let run = |update: &BlockDiagonal, kind: Kind, p: f64| {
            let [x, gy, bias, weight] = [&x, &gy, &bias, &weight].map(|t| t.to_kind(kind));
            let mut dropout = Dropout::of(&x, p, 3, None, cuda::Stream(0)).unwrap();
            let mut y = Tensor::full([37, 105], f64::NAN, (kind, tch::Device::Cpu));
            let start = Start::Bias(Some(&bias));
            let t = forward(update, &x, &mut y, start, dropout.as_mut()).unwrap();
            let (dropout, weight) = (dropout.as_ref(), Some(&weight));
            let got = backward(update, &x, &t, &gy, dropout, weight, true).unwrap();
            [y, t, got.x.unwrap(), got.a, got.b].map(|tensor| tensor.to_kind(Kind::Double))
        };
        for (kind, p) in
            [Kind::Float, Kind::BFloat16].into_iter().flat_map(|kind| [(kind, 0.0), (kind, 0.3)])
        {
            let [a, b] = [&wide.a, &wide.b].map(|tensor| tensor.to_kind(kind));
            let tolerance = if kind == Kind::Float { 1e-5 } else { 2e-2 };
            let narrow = BlockDiagonal { a, b, scale: 0.5 };
            for (got, want) in run(&narrow, kind, p).iter().zip(run(&wide, Kind::Double, p)) {
                let largest = f64::try_from((got - &want).abs().max() / want.abs().max()).unwrap();
                assert!(largest < tolerance, "{kind:?} {p} {:?}: {largest}", want.size());
            }
        }
    }

    #[test]
    fn slices_that_do_not_fit_x_are_refused() {
        let mut y = tensor(&[1, 2], &[0.0; 2]);
        let x = tensor(&[1, 3], &[1.0; 3]);
        let error = forward(&two_slices(), &x, &mut y, Start::Add, None).unwrap_err();
        assert_eq!(error.to_string(), "x has shape [1, 3]; it must be [1, 4]");
    }
}
