//! Tensors as slices, where they are plain: on the CPU, contiguous, float32 or float64.

use std::ffi::c_void;
use std::marker::PhantomData;

use tch::{Device, Kind, Tensor};

pub use super::real::Real;

/// The memory of a plain tensor.
#[derive(Clone, Copy)]
pub struct Plain<'a> {
    /// float32 or float64.
    pub kind: Kind,
    /// Number of elements.
    pub count: usize,
    data: *mut c_void,
    tensor: PhantomData<&'a Tensor>,
}

impl<'a> Plain<'a> {
    /// Of `tensor`, if the loops of this folder can work on it.
    pub fn of(tensor: &'a Tensor) -> Option<Self> {
        let kind = tensor.f_kind().ok()?;
        let plain = matches!(kind, Kind::Float | Kind::Double)
            && tensor.device() == Device::Cpu
            && tensor.is_contiguous();
        let (data, count) = (tensor.data_ptr(), tensor.numel());
        plain.then_some(Self { kind, data, count, tensor: PhantomData })
    }

    /// The elements, row by row; none if they are no `T`.
    pub fn elements<T: Real>(&self) -> &'a [T] {
        if self.kind != T::KIND || self.count == 0 {
            return &[];
        }
        // SAFETY: the tensor is a contiguous CPU tensor of so many elements of type T, borrowed as
        // long as the slice is.
        unsafe { std::slice::from_raw_parts(self.data.cast(), self.count) }
    }

    /// The elements to write; the caller has found the tensor [`disjoint`] from the others in use.
    pub fn elements_mut<T: Real>(&self) -> &'a mut [T] {
        if self.kind != T::KIND || self.count == 0 {
            return &mut [];
        }
        // SAFETY: as above; nobody else has a slice of the memory.
        unsafe { std::slice::from_raw_parts_mut(self.data.cast(), self.count) }
    }

    fn span(&self) -> (usize, usize) {
        let first = self.data as usize;
        (first, first + self.count * self.kind.elt_size_in_bytes())
    }
}

/// Does none that is written to (the flag) share memory with another?
pub fn disjoint(tensors: Vec<(Plain<'_>, bool)>) -> bool {
    let mut spans: Vec<_> =
        tensors.into_iter().map(|(plain, written)| (plain.span(), written)).collect();
    spans.retain(|((first, end), _)| first < end);
    spans.sort_unstable();
    let (mut last, mut last_written) = (0, 0);
    spans.iter().all(|&((first, end), written)| {
        let free = first >= if written { last } else { last_written };
        last = last.max(end);
        if written {
            last_written = last_written.max(end);
        }
        free
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_tensors_are_contiguous_on_the_cpu_and_float32_or_float64() {
        let plain = Tensor::from_slice(&[1.0f32, 2.0, 3.0, 4.0]).reshape([2, 2]);
        assert_eq!(Plain::of(&plain).unwrap().elements::<f32>(), [1.0, 2.0, 3.0, 4.0]);
        assert!(Plain::of(&plain).unwrap().elements::<f64>().is_empty());
        assert!(Plain::of(&plain.tr()).is_none());
        assert!(Plain::of(&plain.to_kind(Kind::BFloat16)).is_none());
        assert_eq!(Plain::of(&plain.to_kind(Kind::Double)).unwrap().kind, Kind::Double);
    }

    #[test]
    fn an_empty_tensor_has_no_elements() {
        let empty = Tensor::zeros([0, 5], (Kind::Float, Device::Cpu));
        assert!(Plain::of(&empty).unwrap().elements_mut::<f32>().is_empty());
    }

    #[test]
    fn what_is_read_may_be_shared_but_not_what_is_written() {
        let whole = Tensor::from_slice(&[0.0f32; 8]);
        let (left, right) = (whole.narrow(0, 0, 4), whole.narrow(0, 4, 4));
        let [whole, left, right] = [&whole, &left, &right].map(|t| Plain::of(t).unwrap());
        assert!(disjoint(vec![(right, true), (left, true)]));
        assert!(disjoint(vec![(whole, false), (whole, false), (left, false)]));
        assert!(!disjoint(vec![(whole, false), (right, true)]));
        assert!(!disjoint(vec![(left, true), (whole, false)]));
        assert!(!disjoint(vec![(right, true), (right, true)]));
    }
}
