//! A small matrix, or the sums for one, as the loops walk over it: blocks of neighbouring columns, in each the rows one
//! below the other. In rows of thousands of columns, what is worked on at once would lie whole pages apart.

use super::Factor;

/// Columns of a block: as many as the longest vector has lanes.
pub const BLOCK: usize = 16;

/// Small matrices (slices, blocks, rows, [`BLOCK`]); the columns after the last one are 0.
#[derive(Clone, Copy)]
pub struct Panels<'a> {
    values: &'a [f32],
    /// Their number.
    pub slices: usize,
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub columns: usize,
}

impl<'a> Panels<'a> {
    /// Values of one of `factor`'s matrices.
    pub fn length(factor: Factor<'_>) -> usize {
        length(factor.rows, factor.columns)
    }

    /// The values of `factor` in this order.
    pub fn pack(factor: Factor<'_>) -> Vec<f32> {
        let mut packed = vec![0.0; factor.slices * Self::length(factor)];
        each_run(factor, |plain, place, count| {
            packed[place..place + count].copy_from_slice(&factor.values[plain..plain + count]);
        });
        packed
    }

    /// Adds up `parts`, each in this order, in the order of the values of `factor`.
    pub fn unpack(factor: Factor<'_>, parts: &[f32]) -> Vec<f32> {
        let mut sums = vec![0.0; factor.values.len()];
        for part in parts.chunks_exact((factor.slices * Self::length(factor)).max(1)) {
            each_run(factor, |plain, place, count| {
                let pairs = sums[plain..plain + count].iter_mut().zip(&part[place..]);
                pairs.for_each(|(sum, value)| *sum += value);
            });
        }
        sums
    }

    /// `packed`, which [`Panels::pack`] made of `factor`.
    pub fn of(packed: &'a [f32], factor: Factor<'_>) -> Self {
        let Factor { slices, rows, columns, .. } = factor;
        Self { values: packed, slices, rows, columns }
    }

    /// Columns of the large matrix.
    pub fn width(&self) -> usize {
        self.slices * self.columns
    }

    /// Where the values of a slice begin.
    #[inline(always)]
    pub fn start(&self, slice: usize) -> usize {
        slice * length(self.rows, self.columns)
    }

    /// One of the matrices.
    #[inline(always)]
    pub fn slice(&self, slice: usize) -> Self {
        let values = &self.values[self.start(slice)..self.start(slice + 1)];
        Self { values, slices: 1, ..*self }
    }

    /// Where the value of `column` and `row` of the first matrix is, of `rows` rows.
    #[inline(always)]
    pub fn place(column: usize, row: usize, rows: usize) -> usize {
        (column & !(BLOCK - 1)) * rows + row * BLOCK + (column & (BLOCK - 1))
    }

    /// The value of `column` and `row` of the first matrix; the same column of the next row is [`BLOCK`] further on.
    ///
    /// # Safety
    /// There is one.
    #[inline(always)]
    pub unsafe fn at(&self, column: usize, row: usize) -> *const f32 {
        // SAFETY: as the caller promises.
        unsafe { self.values.as_ptr().add(Self::place(column, row, self.rows)) }
    }
}

#[inline(always)]
fn length(rows: usize, columns: usize) -> usize {
    columns.next_multiple_of(BLOCK) * rows
}

/// Every run of neighbours: its place in the values of `factor`, its place in panels, its length.
fn each_run(factor: Factor<'_>, mut work: impl FnMut(usize, usize, usize)) {
    let (length, Factor { slices, rows, columns, .. }) = (Panels::length(factor), factor);
    for slice in 0..slices {
        for row in 0..rows {
            for column in (0..columns).step_by(BLOCK) {
                let plain = (slice * rows + row) * columns + column;
                let place = slice * length + Panels::place(column, row, rows);
                work(plain, place, BLOCK.min(columns - column));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_has_its_rows_one_below_the_other_and_zeros_after_the_last_column() {
        let values: Vec<f32> = (0..36).map(|value| value as f32).collect();
        let packed = Panels::pack(Factor::new(&values, 2));
        assert_eq!(packed.len(), 64);
        assert_eq!((packed[0], packed[15], packed[16], packed[31]), (0.0, 15.0, 18.0, 33.0));
        assert_eq!(packed[32..35], [16.0, 17.0, 0.0]);
        assert_eq!(packed[48..51], [34.0, 35.0, 0.0]);
    }

    #[test]
    fn parts_are_added_up_in_the_order_of_the_values() {
        for (slices, rows, columns) in [(1, 1, 1), (3, 2, 5), (2, 3, 16), (2, 5, 37), (1, 8, 0)] {
            let values: Vec<f32> = (0..slices * rows * columns).map(|value| value as f32).collect();
            let factor = Factor::stack(&values, slices, rows);
            let packed = Panels::pack(factor);
            let twice: Vec<f32> = values.iter().map(|value| 2.0 * value).collect();
            assert_eq!(
                Panels::unpack(factor, &packed.repeat(2)),
                twice,
                "{slices} {rows} {columns}"
            );
        }
    }
}
