//! Which positions of a long vector share a position of a short one, and which block of it a block of outputs
//! takes: numbers only.

use std::ops::Range;

/// Positions of a long and of a short vector, `length` of each, that belong to each other.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Run {
    /// First position of the long vector.
    pub long: i64,
    /// First position of the short vector.
    pub short: i64,
    /// How many.
    pub length: i64,
}

/// Position i of `long` belongs to position i mod `short`.
#[derive(Clone, Debug, PartialEq)]
pub struct Cyclic {
    /// Whole rounds, which lie at the beginning.
    pub rounds: i64,
    /// The last round, where it is not whole.
    pub rest: Option<Run>,
    /// What makes it whole: positions of the long vector from its first on, once more.
    pub wraps: Vec<Run>,
}

impl Cyclic {
    /// Of vectors of these lengths, both 1 or more.
    pub fn of(long: i64, short: i64) -> Self {
        let (rounds, length) = (long / short, long % short);
        let rest = (length > 0).then_some(Run { long: rounds * short, short: 0, length });
        Self {
            rounds,
            rest,
            wraps: if length > 0 { wraps(long, length..short) } else { Vec::new() },
        }
    }
}

/// The positions `missing` of a round, filled from the first of a vector of length `long` on, over and over.
pub fn wraps(long: i64, missing: Range<i64>) -> Vec<Run> {
    let step = usize::try_from(long).unwrap_or(1).max(1);
    missing
        .clone()
        .step_by(step)
        .map(|short| Run { long: 0, short, length: long.min(missing.end - short) })
        .collect()
}

/// Groups of neighbours: the first `larger` of them of `size` positions, the rest of one less.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Neighbours {
    /// Positions of a larger group.
    pub size: i64,
    /// Larger groups.
    pub larger: i64,
    /// Groups of `size - 1`, which may be none.
    pub smaller: i64,
}

impl Neighbours {
    /// `long` positions in `short` groups, 1 or more.
    pub fn of(long: i64, short: i64) -> Self {
        let size = long / short + 1;
        let larger = long - short * (size - 1);
        Self { size, larger, smaller: short - larger }
    }
}

/// The product of some columns of x with a part of the block that turned them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Piece {
    /// The block, of the input's.
    pub block: i64,
    /// Its columns, taken by those of x.
    pub columns: Run,
    /// First column of the output.
    pub out: i64,
    /// Columns of the output: rows of the block.
    pub rows: i64,
}

/// The blocks of type 6.
#[derive(Clone, Debug, PartialEq)]
pub struct Blocks {
    /// Blocks of the input.
    pub count: i64,
    /// Columns that the products give before they are repeated.
    pub period: i64,
    /// The products, those that fill up the last block at the end.
    pub pieces: Vec<Piece>,
}

impl Blocks {
    /// Of `features` inputs and `out` outputs, in blocks of `side`. Input blocks beyond the outputs' go to the
    /// first ones again where `fold`, else nowhere.
    pub fn of(features: i64, out: i64, side: i64, fold: bool) -> Self {
        let whole = |length: i64| (length + side - 1) / side;
        let (count, outs) = (whole(features), whole(out));
        // The outputs that are left are those of the first blocks again.
        let period = if count < outs { count * side } else { out };
        let used = if fold { count } else { count.min(outs) };
        let piece = |block: i64, columns: Run| {
            let to = (block % outs) * side;
            Piece { block, columns, out: to, rows: side.min(period - to) }
        };
        let mut pieces: Vec<_> = (0..used)
            .map(|block| {
                let long = block * side;
                piece(block, Run { long, short: 0, length: side.min(features - long) })
            })
            .collect();
        let last = features - (count - 1) * side;
        if used == count {
            pieces.extend(wraps(features, last..side).into_iter().map(|run| piece(count - 1, run)));
        }
        Self { count, period, pieces }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(long: i64, short: i64, length: i64) -> Run {
        Run { long, short, length }
    }

    #[test]
    fn whole_rounds_need_no_wrap() {
        assert_eq!(Cyclic::of(6, 3), Cyclic { rounds: 2, rest: None, wraps: vec![] });
    }

    #[test]
    fn a_round_that_is_not_whole_is_filled_from_the_beginning() {
        let want = Cyclic { rounds: 2, rest: Some(run(6, 0, 1)), wraps: vec![run(0, 1, 2)] };
        assert_eq!(Cyclic::of(7, 3), want);
    }

    #[test]
    fn a_round_longer_than_the_vector_takes_it_over_and_over() {
        let want =
            Cyclic { rounds: 0, rest: Some(run(0, 0, 2)), wraps: vec![run(0, 2, 2), run(0, 4, 1)] };
        assert_eq!(Cyclic::of(2, 5), want);
    }

    #[test]
    fn groups_of_neighbours_cover_all_positions() {
        for long in 1..40 {
            for short in 1..40 {
                let Neighbours { size, larger, smaller } = Neighbours::of(long, short);
                assert!(larger >= 0 && smaller > 0, "{long} {short}");
                assert_eq!(larger + smaller, short);
                assert_eq!(larger * size + smaller * (size - 1), long);
            }
        }
    }

    #[test]
    fn every_input_is_in_a_product_where_blocks_are_folded() {
        for (features, out) in [(12, 4), (13, 5), (4, 12), (7, 7), (3, 2)] {
            let blocks = Blocks::of(features, out, 4, true);
            let mut seen = vec![0; features as usize];
            for piece in &blocks.pieces {
                assert!(piece.out + piece.rows <= blocks.period);
                for k in piece.columns.long..piece.columns.long + piece.columns.length {
                    seen[k as usize] += 1;
                }
            }
            assert!(seen.iter().all(|&count| count > 0), "{features} {out}");
        }
    }

    #[test]
    fn blocks_beyond_the_outputs_go_nowhere_as_published() {
        let blocks = Blocks::of(12, 4, 4, false);
        let want = Piece { block: 0, columns: run(0, 0, 4), out: 0, rows: 4 };
        assert_eq!(blocks, Blocks { count: 3, period: 4, pieces: vec![want] });
    }

    #[test]
    fn outputs_beyond_the_inputs_repeat_the_first() {
        let blocks = Blocks::of(3, 9, 2, true);
        assert_eq!((blocks.count, blocks.period), (2, 4));
        let wrap = Piece { block: 1, columns: run(0, 1, 1), out: 2, rows: 2 };
        assert_eq!(blocks.pieces[2], wrap);
    }
}
