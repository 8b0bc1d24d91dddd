//! What surrounds the products of a layer: its small matrices scaled and cast before them, the gradients of
//! the parameters after them, a launch each.

use tch::{Kind, Tensor};

use super::list::{pair, Kernels};
use super::operands::int;
use super::runtime::{Argument, Stream, Target};
use crate::checks;
use crate::errors::Result;

pub(super) const KERNELS: Kernels =
    Kernels { paired: &["factors", "gradients"], ..Kernels::of(include_str!("factors.cu")) };

// As factors.cu has them.
const THREADS: u32 = 256;
const ELEMENTS: i64 = 1024;

/// A (rows, in), B (out, rows) and E (active, 1) of a module, of one dtype, and its scale.
#[derive(Clone, Copy)]
pub struct Parameters<'a> {
    /// Right vectors.
    pub a: &'a Tensor,
    /// Left vectors.
    pub b: &'a Tensor,
    /// Singular values.
    pub e: &'a Tensor,
    /// The scale s.
    pub scale: f64,
    /// E of the rows past the active ones.
    pub reserve_e: f64,
}

struct Sizes {
    rows: i64,
    features: i64,
    out: i64,
    active: i64,
}

impl Parameters<'_> {
    /// Where the kernels run, the suffix of their name, and the sizes, checked.
    fn target(&self, kind: Kind, stream: Stream) -> Result<Option<(Target, String, Sizes)>> {
        let sizes = self.sizes()?;
        let Some(suffix) = pair(self.a.f_kind()?, kind) else { return Ok(None) };
        let plain = [self.a, self.b, self.e].iter().all(|tensor| tensor.is_contiguous());
        if !plain || self.a.numel() == 0 || self.b.numel() == 0 {
            return Ok(None);
        }
        Ok(Target::of(self.a, stream).map(|target| (target, suffix, sizes)))
    }

    fn sizes(&self) -> Result<Sizes> {
        let (rows, features) = checks::matrix("A", self.a)?;
        let (out, _) = checks::matrix("B", self.b)?;
        let (active, _) = checks::matrix("E", self.e)?;
        checks::shape("B", self.b, &[out, rows])?;
        checks::shape("E", self.e, &[active.min(rows), 1])?;
        for (name, tensor) in [("B", self.b), ("E", self.e)] {
            checks::kind(name, tensor, self.a.f_kind()?)?;
            checks::same_device(name, tensor, "A", self.a)?;
        }
        Ok(Sizes { rows, features, out, active })
    }
}

/// A in `kind`, (rows, in), and `P = s B diag(E)` in `kind`, (out, rows). `None` if not taken: parameters that
/// are not contiguous, a pair of dtypes without kernels.
pub fn scaled(
    parameters: Parameters<'_>,
    kind: Kind,
    stream: Stream,
) -> Result<Option<(Tensor, Tensor)>> {
    let Parameters { a, b, e, scale, reserve_e } = parameters;
    let Some((target, suffix, sizes)) = parameters.target(kind, stream)? else { return Ok(None) };
    let Sizes { rows, active, .. } = sizes;
    let cast =
        (a.f_kind()? != kind).then(|| Tensor::f_empty(a.size(), (kind, a.device()))).transpose()?;
    let p = Tensor::f_empty(b.size(), (kind, b.device()))?;
    let (of_a, of_b) = (a.numel() as i64, b.numel() as i64);
    let arguments = [
        cast.as_ref().map_or(Argument::Pointer(0), Argument::of),
        Argument::of(&p),
        Argument::of(a),
        Argument::of(b),
        Argument::of(e),
        Argument::Long(of_a as u64),
        Argument::Long(of_b as u64),
        Argument::Int(int("rows", rows)?),
        Argument::Int(int("active", active)?),
        Argument::Float(scale as f32),
        Argument::Float(reserve_e as f32),
    ];
    let largest = if cast.is_some() { of_a.max(of_b) } else { of_b };
    let grid = ((largest + ELEMENTS - 1) / ELEMENTS, 1);
    // SAFETY: the arguments of factors.cu; contiguous, of the lengths made and given.
    unsafe { target.launch(&format!("factors_{suffix}"), grid, THREADS, &arguments)? };
    Ok(Some((cast.unwrap_or_else(|| a.shallow_clone()), p)))
}

/// The gradients of A, B and E, of their shapes and dtype, from `right = u^T drop(x)` (rows, in), to be
/// multiplied by `gain`, and `left = t^T gy` (rows, out). `None` if not taken.
pub fn gradients(
    parameters: Parameters<'_>,
    right: &Tensor,
    left: &Tensor,
    gain: f64,
    stream: Stream,
) -> Result<Option<[Tensor; 3]>> {
    let Parameters { a, b, e, scale, reserve_e } = parameters;
    let kind = right.f_kind()?;
    let Some((target, suffix, sizes)) = parameters.target(kind, stream)? else { return Ok(None) };
    let Sizes { rows, features, out, active } = sizes;
    checks::kind("left", left, kind)?;
    for (name, tensor, width) in [("right", right, features), ("left", left, out)] {
        checks::shape(name, tensor, &[rows, width])?;
        checks::same_device(name, tensor, "A", a)?;
    }
    let (right, left) = (right.f_contiguous()?, left.f_contiguous()?);
    let like =
        |tensor: &Tensor| Tensor::f_empty(tensor.size(), (tensor.f_kind()?, tensor.device()));
    let made = [like(a)?, like(b)?, like(e)?];
    let arguments = [
        Argument::of(&made[0]),
        Argument::of(&made[1]),
        Argument::of(&made[2]),
        Argument::of(&right),
        Argument::of(&left),
        Argument::of(b),
        Argument::of(e),
        Argument::Int(int("features", features)?),
        Argument::Int(int("out", out)?),
        Argument::Int(int("rows", rows)?),
        Argument::Int(int("active", active)?),
        Argument::Float(scale as f32),
        Argument::Float(reserve_e as f32),
        Argument::Float(gain as f32),
    ];
    let grid = (1 + (features.max(out) + ELEMENTS - 1) / ELEMENTS, rows);
    // SAFETY: the arguments of factors.cu; contiguous, of the shapes checked or made.
    unsafe { target.launch(&format!("gradients_{suffix}"), grid, THREADS, &arguments)? };
    Ok(Some(made))
}
