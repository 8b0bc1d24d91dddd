//! Products of long rows: inner products of each with each, and sums of them.

use super::real::{dispatch, Real, Vector};

/// `out[i, j] = x_i . y_j` of rows of `n` numbers.
///
/// # Panics
/// Where a row or the output lies outside of its slice.
pub fn inner(x: &[f64], y: &[f64], n: usize, out: &mut [f64]) {
    if n == 0 {
        return out.fill(0.0);
    }
    assert_eq!(out.len(), x.len() / n * (y.len() / n));
    if !out.is_empty() {
        products(x, y, n, out);
    }
}

/// `out_i += sum_j weights[i, j] * rows_j` of rows of `n` numbers.
///
/// # Panics
/// Where a row or a weight lies outside of its slice.
pub fn add_sums(weights: &[f64], rows: &[f64], n: usize, out: &mut [f64]) {
    if n == 0 || out.is_empty() || rows.is_empty() {
        return;
    }
    assert_eq!(weights.len(), out.len() / n * (rows.len() / n));
    sums(weights, rows, n, out);
}

dispatch! {
    /// In tiles of 4 rows by 2.
    fn products<T, V>(x: &[T], y: &[T], n: usize, out: &mut [f64]) => {
        let (p, q) = (x.len() / n, y.len() / n);
        let vectors = n / V::<T>::LANES;
        // A row past the last is the last once more: computed for nothing, never written.
        let x_row = |i: usize| &x[i.min(p - 1) * n..][..n];
        let y_row = |j: usize| &y[j.min(q - 1) * n..][..n];
        for i0 in (0..p).step_by(4) {
            for j0 in (0..q).step_by(2) {
                let xs = [x_row(i0), x_row(i0 + 1), x_row(i0 + 2), x_row(i0 + 3)];
                let ys = [y_row(j0), y_row(j0 + 1)];
                let mut sums = [[V::<T>::splat(T::default()); 2]; 4];
                for at in 0..vectors {
                    // SAFETY: `at` is one of the vectors that a row of n elements holds.
                    let piece = |row: &[T]| unsafe { V::<T>::load(row.as_ptr().add(at * V::<T>::LANES)) };
                    let (xs, ys) = (xs.map(piece), ys.map(piece));
                    for i in 0..4 {
                        for j in 0..2 {
                            sums[i][j] = xs[i].times_plus(ys[j], sums[i][j]);
                        }
                    }
                }
                for i in i0..p.min(i0 + 4) {
                    for j in j0..q.min(j0 + 2) {
                        let mut lanes = [T::default(); 8];
                        // SAFETY: no vector has more than 8 lanes.
                        unsafe { sums[i - i0][j - j0].store(lanes.as_mut_ptr()) };
                        let rest = vectors * V::<T>::LANES..;
                        let pairs = x_row(i)[rest.clone()].iter().zip(&y_row(j)[rest]);
                        out[i * q + j] = lanes.iter().map(|lane| lane.wide()).sum::<f64>()
                            + pairs.map(|(x, y)| x.wide() * y.wide()).sum::<f64>();
                    }
                }
            }
        }
    }
}

dispatch! {
    fn sums<T, V>(weights: &[T], rows: &[T], n: usize, out: &mut [T]) => {
        add_sums_by::<T, V<T>>(weights, rows.len() / n, rows, n, out, || ());
    }
}

/// As [`add_sums`], by vectors of a kind, 4 rows and 2 vectors at once. `stride` numbers of the weights are for a row of
/// the output; `each` is done beside each piece of a row that is read.
#[inline(always)]
pub(super) fn add_sums_by<T: Real, V: Vector<T>>(
    weights: &[T],
    stride: usize,
    rows: &[T],
    n: usize,
    out: &mut [T],
    mut each: impl FnMut(),
) {
    let (p, q) = (out.len() / n, rows.len() / n);
    let width = 2 * V::LANES;
    for i0 in (0..p).step_by(4) {
        // Past the last row it is the last once more, and not written.
        let weight = |i: usize, j: usize| weights[(i0 + i).min(p - 1) * stride + j];
        let count = 4.min(p - i0);
        for at in 0..n / width {
            let mut sums = [[V::splat(T::default()); 2]; 4];
            for j in 0..q {
                each();
                let from = &rows[j * n + at * width..][..width];
                // SAFETY: there are two vectors.
                let x = unsafe { [V::load(from.as_ptr()), V::load(from.as_ptr().add(V::LANES))] };
                for (i, sums) in sums.iter_mut().enumerate() {
                    let weight = V::splat(weight(i, j));
                    for l in 0..2 {
                        sums[l] = weight.times_plus(x[l], sums[l]);
                    }
                }
            }
            for (i, sums) in sums.iter().enumerate().take(count) {
                let to = &mut out[(i0 + i) * n + at * width..][..width];
                for (l, sum) in sums.iter().enumerate() {
                    // SAFETY: there are two vectors.
                    unsafe {
                        let to = to.as_mut_ptr().add(l * V::LANES);
                        V::load(to).plus(*sum).store(to);
                    }
                }
            }
        }
        for at in n / width * width..n {
            for i in 0..count {
                for j in 0..q {
                    out[(i0 + i) * n + at] += weight(i, j) * rows[j * n + at];
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: usize, seed: usize) -> Vec<f64> {
        (0..count).map(|i| (((i + 1) * (seed * 7 + 13)) % 31) as f64 - 15.0).collect()
    }

    #[test]
    fn inner_products_are_of_each_row_with_each() {
        for (p, q, n) in [(1, 1, 1), (3, 2, 7), (5, 3, 16), (8, 9, 37), (0, 4, 5)] {
            let (x, y) = (numbers(p * n, 1), numbers(q * n, 2));
            let mut out = vec![f64::NAN; p * q];
            inner(&x, &y, n, &mut out);
            for i in 0..p {
                for j in 0..q {
                    let pairs = x[i * n..][..n].iter().zip(&y[j * n..][..n]);
                    assert_eq!(out[i * q + j], pairs.map(|(x, y)| x * y).sum::<f64>());
                }
            }
        }
    }

    #[test]
    fn sums_are_added_to_what_is_there() {
        for (p, q, n) in [(1, 1, 1), (3, 2, 7), (5, 3, 16), (8, 9, 37), (2, 0, 5)] {
            let (weights, rows) = (numbers(p * q, 1), numbers(q * n, 2));
            let mut out = numbers(p * n, 3);
            let before = out.clone();
            add_sums(&weights, &rows, n, &mut out);
            for i in 0..p {
                for at in 0..n {
                    let sum: f64 = (0..q).map(|j| weights[i * q + j] * rows[j * n + at]).sum();
                    assert_eq!(out[i * n + at], before[i * n + at] + sum);
                }
            }
        }
    }
}
