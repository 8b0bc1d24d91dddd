//! Rows cut into rounds of a short length, each turned or not, and added up, and the transpose, for float32 and
//! bfloat16 on the CPU: the sums are float32 and the large matrix is read or written once.

use tch::{Device, Kind, Tensor};

use super::plain::{as_slice, as_slice_mut, Out};
use super::pool;
use super::simd::{load_at, on_best, store_at, Bf16, Element, Kernel, Simd};
use super::tokens::Start;
use crate::errors::Result;

/// Elements of the long rows below which a second thread costs more than it saves.
const SERIAL: usize = 1 << 15;

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
    /// Rounds that count, from the first on.
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

/// Rows of float32 in the first cache.
struct Rows {
    long: Vec<f32>,
    short: Vec<f32>,
}

impl Rounds<'_> {
    /// All rounds, the last one filled.
    fn whole(&self) -> usize {
        self.long.div_ceil(self.side) * self.side
    }

    fn rows(&self) -> Rows {
        Rows { long: vec![0.0; self.whole()], short: vec![0.0; self.parts * self.width] }
    }

    fn turn(&self, round: usize) -> Option<(&[f32], &[f32])> {
        let half = self.side / 2;
        let part = round * half..(round + 1) * half;
        self.angles.map(|Angles { cos, sin }| (&cos[part.clone()], &sin[part]))
    }

    /// The short row of `rows` from its long one.
    #[inline(always)]
    fn fold(&self, rows: &mut Rows) {
        for place in self.long..rows.long.len() {
            rows.long[place] = if self.wraps { rows.long[place - self.long] } else { 0.0 };
        }
        rows.short.fill(0.0);
        for (round, from) in rows.long.chunks_exact(self.side).take(self.used).enumerate() {
            let to = &mut rows.short[round % self.parts * self.width..][..self.side];
            match self.turn(round) {
                Some((cos, sin)) => turn_onto(cos, sin, 1.0, from, to),
                None => to.iter_mut().zip(from).for_each(|(to, from)| *to += from),
            }
        }
    }

    /// The long row of `rows` from its short one.
    #[inline(always)]
    fn unfold(&self, rows: &mut Rows) {
        rows.long.fill(0.0);
        for (round, to) in rows.long.chunks_exact_mut(self.side).take(self.used).enumerate() {
            let from = &rows.short[round % self.parts * self.width..][..self.side];
            match self.turn(round) {
                Some((cos, sin)) => turn_onto(cos, sin, -1.0, from, to),
                None => to.copy_from_slice(from),
            }
        }
        if self.wraps {
            for place in self.long..rows.long.len() {
                rows.long[place % self.long] += rows.long[place];
            }
        }
    }
}

/// Adds `from`, its pairs turned by the angles times `sign`, to `to`.
#[inline(always)]
fn turn_onto(cos: &[f32], sin: &[f32], sign: f32, from: &[f32], to: &mut [f32]) {
    let half = cos.len();
    let (first, second) = from.split_at(half);
    let (to_first, to_second) = to.split_at_mut(half);
    let second = &second[..half];
    let (to_second, sin) = (&mut to_second[..half], &sin[..half]);
    for j in 0..half {
        let sin = sign * sin[j];
        to_first[j] += cos[j] * first[j] - sin * second[j];
        to_second[j] += sin * first[j] + cos[j] * second[j];
    }
}

#[derive(Clone, Copy)]
enum Way<'a> {
    Fold,
    Unfold(Start<'a>),
}

struct Work<'a, E> {
    rounds: Rounds<'a>,
    way: Way<'a>,
    long: Out<E>,
    short: Out<E>,
    tokens: std::ops::Range<usize>,
}

impl<E: Element> Kernel for Work<'_, E> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<V: Simd>(&self) {
        let mut rows = self.rounds.rows();
        let (long, short) = (self.rounds.long, rows.short.len());
        for token in self.tokens.clone() {
            // SAFETY: rows of matrices of the sizes that `each_row` has checked; a thread has its own.
            unsafe {
                let (at, to) = (self.long.add(token * long).0, self.short.add(token * short).0);
                match self.way {
                    Way::Fold => {
                        widen::<V, E>(at, &mut rows.long[..long]);
                        self.rounds.fold(&mut rows);
                        narrow::<V, E>(&rows.short, to);
                    }
                    Way::Unfold(Start::Bias(bias)) => {
                        widen::<V, E>(to, &mut rows.short);
                        self.rounds.unfold(&mut rows);
                        if let Some(bias) = bias {
                            rows.long.iter_mut().zip(bias).for_each(|(to, bias)| *to += bias);
                        }
                        narrow::<V, E>(&rows.long[..long], at);
                    }
                    Way::Unfold(Start::Add) => {
                        widen::<V, E>(to, &mut rows.short);
                        self.rounds.unfold(&mut rows);
                        add::<V, E>(&rows.long[..long], at);
                    }
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn widen<V: Simd, E: Element>(from: *const E, to: &mut [f32]) {
    let mut place = 0;
    while place < to.len() {
        let count = V::LANES.min(to.len() - place);
        // SAFETY: as many can be read at `from` as `to` has.
        unsafe {
            let value: V = load_at(from.add(place), count);
            store_at(value, to.as_mut_ptr().add(place), count);
        }
        place += count;
    }
}

#[inline(always)]
unsafe fn narrow<V: Simd, E: Element>(from: &[f32], to: *mut E) {
    let mut place = 0;
    while place < from.len() {
        let count = V::LANES.min(from.len() - place);
        // SAFETY: as many can be written at `to` as `from` has.
        unsafe {
            let value: V = load_at(from.as_ptr().add(place), count);
            store_at(value, to.add(place), count);
        }
        place += count;
    }
}

#[inline(always)]
unsafe fn add<V: Simd, E: Element>(from: &[f32], to: *mut E) {
    let mut place = 0;
    while place < from.len() {
        let count = V::LANES.min(from.len() - place);
        // SAFETY: as many lie at `to` as `from` has.
        unsafe {
            let value: V = load_at(from.as_ptr().add(place), count);
            let before: V = load_at(to.add(place).cast_const(), count);
            store_at(before.fma(V::splat(1.0), value), to.add(place), count);
        }
        place += count;
    }
}

/// Can the loops work on this matrix? Not on an empty one.
pub fn takes(matrix: &Tensor) -> bool {
    matches!(matrix.kind(), Kind::Float | Kind::BFloat16)
        && matrix.device() == Device::Cpu
        && matrix.is_contiguous()
        && matrix.numel() > 0
}

/// The rows of `long` (tokens, long) in their rounds, added up: (tokens, parts * width). `None` if not taken.
///
/// # Panics
/// Where the sizes do not fit together.
pub fn fold(rounds: Rounds<'_>, long: &Tensor) -> Result<Option<Tensor>> {
    if !takes(long) {
        return Ok(None);
    }
    let size = [long.size()[0], (rounds.parts * rounds.width) as i64];
    let short = Tensor::f_empty(size, (long.kind(), Device::Cpu))?;
    match long.kind() {
        Kind::Float => each_row::<f32>(rounds, long, &short, Way::Fold),
        _ => each_row::<Bf16>(rounds, long, &short, Way::Fold),
    }
    Ok(Some(short))
}

/// The transpose: puts the rows of `short` (tokens, parts * width) into `long` (tokens, long), which holds what `start`
/// says and whose memory nobody else has. False if not taken.
///
/// # Panics
/// Where the sizes do not fit together.
pub fn unfold(
    rounds: Rounds<'_>,
    short: &Tensor,
    long: &mut Tensor,
    start: Start<'_>,
) -> Result<bool> {
    if !takes(long) || !takes(short) || long.kind() != short.kind() {
        return Ok(false);
    }
    match long.kind() {
        Kind::Float => each_row::<f32>(rounds, long, short, Way::Unfold(start)),
        _ => each_row::<Bf16>(rounds, long, short, Way::Unfold(start)),
    }
    Ok(true)
}

fn each_row<E: Element>(rounds: Rounds<'_>, long: &Tensor, short: &Tensor, way: Way<'_>) {
    let tokens = long.size()[0] as usize;
    let Rounds { side, parts, width, .. } = rounds;
    assert!(long.size() == [tokens as i64, rounds.long as i64]);
    assert!(short.size() == [tokens as i64, (parts * width) as i64]);
    assert!(side > 0 && side <= width && parts > 0 && rounds.used * side <= rounds.whole());
    if let Some(Angles { cos, sin }) = rounds.angles {
        let angles = rounds.used * (side / 2);
        assert!(side.is_multiple_of(2) && cos.len() >= angles && sin.len() >= angles);
    }
    if let Way::Unfold(Start::Bias(Some(bias))) = way {
        assert!(bias.len() == rounds.long);
    }
    let from = |tensor: &Tensor| Out(as_slice::<E>(tensor).as_ptr().cast_mut());
    // SAFETY: the callers of this file say that nobody else has the memory of what is written.
    let to = |tensor: &Tensor| Out(unsafe { as_slice_mut::<E>(tensor) }.as_mut_ptr());
    let (long, short) = match way {
        Way::Fold => (from(long), to(short)),
        Way::Unfold(_) => (to(long), from(short)),
    };
    let wanted = if tokens * rounds.long < SERIAL { 1 } else { pool::threads() };
    pool::run(wanted, |thread, threads| {
        let tokens = pool::part(tokens, 1, thread, threads);
        let (long, short) = (Out(long.pointer()), Out(short.pointer()));
        on_best(&Work { rounds, way, long, short, tokens });
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(values: &[f32]) -> Tensor {
        Tensor::from_slice(values).reshape([1, -1])
    }

    const PLAIN: Rounds<'_> =
        Rounds { long: 5, side: 2, used: 3, parts: 1, width: 2, wraps: true, angles: None };

    #[test]
    fn rounds_are_added_up_and_the_last_one_is_filled() {
        let long = row(&[1.0, 2.0, 3.0, 4.0, 5.0]);
        let sums = |rounds| fold(rounds, &long).unwrap().unwrap();
        assert_eq!(sums(PLAIN), row(&[9.0, 7.0]));
        assert_eq!(sums(Rounds { wraps: false, ..PLAIN }), row(&[9.0, 6.0]));
        assert_eq!(
            sums(Rounds { parts: 2, width: 3, ..PLAIN }),
            row(&[6.0, 3.0, 0.0, 3.0, 4.0, 0.0])
        );
        assert_eq!(sums(Rounds { used: 1, ..PLAIN }), row(&[1.0, 2.0]));
        // A round longer than the row takes it over and over.
        let longer = Rounds { side: 12, used: 1, width: 12, ..PLAIN };
        assert_eq!(sums(longer).narrow(1, 9, 3), row(&[5.0, 1.0, 2.0]));
    }

    #[test]
    fn the_transpose_is_written_or_added() {
        let bias = [10.0f32; 5];
        let put = |rounds, start| {
            let mut long = row(&[100.0; 5]);
            assert!(unfold(rounds, &row(&[1.0, 2.0]), &mut long, start).unwrap());
            long
        };
        assert_eq!(put(PLAIN, Start::Bias(None)), row(&[3.0, 2.0, 1.0, 2.0, 1.0]));
        let without = Rounds { wraps: false, ..PLAIN };
        assert_eq!(put(without, Start::Bias(Some(&bias))), row(&[11.0, 12.0, 11.0, 12.0, 11.0]));
        let first = Rounds { used: 1, ..without };
        assert_eq!(put(first, Start::Add), row(&[101.0, 102.0, 100.0, 100.0, 100.0]));
    }

    #[test]
    fn turning_and_its_transpose_are_adjoint() {
        let random = |n: i64| Tensor::randn([40, n], (Kind::Float, Device::Cpu));
        for (long, side, parts, wraps) in [(37, 6, 3, true), (100, 34, 1, true), (64, 16, 4, false)]
        {
            let count = usize::div_ceil(long, side);
            let angles = Tensor::randn([(count * side / 2) as i64], (Kind::Float, Device::Cpu));
            let (cos, sin) = (angles.cos(), angles.sin());
            let (cos, sin) = (as_slice::<f32>(&cos), as_slice::<f32>(&sin));
            let (width, used) = (side + 3, count);
            let angles = Some(Angles { cos, sin });
            let rounds = Rounds { long, side, used, parts, width, wraps, angles };
            let (x, u) = (random(long as i64), random((parts * width) as i64));
            let mut back = random(long as i64);
            assert!(unfold(rounds, &u, &mut back, Start::Bias(None)).unwrap());
            let z = fold(rounds, &x).unwrap().unwrap();
            let sum = |a: &Tensor, b: &Tensor| {
                (a.to_kind(Kind::Double) * b.to_kind(Kind::Double)).sum(Kind::Double)
            };
            let (left, right) = (sum(&z, &u), sum(&x, &back));
            assert!(f64::try_from((left - right).abs()).unwrap() < 1e-3, "{long} {side}");
        }
    }

    #[test]
    fn bfloat16_is_added_up_in_float32() {
        let long = row(&[256.0, 1.0, 1.0]).to_kind(Kind::BFloat16);
        let rounds = Rounds { long: 3, side: 1, used: 3, width: 1, ..PLAIN };
        let sum = fold(rounds, &long).unwrap().unwrap();
        assert_eq!(sum.to_kind(Kind::Float), row(&[258.0]));
    }

    #[test]
    fn what_is_not_plain_is_not_taken() {
        let long = Tensor::zeros([2, 5], (Kind::Double, Device::Cpu));
        assert!(fold(PLAIN, &long).unwrap().is_none());
    }
}
