//! The update by the loops of [`crate::kernels::tokens`], where they can: float32 and bfloat16 on the CPU, small
//! ranks. Every function gives `None` for a case that is not theirs.

use tch::{Device, Kind, Tensor};

use super::{BlockDiagonal, Gradients};
use crate::errors::Result;
use crate::kernels::plain::{as_slice, as_slice_mut};
use crate::kernels::simd::{Bf16, Element};
use crate::kernels::tokens::{self, Factor};
use crate::ops::base::{self, Start};
use crate::ops::dropout::Dropout;

/// Most rows of a slice that the loops take: above it libtorch's matrix products are faster.
const MOST_ROWS: i64 = 32;

fn takes(update: &BlockDiagonal, x: &Tensor, dropout: Option<&Dropout>) -> Result<bool> {
    let (slices, rows, _) = update.a.size3()?;
    Ok(x.device() == Device::Cpu
        && matches!(x.kind(), Kind::Float | Kind::BFloat16)
        && update.a.kind() != Kind::Double
        && (1..=MOST_ROWS).contains(&rows)
        && slices > 0
        && x.numel() > 0
        && update.b.numel() > 0
        && dropout.is_none_or(|dropout| dropout.is_drawn_anew(x)))
}

/// What the products of one call take, as the loops want it: float32.
struct Operands {
    /// A times the dropout's gain, (n, rows, in / n).
    a: Tensor,
    /// `s B^T`, (n, rows, out / n).
    p: Tensor,
}

impl Operands {
    fn of(update: &BlockDiagonal, gain: f64) -> Result<Self> {
        let float = |tensor: &Tensor, factor: f64| -> Result<Tensor> {
            Ok(super::scaled(&tensor.f_to_kind(Kind::Float)?, factor, Kind::Float)?
                .f_contiguous()?)
        };
        let a = float(&update.a, gain)?;
        Ok(Self { a, p: float(&update.b.f_transpose(1, 2)?, update.scale)? })
    }

    fn factors(&self) -> [Factor<'_>; 2] {
        [&self.a, &self.p].map(|tensor| {
            let (slices, rows) = (tensor.size()[0] as usize, tensor.size()[1] as usize);
            Factor::stack(as_slice::<f32>(tensor), slices, rows)
        })
    }
}

/// As [`super::forward`], of a contiguous `x`.
pub fn forward(
    update: &BlockDiagonal,
    x: &Tensor,
    y: &mut Tensor,
    start: Start<'_>,
    dropout: Option<&Dropout>,
) -> Result<Option<Tensor>> {
    if !takes(update, x, dropout)? || y.kind() != x.kind() || !y.is_contiguous() {
        return Ok(None);
    }
    let operands = Operands::of(update, Dropout::gain(dropout))?;
    let bias = start.bias()?;
    let first = start.of_loops(bias.as_deref());
    let (slices, rows, _) = update.a.size3()?;
    let t = Tensor::f_empty([slices, x.size()[0], rows], (Kind::Float, Device::Cpu))?;
    let stream = dropout.map(|dropout| &dropout.stream);
    let [a, p] = operands.factors();
    // SAFETY: t was just made, y is the output; nobody else has a slice of either.
    let to = unsafe { as_slice_mut::<f32>(&t) };
    if x.kind() == Kind::Float {
        let y = unsafe { as_slice_mut::<f32>(y) };
        tokens::forward(as_slice::<f32>(x), a, p, first, stream, to, y);
    } else {
        let y = unsafe { as_slice_mut::<Bf16>(y) };
        tokens::forward(as_slice::<Bf16>(x), a, p, first, stream, to, y);
    }
    Ok(Some(t))
}

/// As [`super::backward`], of contiguous `x` and `gy`.
pub fn backward(
    update: &BlockDiagonal,
    x: &Tensor,
    t: &Tensor,
    gy: &Tensor,
    dropout: Option<&Dropout>,
    weight: Option<&Tensor>,
    needs_x: bool,
) -> Result<Option<Gradients>> {
    if !takes(update, x, dropout)? {
        return Ok(None);
    }
    let gain = Dropout::gain(dropout);
    let operands = Operands::of(update, gain)?;
    let t = t.f_to_kind(Kind::Float)?.f_contiguous()?;
    // A product of bfloat16 that adds takes longer than one that writes and adding the update to it, one of float32
    // does not.
    let first = weight.filter(|_| x.kind() == Kind::BFloat16);
    let mut grad_x = match first {
        _ if !needs_x => None,
        Some(weight) => Some(gy.f_mm(weight)?),
        None => Some(Tensor::f_empty(x.size(), (x.kind(), Device::Cpu))?),
    };
    let to = grad_x.as_ref().map(|grad_x| (grad_x, first.is_some()));
    let sums = if x.kind() == Kind::Float {
        run_backward::<f32>(x, &t, gy, &operands, dropout, to)
    } else {
        run_backward::<Bf16>(x, &t, gy, &operands, dropout, to)
    };
    if let (Some(grad_x), Some(weight), None) = (&mut grad_x, weight, first) {
        base::add_grad_x(weight, gy, grad_x)?;
    }
    let tensor = |values: &[f32], like: &Tensor| -> Result<Tensor> {
        Ok(Tensor::f_from_slice(values)?.f_view(like.size().as_slice())?)
    };
    let (grad_a, left) = (tensor(&sums.a, &operands.a)?, tensor(&sums.q, &operands.p)?);
    Ok(Some(Gradients {
        x: grad_x,
        a: super::scaled(&grad_a, gain, update.a.kind())?,
        b: super::scaled(&left.f_transpose(1, 2)?, update.scale, update.b.kind())?
            .f_contiguous()?,
    }))
}

fn run_backward<E: Element>(
    x: &Tensor,
    t: &Tensor,
    gy: &Tensor,
    operands: &Operands,
    dropout: Option<&Dropout>,
    grad_x: Option<(&Tensor, bool)>,
) -> tokens::Sums {
    // SAFETY: the caller has just made it; nobody else has a slice of it.
    let grad_x = grad_x.map(|(grad_x, add)| (unsafe { as_slice_mut::<E>(grad_x) }, add));
    let stream = dropout.map(|dropout| &dropout.stream);
    let [a, p] = operands.factors();
    tokens::backward(
        as_slice::<E>(x),
        as_slice::<E>(gy),
        as_slice::<f32>(t),
        (a, p),
        stream,
        grad_x,
    )
}
