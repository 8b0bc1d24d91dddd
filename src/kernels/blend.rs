//! The last rows, or columns, of matrices: kept, and later mixed with what has become of them.

use super::real::Real;
use super::split::split;

/// The rows or columns of a matrix from one on.
#[derive(Clone, Copy)]
pub struct Tail {
    /// Columns of the matrix.
    pub columns: usize,
    /// The first row or column concerned.
    pub first: usize,
    /// Rows, not columns?
    pub rows: bool,
}

/// A tail to keep.
pub struct Keep<'a, T> {
    /// Which part of `matrix`.
    pub tail: Tail,
    /// The matrix, row by row.
    pub matrix: &'a [T],
    /// Where the tail goes, row by row.
    pub old: &'a mut [T],
}

/// A tail to mix with what was kept of it.
pub struct Mix<'a, T> {
    /// Which part of `matrix`.
    pub tail: Tail,
    /// The matrix, row by row.
    pub matrix: &'a mut [T],
    /// What [`keep`] kept.
    pub old: &'a [T],
    /// `(f, g)` of each row, or column, of the tail.
    pub weights: &'a [(T, T)],
}

/// Copies every tail to its place, over torch's threads.
pub fn keep<T: Real>(jobs: &mut [Keep<'_, T>]) {
    // A column takes every row's line of the cache along.
    split(jobs, |job| job.matrix.len() / 8, |part| part.iter_mut().for_each(keep_one));
}

fn keep_one<T: Real>(job: &mut Keep<'_, T>) {
    let Tail { columns, first, rows } = job.tail;
    if rows {
        return job.old.copy_from_slice(&job.matrix[first * columns..]);
    }
    let width = columns - first;
    for (old, row) in job.old.chunks_exact_mut(width).zip(job.matrix.chunks_exact(columns)) {
        for (old, &value) in old.iter_mut().zip(&row[first..]) {
            *old = value;
        }
    }
}

/// Every row, or column, of the tails becomes `f * itself + g * old`, over torch's threads.
pub fn mix<T: Real>(jobs: &mut [Mix<'_, T>]) {
    split(jobs, |job| job.matrix.len() / 4, |part| part.iter_mut().for_each(mix_one));
}

fn mix_one<T: Real>(job: &mut Mix<'_, T>) {
    let Tail { columns, first, rows } = job.tail;
    if rows {
        let tail = job.matrix[first * columns..].chunks_exact_mut(columns);
        for ((row, old), &(f, g)) in tail.zip(job.old.chunks_exact(columns)).zip(job.weights) {
            for (new, &old) in row.iter_mut().zip(old) {
                *new = f * *new + g * old;
            }
        }
        return;
    }
    let olds = job.old.chunks_exact(columns - first);
    for (row, old) in job.matrix.chunks_exact_mut(columns).zip(olds) {
        for ((new, &old), &(f, g)) in row[first..].iter_mut().zip(old).zip(job.weights) {
            *new = f * *new + g * old;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_from_the_first_on() {
        let mut matrix = [1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0];
        let tail = Tail { columns: 2, first: 1, rows: true };
        let mut old = [0.0; 4];
        keep(&mut [Keep { tail, matrix: &matrix, old: &mut old }]);
        assert_eq!(old, [3.0, 4.0, 5.0, 6.0]);
        let weights = [(0.5, 0.25), (1.0, 0.0)];
        mix(&mut [Mix { tail, matrix: &mut matrix, old: &[8.0; 4], weights: &weights }]);
        assert_eq!(matrix, [1.0, 2.0, 3.5, 4.0, 5.0, 6.0]);
    }

    #[test]
    fn columns_from_the_first_on() {
        let mut matrix = [1.0f64, 2.0, 3.0, 4.0, 5.0, 6.0];
        let tail = Tail { columns: 3, first: 1, rows: false };
        let mut old = [0.0; 4];
        keep(&mut [Keep { tail, matrix: &matrix, old: &mut old }]);
        assert_eq!(old, [2.0, 3.0, 5.0, 6.0]);
        let weights = [(0.5, 0.25), (1.0, 0.0)];
        mix(&mut [Mix { tail, matrix: &mut matrix, old: &[8.0; 4], weights: &weights }]);
        assert_eq!(matrix, [1.0, 3.0, 3.0, 4.0, 4.5, 6.0]);
    }
}
