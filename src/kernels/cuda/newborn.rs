//! Rows, or columns, born during training ([`crate::policies::restart`]), of all parameters of an optimizer's group in
//! one launch for up to 512 parts.

use tch::Tensor;

use super::list::Kernels;
use super::operands::int;
use super::runtime::{target, Argument, Stream};
use crate::errors::Result;

pub(super) const KERNELS: Kernels = Kernels {
    typed: &["keep_newborns", "mix_newborns"],
    ..Kernels::of(include_str!("newborn.cu"))
};

// As newborn.cu has them.
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
struct Table {
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
    /// Do the parameter and what is kept of it have one dtype, one device, and sizes that go together?
    fn fits(&self, like: &Tensor) -> Result<bool> {
        let (size, kept) = (self.parameter.size2()?, self.old.size2()?);
        let (long, kept_long, across, kept_across) = if self.dim == 0 {
            (size.0, kept.0, size.1, kept.1)
        } else {
            (size.1, kept.1, size.0, kept.0)
        };
        let plain = |tensor: &Tensor| {
            tensor.f_kind().is_ok_and(|kind| kind == like.kind())
                && tensor.device() == like.device()
                && tensor.is_contiguous()
        };
        let inside = self.first >= 0 && self.first + self.count <= kept_long && kept_long <= long;
        Ok(inside && across == kept_across && plain(self.parameter) && plain(self.old))
    }

    fn newborn(&self) -> Result<Newborn> {
        let (rows, columns) = self.parameter.size2()?;
        let (kept_rows, kept_columns) = self.old.size2()?;
        let bytes = self.parameter.f_kind()?.elt_size_in_bytes() as i64;
        let (skipped, height, width) = if self.dim == 0 {
            (rows - kept_rows, self.count, columns)
        } else {
            (columns - kept_columns, rows, self.count)
        };
        let (line, kept_line) = if self.dim == 0 { (columns, kept_columns) } else { (1, 1) };
        Ok(Newborn {
            values: self.parameter.data_ptr() as u64
                + ((skipped + self.first) * line * bytes) as u64,
            old: self.old.data_ptr() as u64 + (self.first * kept_line * bytes) as u64,
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
/// contiguous or no longer hold what is kept, several dtypes or devices, a dtype without kernels.
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
    for part in parts {
        if !part.fits(like)? {
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
        unsafe { target.launch(&kernel, grid, THREADS, &[Argument::structure(&*table)])? };
    }
    Ok(true)
}
