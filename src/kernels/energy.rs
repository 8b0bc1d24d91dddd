//! Which tokens a gradient reaches, and the sums of squares of what went in at them.

use std::ops::Range;

use super::plain::{Out, Real};
use super::pool;
use super::simd::{load_at, on_best, Element, Kernel, Simd, MAX_LANES};

/// Tokens whose squares are added up in float32.
const TILE: usize = 16;
/// Columns that threads share out at once.
const GRAIN: usize = 64;
/// Numbers below which a second thread costs more than it saves.
const SERIAL: usize = 1 << 17;

/// The rows of `gy`, `width` numbers each, that are not 0 as a whole.
pub fn reached<T>(gy: &[T], width: usize, is_zero: impl Fn(&T) -> bool) -> Vec<usize> {
    let rows = gy.chunks_exact(width.max(1)).enumerate();
    rows.filter(|(_, row)| !row.iter().all(&is_zero)).map(|(token, _)| token).collect()
}

struct Squares<'a, E> {
    x: &'a [E],
    tokens: &'a [usize],
    width: usize,
    columns: Range<usize>,
    sums: Out<f64>,
}

impl<E: Element> Kernel for Squares<'_, E> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<V: Simd>(&self) {
        for tokens in self.tokens.chunks(TILE) {
            for column in self.columns.clone().step_by(V::LANES) {
                let count = (self.columns.end - column).min(V::LANES);
                let mut lanes = [0.0f32; MAX_LANES];
                // SAFETY: tokens and columns lie inside the matrix, as `add_squares` has checked, and each
                // thread has columns of its own.
                unsafe {
                    let mut sum = V::splat(0.0);
                    for token in tokens {
                        let x: V = load_at(self.x.as_ptr().add(token * self.width + column), count);
                        sum = x.fma(x, sum);
                    }
                    sum.store(lanes.as_mut_ptr());
                    for (l, lane) in lanes.iter().enumerate().take(count) {
                        *self.sums.0.add(column + l) += f64::from(*lane);
                    }
                }
            }
        }
    }
}

/// Adds, for each column of `x`, the sum of its squares in the rows `tokens`.
///
/// # Panics
/// Where a row lies outside of x.
pub fn add_squares<E: Element>(sums: &mut [f64], x: &[E], tokens: &[usize]) {
    let width = sums.len();
    assert!(tokens.iter().all(|token| (token + 1) * width <= x.len()));
    let serial = tokens.len() * width < SERIAL;
    let wanted = if serial { 1 } else { pool::threads().min(width.div_ceil(GRAIN)) };
    let sums = Out(sums.as_mut_ptr());
    pool::run(wanted, |thread, threads| {
        let columns = pool::part(width, GRAIN, thread, threads);
        on_best(&Squares { x, tokens, width, columns, sums });
    });
}

/// [`add_squares`] in float64, for float64.
///
/// # Panics
/// Where a row lies outside of x.
pub fn add_wide_squares<T: Real>(sums: &mut [f64], x: &[T], tokens: &[usize]) {
    let width = sums.len();
    for token in tokens {
        for (sum, x) in sums.iter_mut().zip(&x[token * width..(token + 1) * width]) {
            *sum += x.wide() * x.wide();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_zeros_are_not_reached() {
        let gy = [0.0, 0.0, 0.0, -1e-30, -0.0, 0.0, f32::NAN, 0.0];
        assert_eq!(reached(&gy, 2, |value| *value == 0.0), [1, 3]);
        assert!(reached::<f32>(&[], 2, |value| *value == 0.0).is_empty());
    }

    #[test]
    fn squares_are_summed_over_the_given_rows_for_any_width() {
        for (width, tokens) in [(1, 3), (5, 1), (67, 40), (130, 17)] {
            let x: Vec<f32> = (0..width * tokens).map(|i| (i % 7) as f32 - 3.0).collect();
            let chosen: Vec<usize> = (0..tokens).step_by(2).collect();
            let mut want = vec![1.0; width];
            for token in &chosen {
                for (sum, x) in want.iter_mut().zip(&x[token * width..]) {
                    *sum += f64::from(x * x);
                }
            }
            let (mut found, mut wide) = (vec![1.0; width], vec![1.0; width]);
            add_squares(&mut found, &x, &chosen);
            add_wide_squares(&mut wide, &x, &chosen);
            // Small whole numbers have no rounding.
            assert_eq!(found, want);
            assert_eq!(wide, want);
        }
    }

    #[test]
    #[should_panic(expected = "assertion failed")]
    fn a_row_outside_is_refused() {
        add_squares(&mut [0.0; 3], &[1.0f32; 6], &[2]);
    }
}
