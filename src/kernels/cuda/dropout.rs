//! Dropout masks, drawn and applied: bit for bit those of [`crate::kernels::dropout`].

use tch::{Kind, Tensor};

use super::list::Kernels;
use super::operands::aligned;
use super::runtime::{target, Argument, Stream};
use crate::checks;
use crate::errors::{Error, Result};
use crate::kernels::dropout;

pub(super) const KERNELS: Kernels = Kernels {
    untyped: &["dropout_bits"],
    typed: &["apply_mask"],
    ..Kernels::of(include_str!("dropout.cu"))
};

// As dropout.cu has them.
const DRAW_THREADS: u32 = 128;
const DRAW_BYTES: i64 = 2048;
const APPLY_THREADS: u32 = 256;

/// Bytes of the packed mask of so many elements.
pub(super) fn bytes(elements: i64) -> i64 {
    elements / 8 + i64::from(elements % 8 != 0)
}

/// Fails unless `mask` is the packed one of so many elements of `x`.
pub(super) fn check_mask(mask: &Tensor, elements: i64, x: &Tensor) -> Result<()> {
    checks::kind("mask", mask, Kind::Uint8)?;
    checks::same_device("mask", mask, "x", x)?;
    checks::shape("mask", mask, &[bytes(elements)])?;
    if mask.is_contiguous() {
        return Ok(());
    }
    Err(Error::Value("mask is not contiguous; give the one of the forward".into()))
}

/// The packed mask of all elements of `x`, equal to the CPU's of that stream: uint8 of ceil(elements / 8) on its
/// device. `None` if not taken.
pub fn draw_mask(x: &Tensor, draw: &dropout::Stream, stream: Stream) -> Result<Option<Tensor>> {
    let Some((target, _)) = target(x, stream) else { return Ok(None) };
    let bytes = bytes(x.numel() as i64);
    let mask = Tensor::f_empty([bytes], (Kind::Uint8, x.device()))?;
    if bytes > 0 {
        let blocks = bytes.div_euclid(DRAW_BYTES) + i64::from(bytes % DRAW_BYTES != 0);
        let arguments = [
            Argument::of(&mask),
            Argument::Long(bytes as u64),
            Argument::Long(draw.seed()),
            Argument::Long(draw.offset()),
            Argument::Word(draw.threshold()),
        ];
        // SAFETY: the arguments of dropout.cu; the mask is as long as said.
        unsafe { target.launch("dropout_bits", (blocks, 1), DRAW_THREADS, &arguments)? };
    }
    Ok(Some(mask))
}

/// `x` where the packed `mask` of all its elements is set, else 0; contiguous. `None` if not taken.
pub fn apply_mask(x: &Tensor, mask: &Tensor, stream: Stream) -> Result<Option<Tensor>> {
    let Some((target, suffix)) = target(x, stream) else { return Ok(None) };
    let count = x.numel() as i64;
    check_mask(mask, count, x)?;
    let x = aligned(x)?;
    let out = x.f_empty_like()?;
    if count > 0 {
        let bytes = bytes(count);
        let threads = i64::from(APPLY_THREADS);
        let blocks = bytes / threads + i64::from(bytes % threads != 0);
        let arguments = [
            Argument::of(&out),
            Argument::of(&x),
            Argument::of(mask),
            Argument::Long(count as u64),
        ];
        let kernel = format!("apply_mask_{suffix}");
        // SAFETY: the arguments of dropout.cu; contiguous, of the lengths checked or made.
        unsafe { target.launch(&kernel, (blocks, 1), APPLY_THREADS, &arguments)? };
    }
    Ok(Some(out))
}
