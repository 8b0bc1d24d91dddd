//! Sums over groups of neighbours in every row of a matrix, and the transpose, for float32 and bfloat16 on the
//! CPU. libtorch takes some ten times as long, for it reduces so short a dimension an element at a time.

use tch::{Kind, Tensor};

use super::plain::{as_slice, as_slice_mut, Out};
use super::pool;
use super::simd::{Bf16, Element};
use crate::errors::Result;

/// Elements of the long rows below which a second thread costs more than it saves.
const SERIAL: usize = 1 << 15;

/// Groups of a row: the first `larger` of `size` elements each, those after them of one less.
#[derive(Clone, Copy)]
struct Groups {
    larger: usize,
    size: usize,
}

impl Groups {
    fn sum<E: Element>(self, long: &[E], short: &mut [E]) {
        let (larger, smaller) = short.split_at_mut(self.larger);
        let (first, rest) = long.split_at(self.larger * self.size);
        sum_each(first, self.size, larger);
        sum_each(rest, self.size - 1, smaller);
    }

    fn add<E: Element>(self, short: &[E], long: &mut [E]) {
        let (larger, smaller) = short.split_at(self.larger);
        let (first, rest) = long.split_at_mut(self.larger * self.size);
        add_each(larger, self.size, first);
        add_each(smaller, self.size - 1, rest);
    }
}

fn sum_each<E: Element>(long: &[E], size: usize, short: &mut [E]) {
    if size == 0 {
        return short.fill(E::nearest(0.0));
    }
    for (sum, group) in short.iter_mut().zip(long.chunks_exact(size)) {
        *sum = E::nearest(group.iter().map(|value| value.widen()).sum());
    }
}

fn add_each<E: Element>(short: &[E], size: usize, long: &mut [E]) {
    if size == 0 {
        return;
    }
    for (&value, group) in short.iter().zip(long.chunks_exact_mut(size)) {
        for place in group {
            *place = E::nearest(place.widen() + value.widen());
        }
    }
}

/// Can the loops work on these matrices? The first has the kind and the rows of the second.
fn takes(long: &Tensor, short: &Tensor) -> bool {
    let kind = short.kind();
    long.kind() == kind
        && matches!(kind, Kind::Float | Kind::BFloat16)
        && [long, short].iter().all(|t| t.device() == tch::Device::Cpu && t.is_contiguous())
}

/// The sums of the groups of every row of `long` (tokens, long), into `short` (tokens, short), whose memory
/// nobody else has. False if not taken.
///
/// # Panics
/// Where the sizes do not fit together.
pub fn sum(long: &Tensor, larger: i64, size: i64, short: &mut Tensor) -> Result<bool> {
    if !takes(long, short) {
        return Ok(false);
    }
    match short.kind() {
        Kind::Float => each_row::<f32>(long, short, larger, size, Way::Sum),
        _ => each_row::<Bf16>(long, short, larger, size, Way::Sum),
    }
    Ok(true)
}

/// Adds the elements of every row of `short` (tokens, short) to their groups in `long` (tokens, long), whose
/// memory nobody else has. False if not taken.
///
/// # Panics
/// Where the sizes do not fit together.
pub fn add(short: &Tensor, larger: i64, size: i64, long: &mut Tensor) -> Result<bool> {
    if !takes(long, short) {
        return Ok(false);
    }
    match short.kind() {
        Kind::Float => each_row::<f32>(long, short, larger, size, Way::Add),
        _ => each_row::<Bf16>(long, short, larger, size, Way::Add),
    }
    Ok(true)
}

#[derive(Clone, Copy)]
enum Way {
    Sum,
    Add,
}

fn each_row<E: Element>(long: &Tensor, short: &Tensor, larger: i64, size: i64, way: Way) {
    let (tokens, width) = (long.size()[0] as usize, long.size()[1] as usize);
    let side = short.size()[1] as usize;
    let groups = Groups { larger: larger as usize, size: size as usize };
    assert!(short.size()[0] as usize == tokens && groups.larger <= side && groups.size > 0);
    assert!(groups.larger + side * (groups.size - 1) == width);
    if tokens * width == 0 {
        return;
    }
    let from = |tensor: &Tensor| Out(as_slice::<E>(tensor).as_ptr().cast_mut());
    // SAFETY: the callers of this file say that nobody else has the memory of what is written.
    let to = |tensor: &Tensor| Out(unsafe { as_slice_mut::<E>(tensor) }.as_mut_ptr());
    let (long, short) = match way {
        Way::Sum => (from(long), to(short)),
        Way::Add => (to(long), from(short)),
    };
    let wanted = if tokens * width < SERIAL { 1 } else { pool::threads() };
    pool::run(wanted, |thread, threads| {
        for token in pool::part(tokens, 1, thread, threads) {
            // SAFETY: rows of matrices of the sizes checked; a thread has its own, and of what is read there
            // is a shared slice alone.
            unsafe {
                let (long, short) =
                    (long.add(token * width).pointer(), short.add(token * side).pointer());
                match way {
                    Way::Sum => groups.sum(
                        std::slice::from_raw_parts(long, width),
                        std::slice::from_raw_parts_mut(short, side),
                    ),
                    Way::Add => groups.add(
                        std::slice::from_raw_parts(short, side),
                        std::slice::from_raw_parts_mut(long, width),
                    ),
                }
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn groups_of_two_sizes_and_their_transpose() {
        let long = Tensor::from_slice(&[1.0f32, 2.0, 3.0, 4.0, 5.0]).reshape([1, 5]);
        let mut sums = Tensor::zeros([1, 2], (Kind::Float, Device::Cpu));
        assert!(sum(&long, 1, 3, &mut sums).unwrap());
        assert_eq!(sums, Tensor::from_slice(&[6.0f32, 9.0]).reshape([1, 2]));
        let mut back = Tensor::ones([1, 5], (Kind::Float, Device::Cpu));
        assert!(add(&sums, 1, 3, &mut back).unwrap());
        assert_eq!(back, Tensor::from_slice(&[7.0f32, 7.0, 7.0, 10.0, 10.0]).reshape([1, 5]));
    }

    #[test]
    fn groups_without_an_element_have_the_sum_0() {
        let long = Tensor::from_slice(&[3.0f32]).reshape([1, 1]);
        let mut sums = Tensor::ones([1, 3], (Kind::Float, Device::Cpu));
        assert!(sum(&long, 1, 1, &mut sums).unwrap());
        assert_eq!(sums, Tensor::from_slice(&[3.0f32, 0.0, 0.0]).reshape([1, 3]));
    }

    #[test]
    fn bfloat16_is_added_up_in_float32() {
        let long =
            Tensor::from_slice(&[256.0f32, 1.0, 1.0]).to_kind(Kind::BFloat16).reshape([1, 3]);
        let mut sums = Tensor::zeros([1, 1], (Kind::BFloat16, Device::Cpu));
        assert!(sum(&long, 0, 4, &mut sums).unwrap());
        assert_eq!(sums.to_kind(Kind::Float), Tensor::from_slice(&[258.0f32]).reshape([1, 1]));
    }

    #[test]
    fn what_is_not_plain_is_not_taken() {
        let long = Tensor::zeros([2, 4], (Kind::Double, Device::Cpu));
        let mut sums = Tensor::zeros([2, 2], (Kind::Double, Device::Cpu));
        assert!(!sum(&long, 0, 3, &mut sums).unwrap());
    }

    #[test]
    fn many_rows_are_those_of_one_thread() {
        let long = Tensor::randn([300, 333], (Kind::Float, Device::Cpu));
        let mut all = Tensor::zeros([300, 33], (Kind::Float, Device::Cpu));
        sum(&long, 3, 11, &mut all).unwrap();
        for row in [0, 1, 299] {
            let mut one = Tensor::zeros([1, 33], (Kind::Float, Device::Cpu));
            sum(&long.narrow(0, row, 1).contiguous(), 3, 11, &mut one).unwrap();
            assert_eq!(one, all.narrow(0, row, 1));
        }
    }
}
