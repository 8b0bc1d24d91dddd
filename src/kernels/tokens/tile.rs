//! One tile of tokens, on one thread: its part of the dropout mask, and its products with a small matrix
//! in registers.

use super::Factor;
use crate::kernels::dropout::{Stream, GROUP};
use crate::kernels::simd::{load_at, store_at, Element, Simd};

/// Columns of a factor that stay in the first cache.
const PANEL: usize = 1024;

/// The packed mask of one tile of tokens.
#[derive(Default)]
pub struct Mask {
    bytes: Vec<u8>,
    /// Element of the first bit, of the whole matrix.
    start: usize,
}

impl Mask {
    #[inline(always)]
    pub unsafe fn draw<V: Simd>(
        &mut self,
        stream: Option<&Stream>,
        elements: std::ops::Range<usize>,
    ) {
        let Some(stream) = stream else { return };
        let groups = elements.start / GROUP..elements.end.div_ceil(GROUP);
        // Four bytes more than there are bits: `at` reads a word.
        self.bytes.resize(groups.len() * GROUP / 8 + 4, 0);
        self.start = groups.start * GROUP;
        let length = groups.len() * GROUP / 8;
        // SAFETY: as the caller promises.
        unsafe { stream.fill::<V>(&mut self.bytes[..length], groups.start) };
    }

    /// The bits of the 16 elements from `element` on.
    #[inline(always)]
    unsafe fn at(&self, element: usize) -> u32 {
        let bit = element - self.start;
        // SAFETY: `element` lies in the tile that was drawn, and four bytes follow it.
        let word = unsafe { self.bytes.as_ptr().add(bit / 8).cast::<u32>().read_unaligned() };
        u32::from_le(word) >> (bit % 8)
    }
}

/// A tile of rows of a large matrix, all columns or some neighbouring ones, and its place in the whole.
#[derive(Clone, Copy)]
pub struct Tile<E> {
    /// Its first value.
    pub data: *mut E,
    /// Number of rows.
    pub tokens: usize,
    /// Values in a row.
    pub columns: usize,
    /// From a row to the next.
    pub stride: usize,
    /// Element of its first value in the whole matrix.
    pub start: usize,
}

impl<E: Element> Tile<E> {
    #[inline(always)]
    pub unsafe fn load<V: Simd, const MASKED: bool>(
        &self,
        token: usize,
        column: usize,
        count: usize,
        mask: &Mask,
    ) -> V {
        let place = token * self.stride + column;
        // SAFETY: the callers stay inside the tile.
        unsafe {
            let from = self.data.add(place).cast_const();
            let value: V =
                if count == V::LANES { E::load(from) } else { E::load_some(from, count) };
            if MASKED {
                value.keep(mask.at(self.start + place))
            } else {
                value
            }
        }
    }
}

/// `out[token][row] += tile[token] . factor[row]` for `T` tokens and `R` rows.
// Indexed loops over registers, tokens inside rows.
#[allow(clippy::needless_range_loop)]
#[inline(always)]
unsafe fn dot_block<V: Simd, E: Element, const MASKED: bool, const T: usize, const R: usize>(
    tile: &Tile<E>,
    (token, row): (usize, usize),
    panel: std::ops::Range<usize>,
    factor: Factor<'_>,
    mask: &Mask,
    out: *mut f32,
) {
    // SAFETY: tokens, rows and columns lie inside the matrices, as `dots` counts them.
    unsafe {
        let mut sums = [[V::splat(0.0); R]; T];
        let mut column = panel.start;
        while column < panel.end {
            let count = V::LANES.min(panel.end - column);
            let mut x = [V::splat(0.0); T];
            for (t, x) in x.iter_mut().enumerate() {
                *x = tile.load::<V, MASKED>(token + t, column, count, mask);
            }
            for r in 0..R {
                let from = factor.values.as_ptr().add((row + r) * factor.columns + column);
                let f: V =
                    if count == V::LANES { V::load(from) } else { f32::load_some(from, count) };
                for t in 0..T {
                    sums[t][r] = x[t].fma(f, sums[t][r]);
                }
            }
            column += V::LANES;
        }
        for (t, sums) in sums.iter().enumerate() {
            for (r, sum) in sums.iter().enumerate() {
                *out.add((token + t) * factor.rows + row + r) += sum.sum();
            }
        }
    }
}

/// `out = tile factor^T`, (tokens, rows).
#[inline(always)]
pub unsafe fn dots<V: Simd, E: Element, const MASKED: bool>(
    tile: &Tile<E>,
    factor: Factor<'_>,
    mask: &Mask,
    out: *mut f32,
) {
    macro_rules! rows {
        ($row:ident, $panel:ident, $t:literal, $r:literal) => {{
            let mut token = 0;
            while token + $t <= tile.tokens {
                let at = (token, $row);
                unsafe {
                    dot_block::<V, E, MASKED, $t, $r>(tile, at, $panel.clone(), factor, mask, out)
                };
                token += $t;
            }
            while token < tile.tokens {
                let at = (token, $row);
                unsafe {
                    dot_block::<V, E, MASKED, 1, $r>(tile, at, $panel.clone(), factor, mask, out)
                };
                token += 1;
            }
            $row += $r;
        }};
    }
    // SAFETY: `out` has tokens * rows places.
    unsafe { std::slice::from_raw_parts_mut(out, tile.tokens * factor.rows) }.fill(0.0);
    let mut start = 0;
    while start < factor.columns {
        let panel = start..(start + PANEL).min(factor.columns);
        let mut row = 0;
        while row < factor.rows {
            match factor.rows - row {
                8.. if V::ROWS == 8 => rows!(row, panel, 2, 8),
                4.. if V::ROWS == 8 => rows!(row, panel, 4, 4),
                4.. => rows!(row, panel, 2, 4),
                2.. => rows!(row, panel, 4, 2),
                _ => rows!(row, panel, 4, 1),
            }
        }
        start = panel.end;
    }
}

/// `T` tokens of [`expand`], in one block of columns.
#[inline(always)]
unsafe fn expand_block<V: Simd, E: Element, const MASKED: bool, const ADD: bool, const T: usize>(
    small: *const f32,
    factor: Factor<'_>,
    first: V,
    mask: &Mask,
    tile: &Tile<E>,
    (token, column, count): (usize, usize, usize),
) {
    // SAFETY: columns and tokens lie inside the matrices, as `expand` counts them.
    unsafe {
        let mut sums = [first; T];
        for row in 0..factor.rows {
            let f: V = load_at(factor.values.as_ptr().add(row * factor.columns + column), count);
            for (t, sum) in sums.iter_mut().enumerate() {
                *sum = f.fma(V::splat(*small.add((token + t) * factor.rows + row)), *sum);
            }
        }
        for (t, sum) in sums.into_iter().enumerate() {
            let place = (token + t) * tile.stride + column;
            let mut value = if MASKED { sum.keep(mask.at(tile.start + place)) } else { sum };
            if ADD {
                let before: V = load_at(tile.data.add(place).cast_const(), count);
                value = before.fma(V::splat(1.0), value);
            }
            store_at(value, tile.data.add(place), count);
        }
    }
}

/// `tile = drop(bias + small factor)`, or that added to the tile.
#[inline(always)]
pub unsafe fn expand<V: Simd, E: Element, const MASKED: bool, const ADD: bool>(
    small: *const f32,
    factor: Factor<'_>,
    bias: Option<&[f32]>,
    mask: &Mask,
    tile: &Tile<E>,
) {
    const T: usize = 8;
    let mut column = 0;
    while column < tile.columns {
        let count = V::LANES.min(tile.columns - column);
        // SAFETY: columns and tokens lie inside the matrices.
        unsafe {
            let first: V = match bias {
                Some(bias) => load_at(bias.as_ptr().add(column), count),
                None => V::splat(0.0),
            };
            let mut token = 0;
            while token + T <= tile.tokens {
                let at = (token, column, count);
                expand_block::<V, E, MASKED, ADD, T>(small, factor, first, mask, tile, at);
                token += T;
            }
            while token < tile.tokens {
                let at = (token, column, count);
                expand_block::<V, E, MASKED, ADD, 1>(small, factor, first, mask, tile, at);
                token += 1;
            }
        }
        column += V::LANES;
    }
}

/// `sums += small^T tile`, (rows, columns), `R` of the rows.
#[inline(always)]
unsafe fn outer_block<V: Simd, E: Element, const MASKED: bool, const R: usize>(
    small: *const f32,
    tile: &Tile<E>,
    mask: &Mask,
    (row, rows): (usize, usize),
    sums: *mut f32,
) {
    let mut column = 0;
    while column < tile.columns {
        let count = V::LANES.min(tile.columns - column);
        // SAFETY: columns, rows and tokens lie inside the matrices.
        unsafe {
            let place = |r: usize| sums.add((row + r) * tile.columns + column);
            let mut block = [V::splat(0.0); R];
            for (r, sum) in block.iter_mut().enumerate() {
                *sum = if count == V::LANES {
                    V::load(place(r))
                } else {
                    f32::load_some(place(r), count)
                };
            }
            for token in 0..tile.tokens {
                let x: V = tile.load::<V, MASKED>(token, column, count, mask);
                for (r, sum) in block.iter_mut().enumerate() {
                    *sum = x.fma(V::splat(*small.add(token * rows + row + r)), *sum);
                }
            }
            for (r, sum) in block.iter().enumerate() {
                if count == V::LANES {
                    sum.store(place(r));
                } else {
                    f32::store_some(*sum, place(r), count);
                }
            }
        }
        column += V::LANES;
    }
}

#[inline(always)]
pub unsafe fn outer<V: Simd, E: Element, const MASKED: bool>(
    small: *const f32,
    rows: usize,
    tile: &Tile<E>,
    mask: &Mask,
    sums: *mut f32,
) {
    let mut row = 0;
    while row < rows {
        // SAFETY: as the caller promises.
        unsafe {
            match rows - row {
                8.. => {
                    outer_block::<V, E, MASKED, 8>(small, tile, mask, (row, rows), sums);
                    row += 8;
                }
                4.. => {
                    outer_block::<V, E, MASKED, 4>(small, tile, mask, (row, rows), sums);
                    row += 4;
                }
                2.. => {
                    outer_block::<V, E, MASKED, 2>(small, tile, mask, (row, rows), sums);
                    row += 2;
                }
                _ => {
                    outer_block::<V, E, MASKED, 1>(small, tile, mask, (row, rows), sums);
                    row += 1;
                }
            }
        }
    }
}
