//! The CPU's share in a module's importance beside the matrix products: `sum |dW * G|` with dW rebuilt in
//! registers, and the transpose of a bfloat16 block, without which the product with it is twice as slow.

use super::plain::Out;
use super::pool;
use super::simd::{load_at, on_best, Element, Kernel, Simd};
use super::tokens::Factor;

/// Values of a factor that stay in the first cache.
const PANEL: usize = 4096;
/// Vectors of columns worked on at once.
const VECTORS: usize = 2;
/// Side of a transposed tile.
const SIDE: usize = 16;
/// Multiplications, or elements moved, below which a second thread costs more than it saves.
const SERIAL: usize = 1 << 17;

struct Sum<'a, E> {
    g: &'a [E],
    p: &'a [f32],
    a: Factor<'a>,
    /// Columns of `a` that `g` has.
    columns: std::ops::Range<usize>,
}

impl<E: Element> Sum<'_, E> {
    /// `R` rows of G and all of the columns in `panel`.
    #[inline(always)]
    unsafe fn rows<V: Simd, const R: usize>(
        &self,
        row: usize,
        panel: std::ops::Range<usize>,
    ) -> f64 {
        let width = self.columns.len();
        // SAFETY: rows and columns lie inside the matrices, as `sum` has checked.
        unsafe {
            let mut sums = [V::splat(0.0); R];
            let mut column = panel.start;
            while column < panel.end {
                let mut counts = [0; VECTORS];
                for (v, count) in counts.iter_mut().enumerate() {
                    *count = panel.end.saturating_sub(column + v * V::LANES).min(V::LANES);
                }
                let mut products = [[V::splat(0.0); VECTORS]; R];
                for component in 0..self.a.rows {
                    let from = component * self.a.columns + self.columns.start + column;
                    let mut a = [V::splat(0.0); VECTORS];
                    for (v, a) in a.iter_mut().enumerate().filter(|(v, _)| counts[*v] > 0) {
                        *a = load_at(self.a.values.as_ptr().add(from + v * V::LANES), counts[v]);
                    }
                    for (r, products) in products.iter_mut().enumerate() {
                        let p = *self.p.as_ptr().add((row + r) * self.a.rows + component);
                        for (product, a) in products.iter_mut().zip(a) {
                            *product = a.fma(V::splat(p), *product);
                        }
                    }
                }
                for (r, (sum, products)) in sums.iter_mut().zip(products).enumerate() {
                    for (v, product) in
                        products.into_iter().enumerate().filter(|(v, _)| counts[*v] > 0)
                    {
                        let place = (row + r) * width + column + v * V::LANES;
                        let g: V = load_at(self.g.as_ptr().add(place), counts[v]);
                        *sum = g.abs().fma(product.abs(), *sum);
                    }
                }
                column += VECTORS * V::LANES;
            }
            sums.into_iter().map(|sum| f64::from(sum.sum())).sum()
        }
    }
}

impl<E: Element> Kernel for Sum<'_, E> {
    type Output = f64;
    #[inline(always)]
    unsafe fn run<V: Simd>(&self) -> f64 {
        let width = self.columns.len();
        let rows = self.g.len() / width.max(1);
        let step = VECTORS * V::LANES;
        let panel = (PANEL / self.a.rows.max(1)).div_ceil(step) * step;
        let mut total = 0.0;
        for start in (0..width).step_by(panel) {
            let panel = start..(start + panel).min(width);
            let mut row = 0;
            // SAFETY: as the caller promises.
            unsafe {
                while row + 4 <= rows && V::ROWS == 8 {
                    total += self.rows::<V, 4>(row, panel.clone());
                    row += 4;
                }
                while row + 2 <= rows {
                    total += self.rows::<V, 2>(row, panel.clone());
                    row += 2;
                }
                if row < rows {
                    total += self.rows::<V, 1>(row, panel);
                }
            }
        }
        total
    }
}

/// `sum_ij |(P A)_ij G_ij|`: `p` is (rows, components), `a` (components, in), and `g` (rows, columns) has the
/// given columns of `in`.
///
/// # Panics
/// Where the lengths do not fit together.
pub fn sum<E: Element>(g: &[E], p: &[f32], a: Factor<'_>, columns: std::ops::Range<usize>) -> f64 {
    let width = columns.len();
    let rows = g.len() / width.max(1);
    assert!(g.len() == rows * width && p.len() == rows * a.rows && columns.end <= a.columns);
    assert!(a.values.len() == a.rows * a.columns);
    let serial = g.len() * (a.rows + 1) < SERIAL;
    let wanted = if serial { 1 } else { pool::threads().min(rows) };
    let mut partial = vec![0.0; wanted];
    let out = Out(partial.as_mut_ptr());
    pool::run(wanted, |thread, threads| {
        let part = pool::part(rows, 4, thread, threads);
        let g = &g[part.start * width..part.end * width];
        let p = &p[part.start * a.rows..part.end * a.rows];
        let sum = on_best(&Sum { g, p, a, columns: columns.clone() });
        // SAFETY: there are `wanted` places and never more threads.
        unsafe { *out.add(thread).pointer() = sum };
    });
    partial.iter().sum()
}

struct Transpose {
    from: *const u16,
    stride: usize,
    rows: usize,
    /// Columns to take, multiples of a tile apart from the last.
    columns: std::ops::Range<usize>,
    to: *mut u16,
}

impl Kernel for Transpose {
    type Output = ();
    #[inline(always)]
    unsafe fn run<V: Simd>(&self) {
        let Self { stride, rows, .. } = *self;
        for column in self.columns.clone().step_by(SIDE) {
            let width = SIDE.min(self.columns.end - column);
            for row in (0..rows).step_by(SIDE) {
                let height = SIDE.min(rows - row);
                // SAFETY: the tile lies inside both matrices.
                unsafe {
                    let from = self.from.add(row * stride + column);
                    let to = self.to.add(column * rows + row);
                    if (width, height) == (SIDE, SIDE) {
                        V::transpose_16x16(from, stride, to, rows);
                        continue;
                    }
                    for r in 0..height {
                        for c in 0..width {
                            *to.add(c * rows + r) = *from.add(r * stride + c);
                        }
                    }
                }
            }
        }
    }
}

/// The transpose of `columns` of a matrix whose rows are `stride` elements long, into `to` (columns, rows).
///
/// # Panics
/// Where the lengths do not fit together.
pub fn transpose<E: Element>(
    from: &[E],
    stride: usize,
    columns: std::ops::Range<usize>,
    to: &mut [E],
) {
    assert!(size_of::<E>() == size_of::<u16>(), "only 16-bit elements are transposed");
    let rows = from.len() / stride.max(1);
    assert!(columns.end <= stride && to.len() == rows * columns.len());
    if to.is_empty() {
        return;
    }
    let (count, first) = (columns.len(), columns.start);
    let wanted = if to.len() < SERIAL { 1 } else { pool::threads() };
    // Only read through.
    let from = Out(from.as_ptr().cast_mut().cast::<u16>());
    let to = Out(to.as_mut_ptr().cast::<u16>());
    pool::run(wanted, |thread, threads| {
        let columns = pool::part(count, SIDE, thread, threads);
        // SAFETY: the first column lies inside the matrix.
        let from = unsafe { from.add(first) }.pointer().cast_const();
        on_best(&Transpose { from, stride, rows, columns, to: to.pointer() });
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::simd::{Bf16, Isa};

    fn random(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    fn against_float64<E: Element>(rows: usize, components: usize, features: usize, first: usize) {
        let columns = first..features;
        let width = columns.len();
        let g: Vec<E> = random(rows * width, 1).into_iter().map(E::nearest).collect();
        let (p, a) = (random(rows * components, 2), random(components * features, 3));
        let mut want = 0.0;
        for i in 0..rows {
            for (j, column) in columns.clone().enumerate() {
                let product: f64 = (0..components)
                    .map(|k| f64::from(p[i * components + k]) * f64::from(a[k * features + column]))
                    .sum();
                want += (product * f64::from(g[i * width + j].widen())).abs();
            }
        }
        let a = Factor::new(&a, components);
        let close = |got: f64, what: &str| {
            assert!((got / want - 1.0).abs() < 3e-6, "{what}: {got} for {want}");
        };
        for isa in Isa::available() {
            let kernel = Sum { g: &g, p: &p, a, columns: columns.clone() };
            close(isa.run(&kernel), &format!("{isa:?}"));
        }
        close(sum(&g, &p, a, columns), "on the threads");
    }

    #[test]
    fn all_instructions_sum_as_float64_does() {
        for (rows, components, features, first) in
            [(1, 1, 1, 0), (3, 2, 17, 0), (9, 8, 128, 64), (5, 33, 200, 8), (64, 8, 700, 0)]
        {
            against_float64::<f32>(rows, components, features, first);
            against_float64::<Bf16>(rows, components, features, first);
        }
    }

    #[test]
    fn what_is_not_a_number_stays_none() {
        let a = [1.0f32; 40];
        let mut g = [1.0f32; 40];
        g[37] = f32::NAN;
        for isa in Isa::available() {
            let kernel = Sum { g: &g, p: &[1.0], a: Factor::new(&a, 1), columns: 0..40 };
            assert!(isa.run(&kernel).is_nan(), "{isa:?}");
        }
    }

    #[test]
    fn all_instructions_transpose() {
        for (rows, stride, columns) in
            [(1, 1, 0..1), (16, 16, 0..16), (33, 50, 3..47), (40, 64, 16..64), (700, 300, 20..290)]
        {
            let from: Vec<Bf16> = (0..rows * stride).map(|i| Bf16(i as u16)).collect();
            let want: Vec<Bf16> = columns
                .clone()
                .flat_map(|column| (0..rows).map(move |row| Bf16((row * stride + column) as u16)))
                .collect();
            for isa in Isa::available() {
                let mut to = vec![Bf16(0); want.len()];
                isa.run(&Transpose {
                    from: from[columns.start..].as_ptr().cast(),
                    stride,
                    rows,
                    columns: 0..columns.len(),
                    to: to.as_mut_ptr().cast(),
                });
                assert_eq!(to, want, "{isa:?}");
            }
            let mut to = vec![Bf16(0); want.len()];
            transpose(&from, stride, columns, &mut to);
            assert_eq!(to, want);
        }
    }
}
