//! The gradient of x: the projection back up with the dropout fused.

use tch::Tensor;

use super::dropout::{apply_mask, check_mask};
use super::list::Kernels;
use super::operands::{aligned, check_factor, int, wide};
use super::runtime::{target, Argument, Stream};
use super::tile::{tiles, TILE_THREADS};
use crate::checks;
use crate::errors::Result;

pub(super) const KERNELS: Kernels =
    Kernels { typed: &["add_grad_x"], ..Kernels::of(include_str!("grad_x.cu")) };

/// `gx = gain * drop(u A)`, added to `gx` where `accumulate` is set, in place. False if not taken.
///
/// `gx` is (tokens, in) and contiguous, `u` (tokens, ranks) and `a` (ranks, in) of its dtype; `mask` is the
/// packed one of the forward, `None` without dropout. Sums are taken in float32.
#[allow(clippy::too_many_arguments)]
pub fn add_grad_x(
    gx: &mut Tensor,
    accumulate: bool,
    u: &Tensor,
    a: &Tensor,
    mask: Option<&Tensor>,
    gain: f64,
    stream: Stream,
) -> Result<bool> {
    let Some((target, suffix)) = target(gx, stream) else { return Ok(false) };
    let (tokens, features) = checks::matrix("gx", gx)?;
    let (ranks, _) = checks::matrix("A", a)?;
    check_factor("A", a, gx, &[ranks, features])?;
    check_factor("u", u, gx, &[tokens, ranks])?;
    if let Some(mask) = mask {
        check_mask(mask, tokens * features, gx)?;
    }
    if tokens * features == 0 {
        return Ok(true);
    }
    if features % 8 != 0 || !gx.is_contiguous() || !wide(gx) {
        let mut value = u.f_mm(a)?.f_mul_scalar(gain)?;
        if let Some(mask) = mask {
            let Some(kept) = apply_mask(&value, mask, stream)? else { return Ok(false) };
            value = kept;
        }
        if accumulate {
            let _ = gx.f_add_(&value)?;
        } else {
            gx.f_copy_(&value)?;
        }
        return Ok(true);
    }
    let (u, a) = (u.f_contiguous()?, aligned(a)?);
    let arguments = [
        Argument::of(gx),
        Argument::of(&u),
        Argument::of(&a),
        mask.map_or(Argument::Pointer(0), Argument::of),
        Argument::Int(int("tokens", tokens)?),
        Argument::Int(int("features", features)?),
        Argument::Int(int("ranks", ranks)?),
        Argument::Float(gain as f32),
        Argument::Int(accumulate.into()),
    ];
    let kernel = format!("add_grad_x_{suffix}");
    let grid = tiles(tokens, features);
    // SAFETY: the arguments of grad_x.cu; contiguous, aligned, of the shapes checked.
    unsafe { target.launch(&kernel, grid, TILE_THREADS, &arguments)? };
    Ok(true)
}
