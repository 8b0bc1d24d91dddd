//! The update's loops over tokens on the CPU, float32 and bfloat16: every large matrix is read or
//! written once, the dropout mask is drawn on the way, and the sums are float32.
//!
//! A factor is a small matrix (rows, columns) of float32: A with the dropout's gain, or P^T; or a stack of them, each
//! for its slice of the columns of the large matrices.

mod panels;
mod tile;

use tch::{Device, Kind, Tensor};

use self::panels::Panels;
use self::tile::{dots, expand, outer, Mask, Tile};
use super::dropout::Stream;
use super::plain::{as_slice, as_slice_mut, Out};
use super::pool;
use super::simd::{on_best, store_at, Bf16, Element, Kernel, Simd};
use crate::errors::Result;

/// Tokens worked on at once.
const TILE: usize = 16;
/// Multiplications below which a second thread costs more than it saves.
const SERIAL: usize = 1 << 20;

/// Small matrices (slices, rows, columns), contiguous.
#[derive(Clone, Copy)]
pub struct Factor<'a> {
    /// Their values.
    pub values: &'a [f32],
    /// Their number.
    pub slices: usize,
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub columns: usize,
}

impl<'a> Factor<'a> {
    /// `values` as one matrix of `rows` rows.
    pub fn new(values: &'a [f32], rows: usize) -> Self {
        Self::stack(values, 1, rows)
    }

    /// `values` as `slices` matrices of `rows` rows.
    pub fn stack(values: &'a [f32], slices: usize, rows: usize) -> Self {
        Self { values, slices, rows, columns: values.len() / (slices * rows).max(1) }
    }

    /// Columns of the large matrix.
    fn width(&self) -> usize {
        self.slices * self.columns
    }
}

impl Panels<'_> {
    /// The columns of `slice` of the `tokens` rows from element `start` on of the large matrix at `data`.
    ///
    /// # Safety
    /// They are there.
    #[inline(always)]
    unsafe fn tile<E>(&self, data: *mut E, start: usize, tokens: usize, slice: usize) -> Tile<E> {
        let (columns, stride) = (self.columns, self.width());
        let start = start + slice * columns;
        // SAFETY: as the caller promises.
        Tile { data: unsafe { data.add(start) }, tokens, columns, stride, start }
    }
}

/// What [`forward`] does with y.
#[derive(Clone, Copy)]
pub enum Start<'a> {
    /// Overwrites it with the bias, zeros without one, plus the update.
    Bias(Option<&'a [f32]>),
    /// Adds the update to it.
    Add,
}

struct Forward<'a, E> {
    x: *mut E,
    a: Panels<'a>,
    p: Panels<'a>,
    start: Start<'a>,
    dropout: Option<&'a Stream>,
    /// (slices, all tokens, rows).
    t: Out<f32>,
    y: Out<E>,
    all: usize,
    tokens: std::ops::Range<usize>,
}

fn tiles(tokens: std::ops::Range<usize>) -> impl Iterator<Item = std::ops::Range<usize>> {
    let end = tokens.end;
    tokens.step_by(TILE).map(move |first| first..(first + TILE).min(end))
}

impl<E: Element> Forward<'_, E> {
    #[inline(always)]
    unsafe fn all<V: Simd, const MASKED: bool>(&self) {
        let mut mask = Mask::default();
        let (a, p) = (self.a, self.p);
        for rows in tiles(self.tokens.clone()) {
            let (first, tokens) = (rows.start, rows.len());
            let start = first * a.width();
            // SAFETY: the matrices have `tokens` rows of their factors' columns, checked by `forward`.
            unsafe { mask.draw::<V>(self.dropout, start..rows.end * a.width()) };
            for k in 0..a.slices {
                // SAFETY: as above.
                unsafe {
                    let x = a.tile(self.x, start, tokens, k);
                    let t = self.t.0.add((k * self.all + first) * a.rows);
                    dots::<V, E, MASKED>(&x, a.slice(k), &mask, t);
                    let y = p.tile(self.y.0, first * p.width(), tokens, k);
                    match self.start {
                        Start::Bias(bias) => {
                            let bias = bias.map(|bias| &bias[k * p.columns..][..p.columns]);
                            expand::<V, E, false, false>(t, p.slice(k), bias, &mask, &y)
                        }
                        Start::Add => expand::<V, E, false, true>(t, p.slice(k), None, &mask, &y),
                    }
                }
            }
        }
    }
}

impl<E: Element> Kernel for Forward<'_, E> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<V: Simd>(&self) {
        // SAFETY: as the caller promises.
        unsafe {
            if self.dropout.is_some() {
                self.all::<V, true>();
            } else {
                self.all::<V, false>();
            }
        }
    }
}

fn workers(tokens: usize, a: Factor<'_>, p: Factor<'_>) -> usize {
    if tokens * a.rows * (a.width() + p.width()) < SERIAL {
        1
    } else {
        pool::threads().min(tokens.div_ceil(TILE))
    }
}

/// `t = drop(x) A^T` (slices, tokens, rows) and the update `t P` put into, or added to, `y` (tokens, out).
///
/// `a` is A times the dropout's gain, `p` is P^T (rows, out), of as many slices.
///
/// # Panics
/// Where the lengths do not fit together.
pub fn forward<E: Element>(
    x: &[E],
    a: Factor<'_>,
    p: Factor<'_>,
    start: Start<'_>,
    dropout: Option<&Stream>,
    t: &mut [f32],
    y: &mut [E],
) {
    let tokens = tokens_of(t, a, p);
    assert!(x.len() == tokens * a.width() && y.len() == tokens * p.width());
    if let Start::Bias(Some(bias)) = start {
        assert!(bias.len() == p.width());
    }
    // Only read through: a tile is of either kind.
    let x = Out(x.as_ptr().cast_mut());
    let (t, y) = (Out(t.as_mut_ptr()), Out(y.as_mut_ptr()));
    let (wanted, packed) = (workers(tokens, a, p), [a, p].map(Panels::pack));
    let (a, p) = (Panels::of(&packed[0], a), Panels::of(&packed[1], p));
    pool::run(wanted, |thread, threads| {
        let (all, tokens) = (tokens, pool::part(tokens, TILE, thread, threads));
        on_best(&Forward { x: x.pointer(), a, p, start, dropout, t, y, all, tokens });
    });
}

/// How many rows `t` is of; fails where it or the factors do not fit together.
fn tokens_of(t: &[f32], a: Factor<'_>, p: Factor<'_>) -> usize {
    let each = a.slices * a.rows;
    assert!((a.slices, a.rows) == (p.slices, p.rows) && each > 0 && t.len().is_multiple_of(each));
    assert!(a.values.len() == each * a.columns && p.values.len() == each * p.columns);
    t.len() / each
}

struct Dropped<'a, E> {
    x: *mut E,
    features: usize,
    columns: std::ops::Range<usize>,
    stream: &'a Stream,
    out: Out<E>,
    /// Tokens of x, and the first of those that `out` has.
    tokens: std::ops::Range<usize>,
    first: usize,
}

impl<E: Element> Kernel for Dropped<'_, E> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<V: Simd>(&self) {
        let mut mask = Mask::default();
        let width = self.columns.len();
        for token in self.tokens.clone() {
            let start = token * self.features + self.columns.start;
            // SAFETY: token and columns lie inside both matrices, checked by `dropped`.
            unsafe {
                mask.draw::<V>(Some(self.stream), start..start + width);
                let from = Tile {
                    data: self.x.add(start),
                    tokens: 1,
                    columns: width,
                    stride: width,
                    start,
                };
                let to = self.out.add((token - self.first) * width).pointer();
                for column in (0..width).step_by(V::LANES) {
                    let count = V::LANES.min(width - column);
                    let value: V = from.load::<V, true>(0, column, count, &mask);
                    store_at(value, to.add(column), count);
                }
            }
        }
    }
}

/// `columns` of drop(x) for the tokens from `first` on, into `out` (tokens, columns), without the
/// dropout's gain. `x` is (any, features).
///
/// # Panics
/// Where the lengths do not fit together.
pub fn dropped<E: Element>(
    x: &[E],
    features: usize,
    first: usize,
    columns: std::ops::Range<usize>,
    stream: &Stream,
    out: &mut [E],
) {
    let tokens = out.len() / columns.len().max(1);
    assert!(out.len() == tokens * columns.len() && columns.end <= features);
    assert!((first + tokens) * features <= x.len());
    let wanted = if out.len() < SERIAL / 8 { 1 } else { pool::threads() };
    // Only read through.
    let x = Out(x.as_ptr().cast_mut());
    let out = Out(out.as_mut_ptr());
    pool::run(wanted, |thread, threads| {
        let part = pool::part(tokens, 1, thread, threads);
        let (x, columns) = (x.pointer(), columns.clone());
        let tokens = first + part.start..first + part.end;
        on_best(&Dropped { x, features, columns, stream, out, tokens, first });
    });
}

/// drop(x) of a whole contiguous `x` (tokens, features), float32 or bfloat16 on the CPU, without the dropout's gain.
/// `None` for any other.
pub fn drop_all(x: &Tensor, stream: &Stream) -> Result<Option<Tensor>> {
    let [_, features] = x.size()[..] else { return Ok(None) };
    if x.device() != Device::Cpu || !x.is_contiguous() {
        return Ok(None);
    }
    let out = x.f_empty_like()?;
    let columns = 0..features as usize;
    // SAFETY of both: it was just made; nobody else has its memory.
    match x.kind() {
        _ if x.numel() == 0 => {}
        Kind::Float => {
            let to = unsafe { as_slice_mut::<f32>(&out) };
            dropped(as_slice::<f32>(x), columns.end, 0, columns, stream, to);
        }
        Kind::BFloat16 => {
            let to = unsafe { as_slice_mut::<Bf16>(&out) };
            dropped(as_slice::<Bf16>(x), columns.end, 0, columns, stream, to);
        }
        _ => return Ok(None),
    }
    Ok(Some(out))
}

/// What [`backward`] gives: sums over the tokens, float32.
pub struct Sums {
    /// `t^T gy`, (rows, out) of every slice.
    pub q: Vec<f32>,
    /// `(gy P)^T drop(x)`, (rows, in) of every slice, without the dropout's gain.
    pub a: Vec<f32>,
}

struct Backward<'a, E> {
    x: *mut E,
    gy: *mut E,
    t: *const f32,
    a: Panels<'a>,
    p: Panels<'a>,
    dropout: Option<&'a Stream>,
    gx: Option<Out<E>>,
    /// Does gx hold what the update's share is added to?
    add: bool,
    /// In the panels of p and a.
    q: Out<f32>,
    sum_a: Out<f32>,
    all: usize,
    tokens: std::ops::Range<usize>,
}

impl<E: Element> Backward<'_, E> {
    #[inline(always)]
    unsafe fn all<V: Simd, const MASKED: bool>(&self) {
        let mut mask = Mask::default();
        let (a, p, rows) = (self.a, self.p, self.a.rows);
        let mut u = vec![0.0f32; TILE * rows];
        for part in tiles(self.tokens.clone()) {
            let (first, tokens) = (part.start, part.len());
            let start = first * a.width();
            // SAFETY: the matrices have `tokens` rows of their factors' columns, checked by `backward`.
            unsafe { mask.draw::<V>(self.dropout, start..part.end * a.width()) };
            for k in 0..a.slices {
                // SAFETY: as above.
                unsafe {
                    let gy = p.tile(self.gy, first * p.width(), tokens, k);
                    dots::<V, E, false>(&gy, p.slice(k), &mask, u.as_mut_ptr());
                    let t = self.t.add((k * self.all + first) * rows);
                    outer::<V, E, false>(t, rows, &gy, &mask, self.q.0.add(p.start(k)));
                    if let Some(gx) = self.gx {
                        let gx = a.tile(gx.0, start, tokens, k);
                        let (u, a) = (u.as_ptr(), a.slice(k));
                        if self.add {
                            expand::<V, E, MASKED, true>(u, a, None, &mask, &gx);
                        } else {
                            expand::<V, E, MASKED, false>(u, a, None, &mask, &gx);
                        }
                    }
                    let x = a.tile(self.x, start, tokens, k);
                    let sums = self.sum_a.0.add(a.start(k));
                    outer::<V, E, MASKED>(u.as_ptr(), rows, &x, &mask, sums);
                }
            }
        }
    }
}

impl<E: Element> Kernel for Backward<'_, E> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<V: Simd>(&self) {
        // SAFETY: as the caller promises.
        unsafe {
            if self.dropout.is_some() {
                self.all::<V, true>();
            } else {
                self.all::<V, false>();
            }
        }
    }
}

/// One pass over `gy` (tokens, out) and `x` (tokens, in): the sums for the parameters' gradients, and
/// the update's share of the gradient of x, which overwrites `gx` (tokens, in), or is added to it.
///
/// `a` is A times the dropout's gain, `p` is P^T (rows, out), of as many slices, `t` what [`forward`] gave.
///
/// # Panics
/// Where the lengths do not fit together.
pub fn backward<E: Element>(
    x: &[E],
    gy: &[E],
    t: &[f32],
    (a, p): (Factor<'_>, Factor<'_>),
    dropout: Option<&Stream>,
    gx: Option<(&mut [E], bool)>,
) -> Sums {
    let tokens = tokens_of(t, a, p);
    assert!(x.len() == tokens * a.width() && gy.len() == tokens * p.width());
    assert!(gx.as_ref().is_none_or(|(gx, _)| gx.len() == x.len()));
    let add = gx.as_ref().is_some_and(|(_, add)| *add);
    let wanted = workers(tokens, a, p);
    let (length_q, length_a) = (p.slices * Panels::length(p), a.slices * Panels::length(a));
    let mut q = vec![0.0f32; wanted * length_q];
    let mut sum_a = vec![0.0f32; wanted * length_a];
    let packed = [a, p].map(Panels::pack);
    let (panels_a, panels_p) = (Panels::of(&packed[0], a), Panels::of(&packed[1], p));
    let (x, gy, t) =
        (Out(x.as_ptr().cast_mut()), Out(gy.as_ptr().cast_mut()), Out(t.as_ptr().cast_mut()));
    let gx = gx.map(|(gx, _)| Out(gx.as_mut_ptr()));
    let (out_q, out_a) = (Out(q.as_mut_ptr()), Out(sum_a.as_mut_ptr()));
    pool::run(wanted, |thread, threads| {
        let (all, tokens) = (tokens, pool::part(tokens, TILE, thread, threads));
        // SAFETY: there are `wanted` partial sums and never more threads.
        let (q, sum_a) = unsafe { (out_q.add(thread * length_q), out_a.add(thread * length_a)) };
        let (x, gy, t) = (x.pointer(), gy.pointer(), t.pointer());
        let (a, p) = (panels_a, panels_p);
        on_best(&Backward { x, gy, t, a, p, dropout, gx, add, q, sum_a, all, tokens });
    });
    Sums { q: Panels::unpack(p, &q), a: Panels::unpack(a, &sum_a) }
}

#[cfg(test)]
mod tests;
