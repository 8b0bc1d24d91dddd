//! The projection down with the dropout fused.

use tch::{Kind, Tensor};

use super::dropout::{apply_mask, bytes, draw_mask};
use super::list::Kernels;
use super::operands::{aligned, check_factor, int};
use super::runtime::{target, Argument, Stream};
use crate::checks;
use crate::errors::Result;
use crate::kernels::dropout;

pub(super) const KERNELS: Kernels =
    Kernels { typed: &["down_8", "down_16"], ..Kernels::of(include_str!("down.cu")) };

// As down.cu has them.
const THREADS: u32 = 128;
const TOKENS: i64 = 16;
/// Past this many ranks, tensor cores on a dropped x beat reading x once for every sixteen.
const RANKS: i64 = 32;

/// `t = gain * drop(x) A^T`, (tokens, ranks), and the packed mask that was drawn for it.
///
/// `x` is (tokens, in), `a` (ranks, in) of the dtype of x; sums are taken in float32. `None` if not taken.
pub fn down(
    x: &Tensor,
    a: &Tensor,
    gain: f64,
    draw: &dropout::Stream,
    stream: Stream,
) -> Result<Option<(Tensor, Tensor)>> {
    let Some((target, suffix)) = target(x, stream) else { return Ok(None) };
    let (tokens, features) = checks::matrix("x", x)?;
    let (ranks, _) = checks::matrix("A", a)?;
    check_factor("A", a, x, &[ranks, features])?;
    let x = aligned(x)?;
    let fused = features % 8 == 0 && ranks <= RANKS && tokens * features * ranks > 0;
    if !fused {
        let Some(mask) = draw_mask(&x, draw, stream)? else { return Ok(None) };
        let Some(dropped) = apply_mask(&x, &mask, stream)? else { return Ok(None) };
        return Ok(Some((dropped.f_mm(&a.f_tr()?)?.f_mul_scalar(gain)?, mask)));
    }
    let a = aligned(a)?;
    let t = Tensor::f_empty([tokens, ranks], (x.kind(), x.device()))?;
    let mask = Tensor::f_empty([bytes(tokens * features)], (Kind::Uint8, x.device()))?;
    let arguments = [
        Argument::of(&t),
        Argument::of(&mask),
        Argument::of(&x),
        Argument::of(&a),
        Argument::Int(int("tokens", tokens)?),
        Argument::Int(int("features", features)?),
        Argument::Int(int("ranks", ranks)?),
        Argument::Float(gain as f32),
        Argument::Long(draw.seed()),
        Argument::Long(draw.offset()),
        Argument::Word(draw.threshold()),
    ];
    let kernel = format!("down_{}_{suffix}", if ranks <= 8 { 8 } else { 16 });
    let blocks = (tokens + TOKENS - 1) / TOKENS;
    // SAFETY: the arguments of down.cu; contiguous, aligned, of the shapes checked or made.
    unsafe { target.launch(&kernel, (blocks, 1), THREADS, &arguments)? };
    Ok(Some((t, mask)))
}
