//! How far a matrix is from orthonormal, and the gradient of that: Gram matrix, residual and norm in
//! one pass over the matrix, the gradient in a second one while it is still in the cache.

use super::real::{dispatch, Real, Vector};
use super::rows::add_sums_by;
use super::split::split;

/// The largest number of components that the loops here are good at.
pub const MOST_COMPONENTS: usize = 64;
/// Vectors that one sum in the matrix's own precision takes in before it goes into a wider one.
const BLOCK: usize = 128;

/// One matrix whose components, its rows or its columns, are to be orthonormal.
pub struct Job<'a, T> {
    /// The matrix, row by row.
    pub matrix: &'a [T],
    /// What the gradient is added to, laid out as the matrix.
    pub grad: Option<&'a mut [T]>,
    /// Number of components, at most [`MOST_COMPONENTS`].
    pub components: usize,
    /// Are the components the rows?
    pub rows: bool,
    /// The norm of the residual, `||gram - I||_F`: a result.
    pub norm: f64,
}

/// Fills in the norms and adds `factor * d norm / d matrix` to the gradients; nothing where the norm
/// is 0. Matrices are split over torch's threads.
pub fn run<T: Real>(jobs: &mut [Job<'_, T>], factor: f64) {
    split(jobs, |job| job.matrix.len() * job.components.max(4) / 16, |part| all(part, factor));
}

dispatch! {
    fn all<T, V>(jobs: &mut [Job<'_, T>], factor: f64) => {
        let mut scratch = Scratch::default();
        for i in 0..jobs.len() {
            let (now, later) = jobs[i..].split_at_mut(1);
            let next = later.first().map_or(&[][..], |job| job.matrix);
            one::<T, V<T>>(&mut now[0], next, factor, &mut scratch);
        }
    }
}

#[derive(Default)]
struct Scratch<T> {
    gram: Vec<f64>,
    weights: Vec<T>,
    /// The last rows of matrix and gradient, and zeros: a tile of columns may reach past a row, and
    /// past the last row there is nothing to read.
    end: [Vec<T>; 2],
}

fn copy_end<T: Real>(end: &mut Vec<T>, rows: &[T]) {
    end.clear();
    end.extend_from_slice(rows);
    end.resize(rows.len() + 2 * 8, T::default());
}

#[inline(always)]
fn one<T: Real, V: Vector<T>>(
    job: &mut Job<'_, T>,
    next: &[T],
    factor: f64,
    scratch: &mut Scratch<T>,
) {
    let r = job.components;
    let Scratch { gram, weights, end } = scratch;
    let mut ahead = Ahead(job.grad.as_deref().unwrap_or(next));
    gram.clear();
    gram.resize(r * r, 0.0);
    // A matrix of one column is one row as well.
    let rows = job.rows || r == 1;
    match r {
        0 => {}
        _ if rows => gram_of_rows::<T, V>(job.matrix, r, &mut ahead, gram),
        2 => gram_of_columns::<T, V, 2>(job.matrix, r, &mut end[0], &mut ahead, gram),
        3 | 4 => gram_of_columns::<T, V, 4>(job.matrix, r, &mut end[0], &mut ahead, gram),
        _ => gram_of_columns::<T, V, 8>(job.matrix, r, &mut end[0], &mut ahead, gram),
    }
    for i in 0..r {
        gram[i * r + i] -= 1.0;
    }
    job.norm = gram.iter().map(|x| x * x).sum::<f64>().sqrt();
    let Some(grad) = job.grad.as_deref_mut() else { return };
    assert_eq!(grad.len(), job.matrix.len());
    let scale = factor * 2.0 / job.norm;
    let scale = if scale.is_finite() { scale } else { 0.0 };
    let mut ahead = Ahead(next);
    weights.clear();
    weights.resize(padded(r) * padded(r), T::default());
    for i in 0..r {
        for j in 0..r {
            weights[i * padded(r) + j] = T::nearest(scale * gram[i * r + j]);
        }
    }
    match r {
        _ if grad.is_empty() => {}
        _ if rows => {
            let (stride, n) = (padded(r), job.matrix.len() / r);
            add_sums_by::<T, V>(weights, stride, job.matrix, n, grad, || ahead.line());
        }
        2 => add_to_columns::<T, V, 2>(job.matrix, r, weights, end, &mut ahead, grad),
        3 | 4 => add_to_columns::<T, V, 4>(job.matrix, r, weights, end, &mut ahead, grad),
        _ => add_to_columns::<T, V, 8>(job.matrix, r, weights, end, &mut ahead, grad),
    }
}

/// Memory that is needed next, asked for line by line while there is something to compute.
struct Ahead<'a, T>(&'a [T]);

impl<T: Real> Ahead<'_, T> {
    #[inline(always)]
    fn line(&mut self) {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
            // SAFETY: a hint, at the address of a slice.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(self.0.as_ptr().cast()) };
            self.0 = self.0.get(64 / size_of::<T>()..).unwrap_or_default();
        }
    }
}

/// Rows and columns of the weights, those of 0 that the tiles reach into included.
fn padded(r: usize) -> usize {
    r.next_multiple_of(8)
}

/// Gram matrix of the rows, in tiles of 4 by 2.
#[inline(always)]
fn gram_of_rows<T: Real, V: Vector<T>>(
    matrix: &[T],
    r: usize,
    ahead: &mut Ahead<'_, T>,
    gram: &mut [f64],
) {
    let n = matrix.len() / r;
    let vectors = n / V::LANES;
    // A row past the last is the last once more: computed for nothing, never written.
    let row = |i: usize| &matrix[i.min(r - 1) * n..][..n];
    for i0 in (0..r).step_by(4) {
        for j0 in (0..r.min(i0 + 4)).step_by(2) {
            let x = [row(i0), row(i0 + 1), row(i0 + 2), row(i0 + 3)];
            let y = [row(j0), row(j0 + 1)];
            let mut wide = [[0.0; 2]; 4];
            for block in (0..vectors).step_by(BLOCK) {
                let mut sums = [[V::splat(T::default()); 2]; 4];
                for at in block..vectors.min(block + BLOCK) {
                    ahead.line();
                    // SAFETY: `at` is one of the vectors that a row of n elements holds.
                    let piece = |row: &[T]| unsafe { V::load(row.as_ptr().add(at * V::LANES)) };
                    let (x, y) = (x.map(piece), y.map(piece));
                    for i in 0..4 {
                        for j in 0..2 {
                            sums[i][j] = x[i].times_plus(y[j], sums[i][j]);
                        }
                    }
                }
                for i in 0..4 {
                    for j in 0..2 {
                        wide[i][j] += total::<T, V>(sums[i][j]);
                    }
                }
            }
            for i in i0..r.min(i0 + 4) {
                for j in j0..r.min(j0 + 2) {
                    let rest = vectors * V::LANES..;
                    let pairs = row(i)[rest.clone()].iter().zip(&row(j)[rest]);
                    let value =
                        wide[i - i0][j - j0] + pairs.map(|(x, y)| x.wide() * y.wide()).sum::<f64>();
                    gram[i * r + j] = value;
                    gram[j * r + i] = value;
                }
            }
        }
    }
}

#[inline(always)]
fn total<T: Real, V: Vector<T>>(vector: V) -> f64 {
    let mut lanes = [T::default(); 8];
    assert!(V::LANES <= lanes.len());
    // SAFETY: there is room for the lanes.
    unsafe { vector.store(lanes.as_mut_ptr()) };
    ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])).wide()
        + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7])).wide()
}

/// Where a tile of columns stands in each of some rows.
#[derive(Clone, Copy)]
struct Tile {
    /// Elements of a row.
    r: usize,
    /// The first of `J` elements.
    j0: usize,
    /// The first element of a vector.
    k0: usize,
}

/// Rows of `r` elements, of `count`, from which every tile of columns can be read whole.
fn whole_rows(r: usize, count: usize) -> usize {
    let reach = padded(r).div_ceil(r);
    (count + 1).saturating_sub(reach)
}

/// Gram matrix of the columns, in tiles of `J` by a vector. Where a tile reaches past its row, what
/// belongs to the next one is computed for nothing.
#[inline(always)]
fn gram_of_columns<T: Real, V: Vector<T>, const J: usize>(
    matrix: &[T],
    r: usize,
    end: &mut Vec<T>,
    ahead: &mut Ahead<'_, T>,
    gram: &mut [f64],
) {
    let whole = whole_rows(r, matrix.len() / r);
    copy_end(end, &matrix[whole * r..]);
    for j0 in (0..r).step_by(J) {
        // Below the diagonal is what is above it.
        for k0 in (0..r).step_by(V::LANES).filter(|k0| k0 + V::LANES > j0) {
            let tile = Tile { r, j0, k0 };
            let mut wide = [[0.0; 8]; J];
            for block in (0..whole).step_by(BLOCK) {
                let rows = &matrix[block * r..];
                // SAFETY: see `whole_rows`.
                let sums = unsafe {
                    column_products::<T, V, J>(rows, BLOCK.min(whole - block), tile, ahead)
                };
                widen(&mut wide, sums);
            }
            // SAFETY: see `copy_end`.
            let sums =
                unsafe { column_products::<T, V, J>(end, matrix.len() / r - whole, tile, ahead) };
            widen(&mut wide, sums);
            for j in j0..r.min(j0 + J) {
                for k in j.max(k0)..r.min(k0 + V::LANES) {
                    let value = wide[j - j0][k - k0];
                    gram[j * r + k] = value;
                    gram[k * r + j] = value;
                }
            }
        }
    }
}

/// Sums over `count` rows of each of the elements `j0..j0 + J` times the vector at `k0`.
///
/// # Safety
/// In `rows` there are `J` elements and a vector to read at those places of each row.
#[inline(always)]
unsafe fn column_products<T: Real, V: Vector<T>, const J: usize>(
    rows: &[T],
    count: usize,
    Tile { r, j0, k0 }: Tile,
    ahead: &mut Ahead<'_, T>,
) -> [V; J] {
    let mut sums = [V::splat(T::default()); J];
    for i in 0..count {
        ahead.line();
        // SAFETY: as the caller promises.
        unsafe {
            let row = rows.as_ptr().add(i * r);
            let y = V::load(row.add(k0));
            for (j, sum) in sums.iter_mut().enumerate() {
                *sum = V::splat(*row.add(j0 + j)).times_plus(y, *sum);
            }
        }
    }
    sums
}

#[inline(always)]
fn widen<T: Real, V: Vector<T>, const J: usize>(wide: &mut [[f64; 8]; J], sums: [V; J]) {
    for j in 0..J {
        let mut lanes = [T::default(); 8];
        // SAFETY: no vector has more than 8 lanes.
        unsafe { sums[j].store(lanes.as_mut_ptr()) };
        for l in 0..8 {
            wide[j][l] += lanes[l].wide();
        }
    }
}

/// `grad += matrix * weights`, in tiles of `J` by a vector. Weights are 0 where a tile reaches past
/// its row.
#[inline(always)]
fn add_to_columns<T: Real, V: Vector<T>, const J: usize>(
    matrix: &[T],
    r: usize,
    weights: &[T],
    [end, grad_end]: &mut [Vec<T>; 2],
    ahead: &mut Ahead<'_, T>,
    grad: &mut [T],
) {
    let count = matrix.len() / r;
    let whole = whole_rows(r, count);
    copy_end(end, &matrix[whole * r..]);
    copy_end(grad_end, &grad[whole * r..]);
    for k0 in (0..r).step_by(V::LANES) {
        for j0 in (0..r).step_by(J) {
            let tile = Tile { r, j0, k0 };
            let tile_weights: [V; J] = std::array::from_fn(|j| {
                let weights = &weights[(j0 + j) * padded(r) + k0..][..V::LANES];
                // SAFETY: there is a vector of them.
                unsafe { V::load(weights.as_ptr()) }
            });
            // SAFETY: see `whole_rows` and `copy_end`.
            unsafe {
                add_columns(matrix, grad, whole, tile, &tile_weights, ahead);
                add_columns(end, grad_end, count - whole, tile, &tile_weights, ahead);
            }
        }
    }
    let rest = grad.len() - whole * r;
    grad[whole * r..].copy_from_slice(&grad_end[..rest]);
}

/// Adds to the vector at `k0` of each of `count` rows the elements `j0..j0 + J` times the weights.
///
/// # Safety
/// In `rows` and `grad` there are `J` elements and a vector at those places of each row.
#[inline(always)]
unsafe fn add_columns<T: Real, V: Vector<T>, const J: usize>(
    rows: &[T],
    grad: &mut [T],
    count: usize,
    Tile { r, j0, k0 }: Tile,
    weights: &[V; J],
    ahead: &mut Ahead<'_, T>,
) {
    // Vectors that overlap are far apart in time: a load that meets a part of a recent store waits.
    let apart = V::LANES.div_ceil(r);
    for phase in 0..apart {
        for i in (phase..count).step_by(apart) {
            ahead.line();
            // SAFETY: as the caller promises.
            unsafe {
                let row = rows.as_ptr().add(i * r + j0);
                let to = grad.as_mut_ptr().add(i * r + k0);
                let mut sum = V::load(to);
                for (j, weight) in weights.iter().enumerate() {
                    sum = V::splat(*row.add(j)).times_plus(*weight, sum);
                }
                sum.store(to);
            }
        }
    }
}

#[cfg(test)]
mod tests;
