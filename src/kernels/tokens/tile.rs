//! One tile of tokens, on one thread: its part of the dropout mask, and its products with a small matrix
//! in registers.

use super::panels::{Panels, BLOCK};
use super::TILE;
use crate::kernels::dropout::{Stream, GROUP};
use crate::kernels::simd::{load_at, store_at, Element, Simd, LINE};

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
    /// Asks for the same `C` vectors of the next tile. The processor's own prefetching follows no reading that goes down
    /// the rows, and waiting for memory took longer than the sums.
    #[inline(always)]
    unsafe fn ahead<V: Simd, const C: usize>(&self, token: usize, column: usize) {
        let place = (token + TILE) * self.stride + column;
        for c in 0..C {
            // A second vector of bfloat16 is in the line of the first.
            if (c * V::LANES * size_of::<E>()).is_multiple_of(LINE) {
                let place = self.data.wrapping_add(place + c * V::LANES);
                // SAFETY: nothing is read.
                unsafe { V::prefetch(place.cast_const().cast()) };
            }
        }
    }

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
    factor: Panels<'_>,
    mask: &Mask,
    out: *mut f32,
) {
    // SAFETY: tokens, rows and columns lie inside the matrices, as `dots` counts them.
    unsafe {
        let mut sums = [[V::splat(0.0); R]; T];
        // Whole vectors without a question: the loop's addresses are then few enough for the registers.
        macro_rules! step {
            ($column:expr, $count:expr) => {{
                let mut x = [V::splat(0.0); T];
                for (t, x) in x.iter_mut().enumerate() {
                    *x = tile.load::<V, MASKED>(token + t, $column, $count, mask);
                    tile.ahead::<V, 1>(token + t, $column);
                }
                let from = factor.at($column, row);
                for r in 0..R {
                    let f = V::load(from.add(r * BLOCK));
                    for t in 0..T {
                        sums[t][r] = x[t].fma(f, sums[t][r]);
                    }
                }
            }};
        }
        let mut column = panel.start;
        while column + V::LANES <= panel.end {
            step!(column, V::LANES);
            column += V::LANES;
        }
        if column < panel.end {
            step!(column, panel.end - column);
        }
        for (t, sums) in sums.iter().enumerate() {
            V::add_sums(sums, out.add((token + t) * factor.rows + row));
        }
    }
}

/// `out = tile factor^T`, (tokens, rows).
#[inline(always)]
pub unsafe fn dots<V: Simd, E: Element, const MASKED: bool>(
    tile: &Tile<E>,
    factor: Panels<'_>,
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

/// `T` tokens of [`expand`], in `C` vectors of columns of which the last has `count`.
// Indexed loops over registers.
#[allow(clippy::needless_range_loop)]
#[inline(always)]
unsafe fn expand_block<
    V: Simd,
    E: Element,
    const MASKED: bool,
    const ADD: bool,
    const T: usize,
    const C: usize,
>(
    small: *const f32,
    factor: Panels<'_>,
    first: [V; C],
    mask: &Mask,
    tile: &Tile<E>,
    (token, column, count): (usize, usize, usize),
) {
    // SAFETY: columns and tokens lie inside the matrices, as `expand` counts them.
    unsafe {
        let mut sums = [first; T];
        for t in 0..T {
            tile.ahead::<V, C>(token + t, column);
        }
        let from: [*const f32; C] = std::array::from_fn(|c| factor.at(column + c * V::LANES, 0));
        let of: [*const f32; T] = std::array::from_fn(|t| small.add((token + t) * factor.rows));
        for row in 0..factor.rows {
            let f: [V; C] = std::array::from_fn(|c| V::load(from[c].add(row * BLOCK)));
            for t in 0..T {
                let value = V::splat(*of[t].add(row));
                for c in 0..C {
                    sums[t][c] = f[c].fma(value, sums[t][c]);
                }
            }
        }
        for t in 0..T {
            for c in 0..C {
                let place = (token + t) * tile.stride + column + c * V::LANES;
                let sum = sums[t][c];
                let mut value = if MASKED { sum.keep(mask.at(tile.start + place)) } else { sum };
                if ADD {
                    let before: V = load_at(tile.data.add(place).cast_const(), count);
                    value = before.fma(V::splat(1.0), value);
                }
                store_at(value, tile.data.add(place), count);
            }
        }
    }
}

/// `tile = drop(bias + small factor)`, or that added to the tile.
#[inline(always)]
pub unsafe fn expand<V: Simd, E: Element, const MASKED: bool, const ADD: bool>(
    small: *const f32,
    factor: Panels<'_>,
    bias: Option<&[f32]>,
    mask: &Mask,
    tile: &Tile<E>,
) {
    macro_rules! tokens {
        ($column:expr, $count:expr, $t:literal, $c:literal) => {{
            let (column, count) = ($column, $count);
            // SAFETY: columns and tokens lie inside the matrices.
            unsafe {
                let first: [V; $c] = std::array::from_fn(|c| match bias {
                    Some(bias) => load_at(bias.as_ptr().add(column + c * V::LANES), count),
                    None => V::splat(0.0),
                });
                let mut token = 0;
                while token + $t <= tile.tokens {
                    let at = (token, column, count);
                    expand_block::<V, E, MASKED, ADD, $t, $c>(small, factor, first, mask, tile, at);
                    token += $t;
                }
                while token < tile.tokens {
                    let at = (token, column, count);
                    expand_block::<V, E, MASKED, ADD, 1, $c>(small, factor, first, mask, tile, at);
                    token += 1;
                }
            }
        }};
    }
    let mut column = 0;
    // Two vectors at once: a whole line of the cache for bfloat16, and half as many loads of `small`.
    while column + 2 * V::LANES <= tile.columns {
        if V::ROWS == 8 {
            tokens!(column, V::LANES, 8, 2);
        } else {
            tokens!(column, V::LANES, 4, 2);
        }
        column += 2 * V::LANES;
    }
    while column < tile.columns {
        tokens!(column, V::LANES.min(tile.columns - column), 8, 1);
        column += V::LANES;
    }
}

/// `sums += small^T tile` for `R` of the rows and `C` vectors of columns of which the last has `count`.
// Indexed loops over registers.
#[allow(clippy::needless_range_loop)]
#[inline(always)]
unsafe fn outer_block<V: Simd, E: Element, const MASKED: bool, const R: usize, const C: usize>(
    small: *const f32,
    tile: &Tile<E>,
    mask: &Mask,
    (row, rows): (usize, usize),
    (column, count): (usize, usize),
    sums: *mut f32,
) {
    // SAFETY: columns, rows and tokens lie inside the matrices; the panels of the sums are whole.
    unsafe {
        let place: [*mut f32; C] =
            std::array::from_fn(|c| sums.add(Panels::place(column + c * V::LANES, row, rows)));
        let mut block = [[V::splat(0.0); C]; R];
        for r in 0..R {
            for c in 0..C {
                block[r][c] = V::load(place[c].add(r * BLOCK).cast_const());
            }
        }
        for token in 0..tile.tokens {
            tile.ahead::<V, C>(token, column);
            let x: [V; C] = std::array::from_fn(|c| {
                tile.load::<V, MASKED>(token, column + c * V::LANES, count, mask)
            });
            for r in 0..R {
                let value = V::splat(*small.add(token * rows + row + r));
                for c in 0..C {
                    block[r][c] = x[c].fma(value, block[r][c]);
                }
            }
        }
        for r in 0..R {
            for c in 0..C {
                block[r][c].store(place[c].add(r * BLOCK));
            }
        }
    }
}

/// `sums += small^T tile`, (rows, columns) in panels.
#[inline(always)]
pub unsafe fn outer<V: Simd, E: Element, const MASKED: bool>(
    small: *const f32,
    rows: usize,
    tile: &Tile<E>,
    mask: &Mask,
    sums: *mut f32,
) {
    macro_rules! columns {
        ($row:ident, $r:literal) => {{
            let mut column = 0;
            // SAFETY: as the caller promises.
            unsafe {
                // So many sums and two values of x have room in the registers of AVX-512 only.
                while V::ROWS == 8 && column + 2 * V::LANES <= tile.columns {
                    let (rows, at) = (($row, rows), (column, V::LANES));
                    outer_block::<V, E, MASKED, $r, 2>(small, tile, mask, rows, at, sums);
                    column += 2 * V::LANES;
                }
                while column < tile.columns {
                    let at = (column, V::LANES.min(tile.columns - column));
                    outer_block::<V, E, MASKED, $r, 1>(small, tile, mask, ($row, rows), at, sums);
                    column += V::LANES;
                }
            }
            $row += $r;
        }};
    }
    let mut row = 0;
    while row < rows {
        match rows - row {
            8.. => columns!(row, 8),
            4.. => columns!(row, 4),
            2.. => columns!(row, 2),
            _ => columns!(row, 1),
        }
    }
}
