//! Rows, or columns, born during training ([`crate::restart`]), of all parameters of an optimizer's group in
//! one launch for up to 512 parts.

use tch::{Kind, Tensor};

use super::layer::{int, target};
use super::runtime::{Argument, Stream};
use crate::errors::Result;

const THREADS: u32 = 256;
const ELEMENTS: i64 = 2048;
/// Parts of one launch.
const PARTS: usize = 512;

/// `Newborn` of newborn.cu.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Newborn {
    values: u64,
    old: u64,
    height: i32,
    width: i32,
    stride: i32,
    old_stride: i32,
    now: f32,
    before: f32,
}

/// `Newborns` of newborn.cu.
#[repr(C)]
pub struct Table {
    at: [Newborn; PARTS],
}

/// Neighbouring rows, or columns, of a parameter, and where they are kept.
pub struct Part<'a> {
    /// The parameter, (rows, columns).
    pub parameter: &'a Tensor,
    /// Its last rows, or columns, as they were kept.
    pub old: &'a Tensor,
    /// 0: rows; 1: columns.
    pub dim: i64,
    /// The first of the part, counted from the first that is kept.
    pub first: i64,
    /// How many.
    pub count: i64,
    /// The part becomes `now * itself + before * old`.
    pub weights: (f64, f64),
}

impl Part<'_> {
    fn newborn(&self) -> Result<Newborn> {
        let (rows, columns) = self.parameter.size2()?;
        let (kept_rows, kept_columns) = self.old.size2()?;
        let bytes = self.parameter.f_kind()?.elt_size_in_bytes() as i64;
        let at = |skipped: i64, columns: i64| {
            let line = if self.dim == 0 { columns } else { 1 };
            (skipped + self.first) * line * bytes
        };
        let skipped = if self.dim == 0 { rows - kept_rows } else { columns - kept_columns };
        let (height, width) =
            if self.dim == 0 { (self.count, columns) } else { (rows, self.count) };
        Ok(Newborn {
            values: self.parameter.data_ptr() as u64 + at(skipped, columns) as u64,
            old: self.old.data_ptr() as u64 + at(0, kept_columns) as u64,
            height: int("height", height)?,
            width: int("width", width)?,
            stride: int("stride", columns)?,
            old_stride: int("stride", kept_columns)?,
            now: self.weights.0 as f32,
            before: self.weights.1 as f32,
        })
    }
}

/// Copies the parts of the parameters to where they are kept. False if not taken: tensors that are not
/// contiguous, several dtypes or devices, a dtype without kernels.
pub fn keep(parts: &[Part<'_>], stream: Stream) -> Result<bool> {
    launch("keep_newborns", parts, stream)
}

/// Mixes the parts with what was kept of them, in place; products and sums in float32. False if not taken.
pub fn mix(parts: &[Part<'_>], stream: Stream) -> Result<bool> {
    launch("mix_newborns", parts, stream)
}

fn launch(kernel: &str, parts: &[Part<'_>], stream: Stream) -> Result<bool> {
    let Some(like) = parts.first().map(|part| part.parameter) else { return Ok(false) };
    let Some((target, suffix)) = target(like, stream) else { return Ok(false) };
    let kind: Kind = like.f_kind()?;
    for tensor in parts.iter().flat_map(|part| [part.parameter, part.old]) {
        let fits = tensor.f_kind()? == kind && tensor.device() == like.device();
        if !fits || !tensor.is_contiguous() {
            return Ok(false);
        }
    }
    let kernel = format!("{kernel}_{suffix}");
    for some in parts.chunks(PARTS) {
        let mut table = Box::new(Table { at: [Newborn::default(); PARTS] });
        let mut largest = 0;
        for (entry, part) in table.at.iter_mut().zip(some) {
            *entry = part.newborn()?;
            largest = largest.max(i64::from(entry.height) * i64::from(entry.width));
        }
        if largest == 0 {
            continue;
        }
        let grid = ((largest + ELEMENTS - 1) / ELEMENTS, some.len() as i64);
        // SAFETY: the arguments of newborn.cu; contiguous matrices that hold the parts.
        unsafe { target.launch(&kernel, grid, THREADS, &[Argument::Newborns(&table)])? };
    }
    Ok(true)
}
