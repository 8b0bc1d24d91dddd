//! The importance of a module on a device: blocks of its gradient by cuBLAS, dW rebuilt in registers.

use tch::{Kind, Tensor};

use super::list::Kernels;
use super::operands::{int, wide};
use super::runtime::{target, Argument, Stream};
use super::tile::{tiles, TILE_ROWS, TILE_THREADS};
use crate::checks;
use crate::errors::{Error, Result};

pub(super) const KERNELS: Kernels = Kernels {
    untyped: &["score_total"],
    typed: &["score_tile"],
    ..Kernels::of(include_str!("score.cu"))
};

/// Bytes of a block of G, at most: it should still lie in the cache when it is read.
const SCRATCH: i64 = 8 << 20;
/// Rows of a block of G, at most.
const BLOCK_ROWS: i64 = 1024;
const TOTAL_THREADS: u32 = 256;

/// Adds `gain * sum_ij |(P A)_ij (gy^T x)_ij|` to `vector[slot]`, in one order of sums and without a host
/// synchronisation. False if not taken: dtypes other than those of [`super::takes`], features that are no
/// multiple of 8.
///
/// `vector` is a float64 vector, `p` (out, ranks), `a` (ranks, in), both read in float32; `gy` (tokens, out)
/// and `x` (tokens, in) of one dtype, which is the one of G.
#[allow(clippy::too_many_arguments)]
pub fn accumulate(
    vector: &mut Tensor,
    slot: i64,
    p: &Tensor,
    a: &Tensor,
    gy: &Tensor,
    x: &Tensor,
    gain: f64,
    stream: Stream,
) -> Result<bool> {
    let Some((target, suffix)) = target(x, stream) else { return Ok(false) };
    let (tokens, features) = checks::matrix("x", x)?;
    let (out, ranks) = checks::matrix("P", p)?;
    checks::kind("importance", vector, Kind::Double)?;
    checks::kind("gy", gy, x.kind())?;
    for (name, tensor) in [("importance", &*vector), ("P", p), ("A", a), ("gy", gy)] {
        checks::same_device(name, tensor, "x", x)?;
    }
    checks::shape("A", a, &[ranks, features])?;
    checks::shape("gy", gy, &[tokens, out])?;
    let length = checks::vector("importance", vector)?;
    if slot < 0 || slot >= length {
        return Err(Error::Value(format!(
            "slot is {slot}; the importance vector has the slots 0 to {}",
            length - 1
        )));
    }
    let narrow =
        |tensor: &Tensor| matches!(tensor.kind(), Kind::Float | Kind::Half | Kind::BFloat16);
    if features % 8 != 0 || out * features == 0 || !narrow(p) || !narrow(a) {
        return Ok(false);
    }
    let p = p.f_to_kind(Kind::Float)?.f_contiguous()?;
    let a = a.f_to_kind(Kind::Float)?.f_contiguous()?;
    if !wide(&a) {
        return Ok(false);
    }
    let rows = SCRATCH / (features * x.kind().elt_size_in_bytes() as i64) / TILE_ROWS * TILE_ROWS;
    let rows = rows.clamp(TILE_ROWS, BLOCK_ROWS);
    let (_, across) = tiles(out, features);
    let count = tiles(out, features).0 * across;
    let partial = Tensor::f_empty([count], (Kind::Double, x.device()))?;
    let kernel = format!("score_tile_{suffix}");
    let mut first = 0;
    while first < out {
        let here = rows.min(out - first);
        let g = gy.f_narrow(1, first, here)?.f_tr()?.f_mm(x)?.f_contiguous()?;
        let arguments = [
            Argument::of(&partial.f_narrow(0, first / TILE_ROWS * across, 1)?),
            Argument::of(&g),
            Argument::of(&p.f_narrow(0, first, here)?),
            Argument::of(&a),
            Argument::Int(int("rows", here)?),
            Argument::Int(int("features", features)?),
            Argument::Int(int("ranks", ranks)?),
        ];
        // SAFETY: the arguments of score.cu; contiguous, of the shapes checked or made. Blocks begin at
        // multiples of a tile, so that each has its own partial sums.
        unsafe { target.launch(&kernel, tiles(here, features), TILE_THREADS, &arguments)? };
        first += here;
    }
    let arguments = [
        Argument::of(&vector.f_narrow(0, slot, 1)?),
        Argument::of(&partial),
        Argument::Int(int("tiles", count)?),
        Argument::Double(gain),
    ];
    // SAFETY: the arguments of score.cu; the slot is inside of the vector.
    unsafe { target.launch("score_total", (1, 1), TOTAL_THREADS, &arguments)? };
    Ok(true)
}
