//! One row, on one thread: its rounds added up, and the transpose, in buffers of float32 that stay in the first cache.

use crate::kernels::simd::{load_at, store_at, Element, Simd};

/// Every vector of `length` elements: its value, then what is done with it. The last one overlaps the one before it
/// where the length is no multiple; its value is taken first, so that memory may be added to.
macro_rules! vectors {
    ($v:ty, $length:expr, |$at:ident, $count:ident| $value:expr, $got:ident => $store:expr) => {{
        let (length, lanes) = ($length, <$v>::LANES);
        if length < lanes {
            let ($at, $count) = (0, length);
            let $got = $value;
            $store;
        } else {
            let last = {
                let ($at, $count) = (length - lanes, lanes);
                $value
            };
            let mut place = 0;
            while place + lanes <= length {
                let ($at, $count) = (place, lanes);
                let $got = $value;
                $store;
                place += lanes;
            }
            let ($at, $count) = (length - lanes, lanes);
            let $got = last;
            $store;
        }
    }};
}

/// Cosines and sines of the angles of every round, (rounds, side / 2): pairs (j, j + side / 2) are turned.
#[derive(Clone, Copy)]
pub struct Angles<'a> {
    /// Cosines.
    pub cos: &'a [f32],
    /// Sines.
    pub sin: &'a [f32],
}

/// Which positions of a long row belong to which of a short one.
#[derive(Clone, Copy)]
pub struct Rounds<'a> {
    /// Positions of the long row.
    pub long: usize,
    /// Positions of a round, even where it is turned.
    pub side: usize,
    /// Rounds that count, from the first on; as many as parts or more.
    pub used: usize,
    /// Parts of the short row: round i belongs to part i modulo this.
    pub parts: usize,
    /// Positions of a part in memory; those from `side` on are 0.
    pub width: usize,
    /// Is the last round filled from the long row's beginning, over and over? Else with zeros.
    pub wraps: bool,
    /// How the rounds are turned.
    pub angles: Option<Angles<'a>>,
}

/// A long row, its last round filled, and a short one.
pub struct Rows {
    pub long: Vec<f32>,
    pub short: Vec<f32>,
}

impl Rounds<'_> {
    /// Positions of all rounds, the last one filled.
    pub fn whole(&self) -> usize {
        self.long.div_ceil(self.side) * self.side
    }

    /// Rows of zeros.
    pub fn rows(&self) -> Rows {
        Rows { long: vec![0.0; self.whole()], short: vec![0.0; self.parts * self.width] }
    }

    /// The short row of `rows` from its long one.
    ///
    /// # Safety
    /// The processor has the instructions of `V`.
    #[inline(always)]
    pub unsafe fn fold<V: Simd>(&self, rows: &mut Rows) {
        for place in self.long..rows.long.len() {
            rows.long[place] = if self.wraps { rows.long[place - self.long] } else { 0.0 };
        }
        for (round, from) in rows.long.chunks_exact(self.side).take(self.used).enumerate() {
            let to = &mut rows.short[round % self.parts * self.width..][..self.side];
            // SAFETY: as the caller promises.
            unsafe {
                if round < self.parts {
                    self.turn::<V, false, false>(round, from, to);
                } else {
                    self.turn::<V, false, true>(round, from, to);
                }
            }
        }
    }

    /// The long row of `rows`, in whose rounds that do not count there are zeros, from its short one.
    ///
    /// # Safety
    /// As for [`Rounds::fold`].
    #[inline(always)]
    pub unsafe fn unfold<V: Simd>(&self, rows: &mut Rows) {
        for (round, to) in rows.long.chunks_exact_mut(self.side).take(self.used).enumerate() {
            let from = &rows.short[round % self.parts * self.width..][..self.side];
            // SAFETY: as the caller promises.
            unsafe { self.turn::<V, true, false>(round, from, to) };
        }
        if self.wraps {
            for place in self.long..rows.long.len() {
                rows.long[place % self.long] += rows.long[place];
            }
        }
    }

    /// Puts `from`, turned by the angles of a round, or back, into `to`, or adds it.
    #[inline(always)]
    unsafe fn turn<V: Simd, const BACK: bool, const ADD: bool>(
        &self,
        round: usize,
        from: &[f32],
        to: &mut [f32],
    ) {
        let (from, to) = (from.as_ptr(), to.as_mut_ptr());
        // SAFETY: both have `side` places, the tables half as many for every round.
        unsafe {
            let Some(Angles { cos, sin }) = self.angles else {
                return put::<V, f32, ADD>(from, None, to, self.side);
            };
            let half = self.side / 2;
            let (cos, sin) = (cos[round * half..].as_ptr(), sin[round * half..].as_ptr());
            vectors!(
                V,
                half,
                |at, count| {
                    let (c, s): (V, V) = (load_at(cos.add(at), count), load_at(sin.add(at), count));
                    let (a, b): (V, V) =
                        (load_at(from.add(at), count), load_at(from.add(half + at), count));
                    let against = s.fma(V::splat(-1.0), V::splat(0.0));
                    let (of_b, of_a) = if BACK { (s, against) } else { (against, s) };
                    let (mut first, mut second) = (V::splat(0.0), V::splat(0.0));
                    if ADD {
                        first = load_at(to.add(at).cast_const(), count);
                        second = load_at(to.add(half + at).cast_const(), count);
                    }
                    (of_b.fma(b, c.fma(a, first)), of_a.fma(a, c.fma(b, second)))
                },
                pair => {
                    store_at(pair.0, to.add(at), count);
                    store_at(pair.1, to.add(half + at), count);
                }
            );
        }
    }
}

/// `count` elements of float32, plus the bias, to elements of another type, or added to them.
///
/// # Safety
/// So many are at `from` and `to` and in the bias; the processor has the instructions of `V`.
#[inline(always)]
pub unsafe fn put<V: Simd, E: Element, const ADD: bool>(
    from: *const f32,
    bias: Option<&[f32]>,
    to: *mut E,
    count: usize,
) {
    // SAFETY: as the caller promises.
    unsafe {
        vectors!(
            V,
            count,
            |at, count| {
                let mut value: V = load_at(from.add(at), count);
                if let Some(bias) = bias {
                    let bias: V = load_at(bias.as_ptr().add(at), count);
                    value = value.fma(V::splat(1.0), bias);
                }
                if ADD {
                    let before: V = load_at(to.add(at).cast_const(), count);
                    value = before.fma(V::splat(1.0), value);
                }
                value
            },
            value => store_at(value, to.add(at), count)
        );
    }
}

/// `to` from as many elements at `from`.
///
/// # Safety
/// As for [`put`].
#[inline(always)]
pub unsafe fn widen<V: Simd, E: Element>(from: *const E, to: &mut [f32]) {
    let count = to.len();
    let to = to.as_mut_ptr();
    // SAFETY: as the caller promises.
    unsafe {
        vectors!(V, count, |at, count| load_at::<V, E>(from.add(at), count), value => {
            store_at(value, to.add(at), count)
        });
    }
}
