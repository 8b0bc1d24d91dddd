//! How much a module matters: `I = sum |dW * G|`, taken block by block (arXiv 2308.12043, eq. 6).

use tch::{Kind, Tensor};

use crate::checks;
use crate::errors::{Error, Result};
use crate::kernels::cuda;
use crate::kernels::dropout::{self, Stream};

mod blocks;

/// Bytes that the blocks of dW and of G may take together, where [`blocks`] does not take the case.
const SCRATCH: i64 = 8 << 20;
/// Rows of one such block, at most: enough for the matrix product to run at full speed.
const BLOCK_ROWS: i64 = 512;

/// What the module was given, (tokens, in).
#[derive(Clone, Copy)]
pub enum Input<'a> {
    /// As it is.
    Whole(&'a Tensor),
    /// Times the mask of a random stream, on the CPU.
    Dropped(&'a Tensor, &'a Stream),
}

impl<'a> Input<'a> {
    fn tensor(self) -> &'a Tensor {
        match self {
            Self::Whole(x) | Self::Dropped(x, _) => x,
        }
    }
}

/// Adds `gain * sum_ij |(P A)_ij (gy^T x)_ij|` to `vector[slot]`, without a host synchronisation.
///
/// `p` (out, rows) and `a` (rows, in) make dW = P A; `gy` (tokens, out) and the input x (tokens, in), of
/// one dtype, make the gradient of dW. Neither matrix exists as a whole: both are built in blocks. Kernels
/// for a CUDA device are queued on `queue`.
pub fn accumulate(
    (vector, slot): (&mut Tensor, i64),
    p: &Tensor,
    a: &Tensor,
    gy: &Tensor,
    input: Input<'_>,
    gain: f64,
    queue: cuda::Stream,
) -> Result<()> {
    let x = input.tensor();
    checks::kind("importance", vector, Kind::Double)?;
    checks::same_device("importance", vector, "x", x)?;
    let length = checks::vector("importance", vector)?;
    if slot < 0 || slot >= length {
        return Err(Error::Value(format!(
            "slot is {slot}; the importance vector has the slots 0 to {}",
            length - 1
        )));
    }
    if let Input::Whole(x) = input {
        if cuda::accumulate(vector, slot, p, a, gy, x, gain, queue)? {
            return Ok(());
        }
    }
    let mut target = vector.f_narrow(0, slot, 1)?;
    if let Some(sum) = blocks::sum(p, a, gy, input)? {
        let _ = target.f_add_scalar_(gain * sum)?;
        return Ok(());
    }
    let dropped = match input {
        Input::Dropped(x, stream) => Some(dropout::applied(x, &dropout::draw(x.numel(), stream)?)?),
        Input::Whole(_) => None,
    };
    let x = dropped.as_ref().unwrap_or(x);
    let (out, _) = checks::matrix("P", p)?;
    let features = x.size()[1];
    // bfloat16 products and sums would lose the small entries; float32 is what dW is built in.
    let wide = if p.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let bytes_a_row = 2 * features.max(1) * wide.elt_size_in_bytes() as i64;
    let rows = (SCRATCH / bytes_a_row).clamp(1, BLOCK_ROWS);
    let (p, a) = (p.f_to_kind(wide)?, a.f_to_kind(wide)?);
    let (gy, x) = (gy.f_contiguous()?, x.f_contiguous()?);
    // Added to the slot as one number, whatever the slot holds.
    let mut total = Tensor::f_zeros([1], (Kind::Double, x.device()))?;
    let mut first = 0;
    while first < out {
        let n = rows.min(out - first);
        let g = gy.f_narrow(1, first, n)?.f_tr()?.f_mm(&x)?.f_to_kind(wide)?;
        let mut product = p.f_narrow(0, first, n)?.f_mm(&a)?;
        let _ = product.f_mul_(&g)?.f_abs_()?;
        let _ = total.f_add_(&product.f_sum(Kind::Double)?)?;
        first += n;
    }
    let _ = target.f_add_(&total.f_mul_scalar(gain)?)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    const QUEUE: cuda::Stream = cuda::Stream(0);

    fn random(rows: i64, columns: i64) -> Tensor {
        Tensor::randn([rows, columns], (Kind::Double, Device::Cpu))
    }

    #[test]
    fn blocks_give_the_sum_of_the_whole() {
        let (p, a, gy, x) = (random(1100, 2), random(2, 700), random(3, 1100), random(3, 700));
        let mut vector = Tensor::zeros([1], (Kind::Double, Device::Cpu));
        accumulate((&mut vector, 0), &p, &a, &gy, Input::Whole(&x), 2.0, QUEUE).unwrap();
        let whole = 2.0 * (p.mm(&a) * gy.tr().mm(&x)).abs().sum(Kind::Double).double_value(&[]);
        assert!((vector.double_value(&[0]) / whole - 1.0).abs() < 1e-12);
    }

    fn in_blocks(tokens: i64, (features, out): (i64, i64), kind: Kind, p: f64) -> (f64, f64) {
        let [left, right] = [random(out, 3), random(3, features)].map(|t| t.to_kind(Kind::Float));
        let [gy, x] = [random(tokens, out), random(tokens, features)].map(|t| t.to_kind(kind));
        let stream = Stream::new(p, 7, 0);
        let mut dropped = x.copy();
        dropout::zero_(&mut dropped, &dropout::draw(x.numel(), &stream).unwrap()).unwrap();
        let got = blocks::sum(&left, &right, &gy, Input::Dropped(&x, &stream)).unwrap().unwrap();
        let [left, right, gy, x] = [left, right, gy, dropped].map(|t| t.to_kind(Kind::Double));
        (got, (left.mm(&right) * gy.tr().mm(&x)).abs().sum(Kind::Double).double_value(&[]))
    }

    #[test]
    fn narrow_dtypes_give_the_sum_of_float64_in_every_kind_of_blocks() {
        // The gradient's entries are rounded to bfloat16, each by up to 2^-9 of itself; float32
        // arithmetic on both sides of the rounding leaves the other half of the bound unused.
        let bfloat16 = f64::from(2.0_f32.powi(-8));
        // One block; several of rows, columns and tokens with remainders in each.
        for (tokens, shape) in [(5, (7, 3)), (33, (300, 600)), (2100, (1030, 520))] {
            for p in [0.0, 0.25] {
                let (got, want) = in_blocks(tokens, shape, Kind::Float, p);
                assert!(
                    (got / want - 1.0).abs() < 1e-6,
                    "float32 {tokens} {shape:?}: {got} {want}"
                );
                let (got, want) = in_blocks(tokens, shape, Kind::BFloat16, p);
                assert!(
                    (got / want - 1.0).abs() < bfloat16,
                    "bfloat16 {tokens} {shape:?}: {got} {want}"
                );
            }
        }
    }

    #[test]
    fn a_slot_past_the_vector_is_refused() {
        let (p, a, gy, x) = (random(4, 1), random(1, 4), random(2, 4), random(2, 4));
        let mut vector = Tensor::zeros([2], (Kind::Double, Device::Cpu));
        let refused = accumulate((&mut vector, 2), &p, &a, &gy, Input::Whole(&x), 1.0, QUEUE);
        let refused = refused.unwrap_err().to_string();
        assert_eq!(refused, "slot is 2; the importance vector has the slots 0 to 1");
    }
}
