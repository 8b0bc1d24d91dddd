//! The fixed maps of types 1 to 4 between a long and a short row: sums of positions, and their transposes, which
//! repeat them. Neither is ever a matrix.

use tch::Tensor;

use super::shares::{Cyclic, Neighbours, Run};
use crate::errors::Result;
use crate::kernels::groups;
use crate::kernels::rounds::{self, Rounds};
use crate::ops::base::Start;

/// Which positions of a long row share one of a short row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pattern {
    /// Those at the same place of every round.
    Cyclic,
    /// Neighbours.
    Neighbours,
}

impl Pattern {
    /// The sums of the rows of `long` (tokens, long), contiguous: (tokens, `short`). With `wraps` the last
    /// round is filled from the row's beginning.
    pub fn sum(self, long: &Tensor, short: i64, wraps: bool) -> Result<Tensor> {
        let (tokens, length) = long.size2()?;
        match self {
            Self::Cyclic => {
                if let Some(sum) = rounds::fold(loops(length, short, wraps), long)? {
                    return Ok(sum);
                }
                let Cyclic { rounds, rest, wraps: filled } = Cyclic::of(length, short);
                let mut sum = if rounds > 0 {
                    rounds_of(long, rounds, short)?.f_sum_dim_intlist(
                        [1i64].as_slice(),
                        false,
                        long.kind(),
                    )?
                } else {
                    Tensor::f_zeros([tokens, short], (long.kind(), long.device()))?
                };
                for run in rest.iter().chain(filled.iter().filter(|_| wraps)) {
                    let _ = short_part(&sum, run)?.f_add_(&long_part(long, run)?)?;
                }
                sum = sum.f_contiguous()?;
                Ok(sum)
            }
            Self::Neighbours => {
                let shares = Neighbours::of(length, short);
                let mut sum = Tensor::f_empty([tokens, short], (long.kind(), long.device()))?;
                if groups::sum(long, shares.larger, shares.size, &mut sum)? {
                    return Ok(sum);
                }
                for (groups, to) in groups_of(long, &sum, shares)? {
                    let mut to = to;
                    to.f_copy_(&groups.f_sum_dim_intlist(
                        [2i64].as_slice(),
                        false,
                        long.kind(),
                    )?)?;
                }
                Ok(sum)
            }
        }
    }

    /// The transpose: puts the positions of the rows of `short` (tokens, short) into all of `long` (tokens,
    /// long), contiguous, that share them; `start` is what that holds.
    pub fn put(
        self,
        short: &Tensor,
        long: &mut Tensor,
        start: Start<'_>,
        wraps: bool,
    ) -> Result<()> {
        let (side, length) = (short.size2()?.1, long.size2()?.1);
        if self == Self::Cyclic {
            let (rounds, bias) = (loops(length, side, wraps), start.bias()?);
            if rounds::unfold(rounds, short, long, start.of_loops(bias.as_deref()))? {
                return Ok(());
            }
        }
        start.write(long)?;
        match self {
            Self::Cyclic => {
                let Cyclic { rounds, rest, wraps: filled } = Cyclic::of(length, side);
                if rounds > 0 {
                    let _ = rounds_of(long, rounds, side)?.f_add_(&short.f_unsqueeze(1)?)?;
                }
                for run in rest.iter().chain(filled.iter().filter(|_| wraps)) {
                    let _ = long_part(long, run)?.f_add_(&short_part(short, run)?)?;
                }
                Ok(())
            }
            Self::Neighbours => {
                let shares = Neighbours::of(length, side);
                if groups::add(short, shares.larger, shares.size, long)? {
                    return Ok(());
                }
                for (mut groups, from) in groups_of(long, short, shares)? {
                    let _ = groups.f_add_(&from.f_unsqueeze(2)?)?;
                }
                Ok(())
            }
        }
    }
}

/// The cyclic pattern for the loops.
fn loops(long: i64, short: i64, wraps: bool) -> Rounds<'static> {
    let (long, side) = (long as usize, short as usize);
    let used = long.div_ceil(side);
    Rounds { long, side, used, parts: 1, width: side, wraps, angles: None }
}

/// The whole rounds at the beginning of the rows, (tokens, rounds, short): a view.
fn rounds_of(long: &Tensor, rounds: i64, short: i64) -> Result<Tensor> {
    let tokens = long.size2()?.0;
    Ok(long.f_narrow(1, 0, rounds * short)?.f_view([tokens, rounds, short])?)
}

fn long_part(long: &Tensor, run: &Run) -> Result<Tensor> {
    Ok(long.f_narrow(1, run.long, run.length)?)
}

fn short_part(short: &Tensor, run: &Run) -> Result<Tensor> {
    Ok(short.f_narrow(1, run.short, run.length)?)
}

/// The larger and the smaller groups of the rows, (tokens, groups, size), each with its positions of `short`:
/// views.
fn groups_of(long: &Tensor, short: &Tensor, shares: Neighbours) -> Result<[(Tensor, Tensor); 2]> {
    let tokens = long.size2()?.0;
    let Neighbours { size, larger, smaller } = shares;
    let part = |from: i64, groups: i64, size: i64, first: i64| -> Result<(Tensor, Tensor)> {
        let long = long.f_narrow(1, from, groups * size)?.f_view([tokens, groups, size])?;
        Ok((long, short.f_narrow(1, first, groups)?))
    };
    Ok([part(0, larger, size, 0)?, part(larger * size, smaller, size - 1, larger)?])
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    fn row(values: &[f64]) -> Tensor {
        Tensor::from_slice(values).reshape([1, -1])
    }

    #[test]
    fn sums_of_both_patterns() {
        let long = row(&[1.0, 2.0, 3.0, 4.0, 5.0]);
        let sum = |pattern: Pattern, wraps| pattern.sum(&long, 2, wraps).unwrap();
        assert_eq!(sum(Pattern::Cyclic, false), row(&[9.0, 6.0]));
        // The first position fills the last round.
        assert_eq!(sum(Pattern::Cyclic, true), row(&[9.0, 7.0]));
        assert_eq!(sum(Pattern::Neighbours, false), row(&[6.0, 9.0]));
    }

    #[test]
    fn the_transpose_of_both_patterns() {
        let added = |pattern: Pattern| {
            let mut long = row(&[100.0; 5]);
            pattern.put(&row(&[1.0, 2.0]), &mut long, Start::Add, false).unwrap();
            long
        };
        assert_eq!(added(Pattern::Cyclic), row(&[101.0, 102.0, 101.0, 102.0, 101.0]));
        assert_eq!(added(Pattern::Neighbours), row(&[101.0, 101.0, 101.0, 102.0, 102.0]));
    }

    #[test]
    fn the_loops_of_rounds_give_what_libtorch_does() {
        for (length, short, wraps) in [(7, 3, true), (768, 111, true), (5, 9, true), (30, 4, false)]
        {
            let random = |columns| Tensor::randn([3, columns], (Kind::Double, Device::Cpu));
            let (long, short_rows, bias) = (random(length), random(short), random(length).get(0));
            let both = |kind: Kind| {
                let [long, rows, bias] = [&long, &short_rows, &bias].map(|t| t.to_kind(kind));
                let mut put = Tensor::full([3, length], f64::NAN, (kind, Device::Cpu));
                Pattern::Cyclic.put(&rows, &mut put, Start::Bias(Some(&bias)), wraps).unwrap();
                [Pattern::Cyclic.sum(&long, short, wraps).unwrap(), put]
                    .map(|t| t.to_kind(Kind::Double))
            };
            for (by_loops, by_torch) in both(Kind::Float).iter().zip(both(Kind::Double)) {
                assert!(by_loops.allclose(&by_torch, 1e-5, 1e-5, false), "{length} {short}");
            }
        }
    }

    #[test]
    fn loops_and_libtorch_give_the_same_groups() {
        for (length, short) in [(7, 3), (768, 111), (5, 9), (12, 4)] {
            let long = Tensor::randn([3, length], (Kind::Double, Device::Cpu));
            // Strides of two rows, which the loops do not take.
            let apart = long.repeat([1, 2]).narrow(1, 0, length);
            let by_loops = Pattern::Neighbours.sum(&long, short, false).unwrap();
            let by_torch = Pattern::Neighbours.sum(&apart, short, false).unwrap();
            assert!(by_loops.allclose(&by_torch, 1e-12, 1e-12, false), "{length} {short}");
        }
    }
}
