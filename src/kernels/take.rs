//! One long vector taken into another: added to it, and set to 0, in one pass over memory.

use super::plain::{Plain, Real};
use super::split::split;

/// Numbers that a thread takes at once.
const BLOCK: usize = 1 << 16;

/// Are all numbers finite?
// A number less itself is 0 unless it is not finite.
#[allow(clippy::eq_op)]
pub fn is_finite<T: Real>(vector: &Plain<'_>) -> bool {
    let blocks = vector.elements::<T>().chunks(BLOCK);
    let mut blocks: Vec<_> = blocks.map(|block| (block, true)).collect();
    let look = |(block, finite): &mut (&[T], bool)| {
        // Without a branch, so that it is done in vectors.
        let bad = |bad, &value: &T| bad | u32::from(value - value != T::default());
        *finite = block.iter().fold(0, bad) == 0;
    };
    split(&mut blocks, |(block, _)| block.len() / 8, |part| part.iter_mut().for_each(look));
    blocks.iter().all(|&(_, finite)| finite)
}

/// `sum += step`, `step = 0`, of one length and type.
pub fn take<T: Real>(step: &Plain<'_>, sum: &Plain<'_>) {
    let (step, sum) = (step.elements_mut::<T>(), sum.elements_mut::<T>());
    let mut blocks: Vec<_> = step.chunks_mut(BLOCK).zip(sum.chunks_mut(BLOCK)).collect();
    let one = |(step, sum): &mut (&mut [T], &mut [T])| {
        for (step, sum) in step.iter_mut().zip(sum.iter_mut()) {
            *sum += *step;
            *step = T::default();
        }
    };
    split(&mut blocks, |(step, _)| step.len() / 4, |part| part.iter_mut().for_each(one));
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Tensor;

    #[test]
    fn all_of_a_long_vector_is_looked_at_and_taken() {
        let count = 3 * BLOCK as i64 + 7;
        let ones = || Tensor::ones([1, count], (tch::Kind::Float, tch::Device::Cpu));
        for place in [0, count / 2, count - 1] {
            for value in [f64::NAN, f64::NEG_INFINITY] {
                let vector = ones();
                let _ = vector.narrow(1, place, 1).fill_(value);
                assert!(!is_finite::<f32>(&Plain::of(&vector).unwrap()));
            }
        }
        let (step, sum) = (ones(), ones());
        let plain = [&step, &sum].map(|vector| Plain::of(vector).unwrap());
        assert!(is_finite::<f32>(&plain[0]));
        take::<f32>(&plain[0], &plain[1]);
        assert_eq!((step, sum), (ones() * 0.0, ones() * 2.0));
    }
}
