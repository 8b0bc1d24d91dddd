//! Matrices as slices, where they are plain: on the CPU, contiguous, float32 or float64.

use std::ffi::c_void;
use std::marker::PhantomData;

use tch::{Device, Kind, Tensor};

pub use super::real::Real;
use super::simd::{Bf16, Element};
use crate::errors::Result;

/// A plain matrix.
#[derive(Clone, Copy)]
pub struct Plain<'a> {
    /// float32 or float64.
    pub kind: Kind,
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub columns: usize,
    data: *mut c_void,
    tensor: PhantomData<&'a Tensor>,
}

impl<'a> Plain<'a> {
    /// Of `tensor`, if the loops of this folder can work on it.
    pub fn of(tensor: &'a Tensor) -> Option<Self> {
        let kind = tensor.f_kind().ok()?;
        if !matches!(kind, Kind::Float | Kind::Double)
            || tensor.device() != Device::Cpu
            || !tensor.is_contiguous()
        {
            return None;
        }
        let [rows, columns] = tensor.size()[..] else { return None };
        let (rows, columns) = (rows as usize, columns as usize);
        Some(Self { kind, rows, columns, data: tensor.data_ptr(), tensor: PhantomData })
    }

    /// Has it the type and the shape of `other`?
    pub fn is_like(&self, other: &Plain<'_>) -> bool {
        (self.kind, self.rows, self.columns) == (other.kind, other.rows, other.columns)
    }

    fn count<T: Real>(&self) -> usize {
        if self.kind == T::KIND {
            self.rows * self.columns
        } else {
            0
        }
    }

    /// The elements, row by row; none if they are no `T`.
    pub fn elements<T: Real>(&self) -> &'a [T] {
        let count = self.count::<T>();
        if count == 0 {
            return &[];
        }
        // SAFETY: the tensor is a contiguous CPU tensor of so many elements of type T, borrowed as
        // long as the slice is.
        unsafe { std::slice::from_raw_parts(self.data.cast(), count) }
    }

    /// The elements to write; the caller has found the tensor [`disjoint`] from the others in use.
    pub fn elements_mut<T: Real>(&self) -> &'a mut [T] {
        let count = self.count::<T>();
        if count == 0 {
            return &mut [];
        }
        // SAFETY: as above; nobody else has a slice of the memory.
        unsafe { std::slice::from_raw_parts_mut(self.data.cast(), count) }
    }

    fn span(&self) -> (usize, usize) {
        let first = self.data as usize;
        (first, first + self.rows * self.columns * self.kind.elt_size_in_bytes())
    }
}

/// Does none of `written` share memory with another of them or with one of `read`?
pub fn disjoint<'a>(
    read: impl Iterator<Item = Plain<'a>>,
    written: impl Iterator<Item = Plain<'a>>,
) -> bool {
    let read = read.map(|plain| (plain.span(), false));
    let mut spans: Vec<_> = read.chain(written.map(|plain| (plain.span(), true))).collect();
    spans.retain(|((first, end), _)| first < end);
    spans.sort_unstable_by_key(|((first, _), _)| *first);
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

/// The elements of a contiguous CPU tensor of dtype `E`; none for any other tensor.
pub fn as_slice<E: Element>(tensor: &Tensor) -> &[E] {
    let count = plain_count::<E>(tensor);
    if count == 0 {
        return &[];
    }
    // SAFETY: so many elements of type E lie there, borrowed as long as the slice is.
    unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast(), count) }
}

/// [`as_slice`] to write.
///
/// # Safety
/// Nobody else reads or writes the tensor's memory while the slice lives.
#[allow(clippy::mut_from_ref)]
pub unsafe fn as_slice_mut<E: Element>(tensor: &Tensor) -> &mut [E] {
    let count = plain_count::<E>(tensor);
    if count == 0 {
        return &mut [];
    }
    // SAFETY: so many elements of type E lie there, and nobody else uses them.
    unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast(), count) }
}

/// `tensor` contiguous and of dtype `kind`. Where it is both already, asking libtorch would cost as much as a small
/// loop.
pub fn contiguous(tensor: &Tensor, kind: Kind) -> Result<Tensor> {
    if tensor.f_kind()? == kind && tensor.is_contiguous() {
        return Ok(tensor.shallow_clone());
    }
    Ok(tensor.f_to_kind(kind)?.f_contiguous()?)
}

/// The values of a tensor on the CPU, row by row.
pub fn widened(tensor: &Tensor) -> Result<Vec<f32>> {
    if tensor.f_kind()? == Kind::BFloat16 && tensor.is_contiguous() {
        return Ok(as_slice::<Bf16>(tensor).iter().map(|value| value.widen()).collect());
    }
    Ok(as_slice::<f32>(&contiguous(tensor, Kind::Float)?).to_vec())
}

/// Values, row by row, as a tensor on the CPU of the shape and dtype of `like`.
pub fn rounded(values: &[f32], like: &Tensor) -> Result<Tensor> {
    fn fill<E: Element>(made: &Tensor, values: &[f32]) {
        // SAFETY: it was just made.
        let to = unsafe { as_slice_mut::<E>(made) };
        to.iter_mut().zip(values).for_each(|(to, &value)| *to = E::nearest(value));
    }
    let kind = like.f_kind()?;
    let (size, half) = (like.size(), kind == Kind::BFloat16);
    let made = if half { kind } else { Kind::Float };
    let made = Tensor::f_empty(&size, (made, Device::Cpu))?;
    if half {
        fill::<Bf16>(&made, values);
    } else {
        fill::<f32>(&made, values);
    }
    contiguous(&made, kind)
}

fn plain_count<E: Element>(tensor: &Tensor) -> usize {
    let plain = tensor.device() == Device::Cpu
        && tensor.f_kind().is_ok_and(|kind| kind == E::KIND)
        && tensor.is_contiguous();
    if plain {
        tensor.numel()
    } else {
        0
    }
}

/// Memory that threads write to at disjoint places.
#[derive(Clone, Copy)]
pub struct Out<T>(pub *mut T);
// SAFETY: the loops give each thread places of its own.
unsafe impl<T> Send for Out<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Out<T> {}

impl<T> Out<T> {
    /// The memory `count` elements further on. A method, so that closures capture the whole struct.
    ///
    /// # Safety
    /// It lies in the same allocation.
    pub unsafe fn add(self, count: usize) -> Self {
        // SAFETY: as the caller promises.
        Self(unsafe { self.0.add(count) })
    }

    /// The memory itself.
    pub fn pointer(self) -> *mut T {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_tensors_are_contiguous_on_the_cpu_and_float32_or_float64() {
        let plain = Tensor::from_slice(&[1.0f32, 2.0, 3.0, 4.0]).reshape([2, 2]);
        assert!(Plain::of(&plain.reshape([4])).is_none());
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
        let whole = Tensor::from_slice(&[0.0f32; 8]).reshape([4, 2]);
        let (left, right) = (whole.narrow(0, 0, 2), whole.narrow(0, 2, 2));
        let [whole, left, right] = [&whole, &left, &right].map(|t| Plain::of(t).unwrap());
        let free = |read: &[Plain<'_>], written: &[Plain<'_>]| {
            disjoint(read.iter().copied(), written.iter().copied())
        };
        assert!(free(&[], &[right, left]));
        assert!(free(&[whole, whole, left], &[]));
        assert!(!free(&[whole], &[right]));
        assert!(!free(&[whole], &[left]));
        assert!(!free(&[], &[right, right]));
    }
}
