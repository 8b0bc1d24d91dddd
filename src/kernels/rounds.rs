//! Rows cut into rounds of a short length, each turned or not, and added up, and the transpose, for float32 and
//! bfloat16 on the CPU: the sums are float32 and the large matrix is read or written once.

mod row;

use tch::{Device, Kind, Tensor};

use self::row::{put, widen};
pub use self::row::{Angles, Rounds};
use super::plain::{as_slice, as_slice_mut, Out};
use super::pool;
use super::simd::{on_best, Bf16, Element, Kernel, Simd};
use super::tokens::Start;
use crate::errors::Result;

/// Elements of the long rows below which a second thread costs more than it saves.
const SERIAL: usize = 1 << 15;

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
                        self.rounds.fold::<V>(&mut rows);
                        put::<V, E, false>(rows.short.as_ptr(), None, to, short);
                    }
                    Way::Unfold(start) => {
                        widen::<V, E>(to, &mut rows.short);
                        self.rounds.unfold::<V>(&mut rows);
                        let from = rows.long.as_ptr();
                        match start {
                            Start::Bias(bias) => put::<V, E, false>(from, bias, at, long),
                            Start::Add => put::<V, E, true>(from, None, at, long),
                        }
                    }
                }
            }
        }
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
    assert!(rounds.used >= parts);
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
