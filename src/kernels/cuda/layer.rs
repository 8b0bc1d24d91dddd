//! Kernels of the layer: dropout masks, the projection down with dropout fused, the gradient of x.
//!
//! Whether a call is taken depends on the device and the dtype of x alone ([`takes`]), never on shapes, so
//! that every mask of a training has one form. Shapes that a fused kernel cannot do are composed here.

use tch::{Kind, Tensor};

use super::runtime::{suffix, Argument, Stream, Target};
use crate::checks;
use crate::errors::{Error, Result};
use crate::kernels::dropout;

const DRAW_THREADS: u32 = 128;
const DRAW_BYTES: i64 = 2048;
const APPLY_THREADS: u32 = 256;
const DOWN_THREADS: u32 = 128;
const DOWN_TOKENS: i64 = 16;
/// Past this many ranks, tensor cores on a dropped x beat reading x once for every sixteen.
const DOWN_RANKS: i64 = 32;

/// Threads, rows and features of a tile, as `tile.cu` has them.
pub(super) const TILE_THREADS: u32 = 256;
/// Rows of a tile.
pub(super) const TILE_ROWS: i64 = 64;
/// Features of a tile.
pub(super) const TILE_FEATURES: i64 = 256;

/// Do the kernels take an `x` of this device and dtype: float32, float16 or bfloat16 on a CUDA device
/// whose kernels could be loaded?
pub fn takes(x: &Tensor, stream: Stream) -> bool {
    target(x, stream).is_some()
}

pub(super) fn target(x: &Tensor, stream: Stream) -> Option<(Target, &'static str)> {
    let suffix = suffix(x.f_kind().ok()?)?;
    Some((Target::of(x, stream)?, suffix))
}

/// An `int` of a kernel.
pub(super) fn int(name: &str, value: i64) -> Result<i32> {
    i32::try_from(value)
        .map_err(|_| Error::Value(format!("{name} is {value}; kernels take up to {}", i32::MAX)))
}

/// Can eight elements be read at once wherever a row's eighth element begins?
pub(super) fn wide(tensor: &Tensor) -> bool {
    (tensor.data_ptr() as usize).is_multiple_of(16)
}

/// The tensor, contiguous and at a multiple of 16 bytes.
fn aligned(tensor: &Tensor) -> Result<Tensor> {
    let tensor = tensor.f_contiguous()?;
    if wide(&tensor) {
        return Ok(tensor);
    }
    let mut copy = tensor.f_empty_like()?;
    copy.f_copy_(&tensor)?;
    Ok(copy)
}

fn bytes(elements: i64) -> i64 {
    elements / 8 + i64::from(elements % 8 != 0)
}

fn check_mask(mask: &Tensor, elements: i64, x: &Tensor) -> Result<()> {
    checks::kind("mask", mask, Kind::Uint8)?;
    checks::same_device("mask", mask, "x", x)?;
    checks::shape("mask", mask, &[bytes(elements)])?;
    if mask.is_contiguous() {
        return Ok(());
    }
    Err(Error::Value("mask is not contiguous; give the one of the forward".into()))
}

fn check_factor(name: &str, tensor: &Tensor, x: &Tensor, shape: &[i64]) -> Result<()> {
    checks::kind(name, tensor, x.kind())?;
    checks::same_device(name, tensor, "x", x)?;
    checks::shape(name, tensor, shape)
}

/// The packed mask of all elements of `x`, equal to the CPU's of that stream: uint8 of ceil(elements / 8) on its device. `None` if not
/// taken.
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
    let fused = features % 8 == 0 && ranks <= DOWN_RANKS && tokens * features * ranks > 0;
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
    let blocks = (tokens + DOWN_TOKENS - 1) / DOWN_TOKENS;
    // SAFETY: the arguments of down.cu; contiguous, aligned, of the shapes checked or made.
    unsafe { target.launch(&kernel, (blocks, 1), DOWN_THREADS, &arguments)? };
    Ok(Some((t, mask)))
}

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

/// The grid of tiles over a matrix.
pub(super) fn tiles(rows: i64, features: i64) -> (i64, i64) {
    ((rows + TILE_ROWS - 1) / TILE_ROWS, (features + TILE_FEATURES - 1) / TILE_FEATURES)
}
