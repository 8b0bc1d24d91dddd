//! The gradient of the orthogonality regulariser, for all modules in few launches.

use tch::{Kind, Tensor};

use super::list::Kernels;
use super::operands::int;
use super::runtime::{target, Argument, Stream};
use crate::checks;
use crate::errors::Result;

pub(super) const KERNELS: Kernels = Kernels {
    untyped: &["orthogonality_residual"],
    typed: &["orthogonality_gram", "orthogonality_gradient"],
    ..Kernels::of(include_str!("orthogonality.cu"))
};

// As orthogonality.cu has them.
const THREADS: u32 = 256;
const MAX_RANK: i64 = 64;
const STAGED: i64 = 64;
const GRAM_LENGTH: i64 = 1024;
/// Matrices of one launch.
const MATRICES: usize = 512;

/// `Matrix` of orthogonality.cu.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Matrix {
    values: u64,
    gradient: u64,
    scratch: i64,
    length: i32,
    rank: i32,
}

/// `Matrices` of orthogonality.cu.
#[repr(C)]
struct Matrices {
    at: [Matrix; MATRICES],
    a_count: i32,
}

/// One launch's share of the matrices.
struct Group {
    table: Box<Matrices>,
    first: i64,
    count: i64,
    longest: i64,
}

/// [`crate::policies::orthogonality::add_gradient_`] in three launches for up to 256 modules. `None` if not taken:
/// more than 64 ranks, several dtypes or devices, tensors that are not contiguous.
///
/// `factor` is a scalar on the device of the parameters, converted to float64 if it is not.
pub fn add_orthogonality_gradient_(
    a: &[Tensor],
    b: &[Tensor],
    grad_a: &mut [Tensor],
    grad_b: &mut [Tensor],
    factor: &Tensor,
    stream: Stream,
) -> Result<Option<Tensor>> {
    checks::one_each("grad_a", grad_a, a.len())?;
    checks::one_each("grad_b", grad_b, b.len())?;
    checks::float("factor", factor)?;
    checks::shape("factor", factor, &[])?;
    let Some(like) = a.first().or(b.first()) else { return Ok(None) };
    let Some((target, suffix)) = target(like, stream) else { return Ok(None) };
    let pairs = || a.iter().zip(&*grad_a).chain(b.iter().zip(&*grad_b));
    for (index, (values, gradient)) in pairs().enumerate() {
        let (name, gradient_name) = if index < a.len() { ("a", "grad_a") } else { ("b", "grad_b") };
        checks::matrix(name, values)?;
        checks::shape(gradient_name, gradient, &values.size())?;
        let plain = |tensor: &Tensor| {
            tensor.f_kind().is_ok_and(|kind| kind == like.kind())
                && tensor.device() == like.device()
                && tensor.is_contiguous()
        };
        let rank = values.size()[usize::from(index >= a.len())];
        if !plain(values) || !plain(gradient) || values.numel() == 0 || rank > MAX_RANK {
            return Ok(None);
        }
    }
    let mut groups: Vec<Group> = Vec::new();
    let mut scratch = 0;
    for (index, (values, gradient)) in pairs().enumerate() {
        let is_a = index < a.len();
        let size = values.size();
        let (rank, length) = if is_a { (size[0], size[1]) } else { (size[1], size[0]) };
        if groups.last().is_none_or(|group| group.count as usize == MATRICES) {
            let table = Box::new(Matrices { at: [Matrix::default(); MATRICES], a_count: 0 });
            groups.push(Group { table, first: index as i64, count: 0, longest: 0 });
        }
        let Some(group) = groups.last_mut() else { continue };
        group.table.at[group.count as usize] = Matrix {
            values: values.data_ptr() as u64,
            gradient: gradient.data_ptr() as u64,
            scratch,
            length: int("length", length)?,
            rank: int("rank", rank)?,
        };
        group.table.a_count += i32::from(is_a);
        group.count += 1;
        group.longest = group.longest.max(length);
        scratch += parts(length, GRAM_LENGTH) * rank * rank;
    }
    let total = (a.len() + b.len()) as i64;
    let factor = factor.f_to_device(like.device())?.f_to_kind(Kind::Double)?;
    let scratch = Tensor::f_empty([scratch], (Kind::Float, like.device()))?;
    let norms = Tensor::f_empty([total], (Kind::Double, like.device()))?;
    let mean = Tensor::f_empty([] as [i64; 0], (Kind::Double, like.device()))?;
    let kernel = format!("orthogonality_gram_{suffix}");
    for group in &groups {
        let arguments = [Argument::structure(&*group.table), Argument::of(&scratch)];
        let grid = (parts(group.longest, GRAM_LENGTH), group.count);
        // SAFETY: the arguments of orthogonality.cu; the table holds contiguous matrices and parts of the
        // scratch memory that are long enough.
        unsafe { target.launch(&kernel, grid, THREADS, &arguments)? };
        let arguments = [
            Argument::structure(&*group.table),
            Argument::of(&scratch),
            Argument::of(&norms.f_narrow(0, group.first, group.count)?),
        ];
        // SAFETY: as above.
        let grid = (group.count, 1);
        unsafe { target.launch("orthogonality_residual", grid, THREADS, &arguments)? };
    }
    let kernel = format!("orthogonality_gradient_{suffix}");
    for group in &groups {
        let arguments = [
            Argument::structure(&*group.table),
            Argument::of(&scratch),
            Argument::of(&norms.f_narrow(0, group.first, group.count)?),
            Argument::of(&norms),
            Argument::Int(int("matrices", total)?),
            Argument::of(&factor),
            if group.first == 0 { Argument::of(&mean) } else { Argument::Pointer(0) },
        ];
        let grid = (parts(group.longest, STAGED), group.count);
        // SAFETY: as above; the caller holds the gradients mutably.
        unsafe { target.launch(&kernel, grid, THREADS, &arguments)? };
    }
    Ok(Some(mean))
}

fn parts(length: i64, each: i64) -> i64 {
    (length + each - 1) / each
}
