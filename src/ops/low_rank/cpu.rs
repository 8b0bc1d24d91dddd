//! The update by the loops of [`crate::kernels::tokens`], where they can: float32 and bfloat16 on the
//! CPU, small ranks. Every function gives `None` for a case that is not theirs.

use tch::{Device, Kind, Tensor};

use super::{Gradients, LowRank, RESERVE_E};
use crate::errors::Result;
use crate::kernels::cuda;
use crate::kernels::plain::{as_slice, as_slice_mut, contiguous, rounded, widened};
use crate::kernels::simd::{Bf16, Element};
use crate::kernels::tokens::{self, Factor};
use crate::ops::base::Start;
use crate::ops::dropout::Dropout;

/// Most rows that the loops take: above it libtorch's matrix products are faster.
const MOST_ROWS: i64 = 32;

/// Can the loops work on `low_rank` and `x`?
fn takes(low_rank: &LowRank, x: &Tensor) -> bool {
    let rows = low_rank.a.size()[0];
    x.device() == Device::Cpu
        && matches!(x.kind(), Kind::Float | Kind::BFloat16)
        && low_rank.a.kind() != Kind::Double
        && (1..=MOST_ROWS).contains(&rows)
        && x.numel() > 0
        && low_rank.b.numel() > 0
        && !cuda::takes(x, low_rank.queue)
}

/// What the products of one call take, as the loops want it: float32.
struct Operands {
    /// A times the dropout's gain, (rows, in).
    a: Vec<f32>,
    /// `s E`, a value a row.
    scaled_e: Vec<f32>,
    /// B, (out, rows).
    b: Vec<f32>,
    /// `(s B diag(E))^T`, (rows, out).
    p: Vec<f32>,
    rows: usize,
}

impl Operands {
    fn of(low_rank: &LowRank, gain: f64) -> Result<Self> {
        let (mut a, b) = (widened(&low_rank.a)?, widened(&low_rank.b)?);
        let mut scaled_e = widened(&low_rank.e)?;
        let rows = low_rank.a.size()[0] as usize;
        scaled_e.resize(rows, RESERVE_E as f32);
        let scale = low_rank.scale as f32;
        scaled_e.iter_mut().for_each(|e| *e *= scale);
        if gain != 1.0 {
            a.iter_mut().for_each(|a| *a *= gain as f32);
        }
        let out = b.len() / rows;
        let mut p = vec![0.0; b.len()];
        for (o, row) in b.chunks_exact(rows).enumerate() {
            for (r, (value, e)) in row.iter().zip(&scaled_e).enumerate() {
                p[r * out + o] = value * e;
            }
        }
        Ok(Self { a, scaled_e, b, p, rows })
    }

    fn a(&self) -> Factor<'_> {
        Factor::new(&self.a, self.rows)
    }

    fn p(&self) -> Factor<'_> {
        Factor::new(&self.p, self.rows)
    }
}

/// As [`super::forward`], of a contiguous `x`, into `y`, which holds what `start` says.
pub fn forward(
    low_rank: &LowRank,
    x: &Tensor,
    y: &mut Tensor,
    start: Start<'_>,
    dropout: Option<&Dropout>,
) -> Result<Option<Tensor>> {
    let given = dropout.is_some_and(|dropout| dropout.mask.is_some());
    if !takes(low_rank, x) || given || y.kind() != x.kind() || !y.is_contiguous() {
        return Ok(None);
    }
    let operands = Operands::of(low_rank, Dropout::gain(dropout))?;
    let bias = start.bias()?;
    let first = start.of_loops(bias.as_deref());
    let t = Tensor::f_empty([x.size()[0], operands.rows as i64], (Kind::Float, Device::Cpu))?;
    if x.kind() == Kind::Float {
        run_forward::<f32>(x, &operands, first, dropout, &t, y);
    } else {
        run_forward::<Bf16>(x, &operands, first, dropout, &t, y);
    }
    Ok(Some(t))
}

fn run_forward<E: Element>(
    x: &Tensor,
    operands: &Operands,
    start: tokens::Start<'_>,
    dropout: Option<&Dropout>,
    t: &Tensor,
    y: &Tensor,
) {
    let stream = dropout.map(|dropout| &dropout.stream);
    // SAFETY: t was made by the caller, y is the output; nobody else has a slice of either.
    let (t, y) = unsafe { (as_slice_mut::<f32>(t), as_slice_mut::<E>(y)) };
    tokens::forward(as_slice::<E>(x), operands.a(), operands.p(), start, stream, t, y);
}

/// As [`super::backward`], of contiguous `x` and `gy`, with the update's gradient of x alone.
pub fn backward(
    low_rank: &LowRank,
    x: &Tensor,
    t: &Tensor,
    gy: &Tensor,
    dropout: Option<&Dropout>,
    needs_x: bool,
) -> Result<Option<Gradients>> {
    let given = dropout.is_some_and(|dropout| dropout.mask.is_some());
    if !takes(low_rank, x) || given {
        return Ok(None);
    }
    let gain = Dropout::gain(dropout);
    let operands = Operands::of(low_rank, gain)?;
    let t = contiguous(t, Kind::Float)?;
    let grad_x = needs_x.then(|| Tensor::f_empty(x.size(), (x.kind(), Device::Cpu))).transpose()?;
    let sums = if x.kind() == Kind::Float {
        run_backward::<f32>(x, &t, gy, &operands, dropout, grad_x.as_ref())
    } else {
        run_backward::<Bf16>(x, &t, gy, &operands, dropout, grad_x.as_ref())
    };
    let (rows, out) = (operands.rows, operands.p.len() / operands.rows);
    let mut grad_b = vec![0.0f32; operands.p.len()];
    let mut sums_e = vec![0.0f64; rows];
    // Column by column of Q: the sums of all rows grow side by side, each in the order of its columns.
    let pairs = grad_b.chunks_exact_mut(rows).zip(operands.b.chunks_exact(rows));
    for (o, (grad_b, b)) in pairs.enumerate() {
        for (r, (grad_b, &b)) in grad_b.iter_mut().zip(b).enumerate() {
            let q = sums.q[r * out + o];
            *grad_b = q * operands.scaled_e[r];
            sums_e[r] += f64::from(q) * f64::from(b);
        }
    }
    let active = low_rank.e.numel();
    let grad_e: Vec<f32> =
        sums_e[..active].iter().map(|sum| (sum * low_rank.scale) as f32).collect();
    let mut grad_a = sums.a;
    if gain != 1.0 {
        grad_a.iter_mut().for_each(|value| *value *= gain as f32);
    }
    Ok(Some(Gradients {
        x: grad_x,
        a: rounded(&grad_a, &low_rank.a)?,
        b: rounded(&grad_b, &low_rank.b)?,
        e: rounded(&grad_e, &low_rank.e)?,
    }))
}

fn run_backward<E: Element>(
    x: &Tensor,
    t: &Tensor,
    gy: &Tensor,
    operands: &Operands,
    dropout: Option<&Dropout>,
    grad_x: Option<&Tensor>,
) -> tokens::Sums {
    // SAFETY: the caller has just made it; nobody else has a slice of it.
    let grad_x = grad_x.map(|grad_x| (unsafe { as_slice_mut::<E>(grad_x) }, false));
    let stream = dropout.map(|dropout| &dropout.stream);
    let pair = (operands.a(), operands.p());
    tokens::backward(as_slice::<E>(x), as_slice::<E>(gy), as_slice::<f32>(t), pair, stream, grad_x)
}
