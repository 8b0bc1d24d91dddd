//! Dropout masks: 16 random bits an element, kept as one packed bit an element where they are kept at
//! all. A mask depends on the seed, the offset and the position only, so that the backward pass draws
//! it again.

use tch::{Device, Kind, Tensor};

use super::philox::LANES;
use super::plain::Out;
use super::pool;
use super::simd::{load_at, on_best, store_at, Bf16, Element, Kernel, Simd};
use crate::errors::{Error, Result};

/// Elements that one group of counters decides: 8 of 16 bits a counter.
pub const GROUP: usize = LANES * 8;
/// Elements below which a second thread costs more than it saves.
const SERIAL: usize = 1 << 15;

/// The random numbers of one mask.
#[derive(Clone, Copy, Debug)]
pub struct Stream {
    seed: u64,
    offset: u64,
    threshold: u32,
}

impl Stream {
    /// The mask for dropout probability `p`; `offset` is the first counter.
    pub fn new(p: f64, seed: u64, offset: u64) -> Self {
        Self { seed, offset, threshold: ((1.0 - p) * 65536.0).round() as u32 }
    }

    /// Key of the generator.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// First counter of the generator.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// An element is kept where its 16 bits are below it.
    pub fn threshold(&self) -> u32 {
        self.threshold
    }

    /// Probability with which an element is really kept (16 bits fine).
    pub fn keep_probability(&self) -> f64 {
        f64::from(self.threshold) / 65536.0
    }

    /// The packed bits of the elements from `first_group * GROUP` on: bit i is set where element i is
    /// kept. Element 32 w + 16 h + l of a group takes half h of word w of the group's counter l.
    ///
    /// # Safety
    /// The processor has the instructions of `V`.
    #[inline(always)]
    pub unsafe fn fill<V: Simd>(&self, bytes: &mut [u8], first_group: usize) {
        for (group, out) in bytes.chunks_mut(GROUP / 8).enumerate() {
            let first = ((first_group + group) * LANES) as u64;
            // SAFETY: as the caller promises.
            let halves = unsafe {
                V::keep_group(self.seed, self.offset.wrapping_add(first), self.threshold)
            };
            let mut bits = [0u8; GROUP / 8];
            for (pair, half) in bits.chunks_exact_mut(2).zip(halves) {
                pair.copy_from_slice(&half.to_le_bytes());
            }
            out.copy_from_slice(&bits[..out.len()]);
        }
    }
}

struct Fill {
    stream: Stream,
    out: Out<u8>,
    bytes: usize,
}

impl Kernel for Fill {
    type Output = ();
    #[inline(always)]
    unsafe fn run<V: Simd>(&self) {
        // SAFETY: one thread's part of the bytes, which no other has.
        let out = unsafe { std::slice::from_raw_parts_mut(self.out.pointer(), self.bytes) };
        // SAFETY: as the caller promises.
        unsafe { self.stream.fill::<V>(out, 0) };
    }
}

struct Zero<T> {
    values: Out<u8>,
    bits: *const u8,
    count: usize,
    zero: T,
}

impl<T: Copy> Kernel for Zero<T> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<V: Simd>(&self) {
        // SAFETY: one thread's part of the values, and the bits of the same elements.
        let (values, bits) = unsafe {
            (
                std::slice::from_raw_parts_mut(self.values.pointer().cast::<T>(), self.count),
                std::slice::from_raw_parts(self.bits, self.count.div_ceil(8)),
            )
        };
        for (chunk, byte) in values.chunks_mut(8).zip(bits) {
            for (i, value) in chunk.iter_mut().enumerate() {
                if byte >> i & 1 == 0 {
                    *value = self.zero;
                }
            }
        }
    }
}

/// [`Zero`] for the elements that vectors load and store.
struct ZeroVectors<E> {
    values: Out<E>,
    bits: *const u8,
    count: usize,
}

impl<E: Element> Kernel for ZeroVectors<E> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<V: Simd>(&self) {
        let mut first = 0;
        while first < self.count {
            let count = V::LANES.min(self.count - first);
            // SAFETY: values and bits as for `Zero`; so many elements are left, whose bits begin a byte.
            unsafe {
                let place = self.values.add(first).pointer();
                let mut bits = 0;
                for byte in 0..count.div_ceil(8) {
                    bits |= u32::from(*self.bits.add(first / 8 + byte)) << (8 * byte);
                }
                let value: V = load_at(place.cast_const(), count);
                store_at(value.keep(bits), place, count);
            }
            first += count;
        }
    }
}

fn workers(elements: usize) -> usize {
    if elements < SERIAL {
        1
    } else {
        pool::threads()
    }
}

/// Packed mask of `elements` elements: uint8 of ceil(elements / 8) on the CPU.
pub fn draw(elements: usize, stream: &Stream) -> Result<Tensor> {
    let bytes = elements.div_ceil(8);
    let mask = Tensor::f_empty([bytes as i64], (Kind::Uint8, Device::Cpu))?;
    let data = Out::<u8>(mask.data_ptr().cast());
    pool::run(workers(elements), |thread, threads| {
        let part = pool::part(bytes, GROUP / 8, thread, threads);
        if part.is_empty() {
            return;
        }
        let first = (part.start / (GROUP / 8) * LANES) as u64;
        let stream = Stream { offset: stream.offset.wrapping_add(first), ..*stream };
        // SAFETY: the tensor was just made: contiguous, `bytes` bytes long, known to nobody else.
        let out = unsafe { data.add(part.start) };
        on_best(&Fill { stream, out, bytes: part.len() });
    });
    Ok(mask)
}

/// Sets to zero, in place, the elements of the contiguous CPU tensor `values` that `mask` drops.
pub fn zero_(values: &mut Tensor, mask: &Tensor) -> Result<()> {
    let n = values.numel();
    if n == 0 {
        return Ok(());
    }
    if !values.is_contiguous() || values.device() != Device::Cpu || mask.numel() != n.div_ceil(8) {
        return Err(Error::Value(format!(
            "mask has {} bytes for {n} elements of a tensor of shape {:?}; it must be the packed mask \
             of a contiguous CPU tensor",
            mask.numel(),
            values.size()
        )));
    }
    let kind = values.kind();
    let width = kind.elt_size_in_bytes();
    let (data, bits) = (Out::<u8>(values.data_ptr().cast()), Out::<u8>(mask.data_ptr().cast()));
    pool::run(workers(n), |thread, threads| {
        let part = pool::part(n, GROUP, thread, threads);
        if part.is_empty() {
            return;
        }
        // SAFETY: both tensors are contiguous CPU tensors of the checked lengths, an element is as
        // wide as the integer chosen for it, and all-zero bits are 0 in every floating-point dtype.
        let (values, bits, count) = unsafe {
            (data.add(part.start * width), bits.add(part.start / 8).pointer(), part.len())
        };
        match (kind, width) {
            (Kind::BFloat16, _) => {
                on_best(&ZeroVectors::<Bf16> { values: Out(values.pointer().cast()), bits, count });
            }
            (_, 2) => on_best(&Zero { values, bits, count, zero: 0u16 }),
            (_, 4) => {
                on_best(&ZeroVectors::<f32> { values: Out(values.pointer().cast()), bits, count });
            }
            _ => on_best(&Zero { values, bits, count, zero: 0u64 }),
        }
    });
    Ok(())
}

/// `x` with zeros where the packed `mask` drops it, contiguous.
pub fn applied(x: &Tensor, mask: &Tensor) -> Result<Tensor> {
    let mut dropped = x.f_empty_like()?.f_contiguous()?;
    dropped.f_copy_(x)?;
    zero_(&mut dropped, mask)?;
    Ok(dropped)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::simd::{Isa, Portable};

    fn fill(stream: &Stream, bytes: &mut [u8], first_group: usize) {
        // SAFETY: portable code runs everywhere.
        unsafe { stream.fill::<Portable>(bytes, first_group) }
    }

    #[test]
    fn all_instructions_draw_and_apply_one_mask() {
        let stream = Stream::new(0.3, 42, 5);
        for n in [1, 7, 8, 127, 128, 129, 1000] {
            let mut want = vec![0u8; n];
            fill(&stream, &mut want, 0);
            for isa in Isa::available() {
                let mut bytes = vec![0u8; n];
                isa.run(&Fill { stream, out: Out::<u8>(bytes.as_mut_ptr()), bytes: n });
                assert_eq!(bytes, want, "{isa:?}");
                let mut values = vec![7u16; 8 * n - 3];
                let count = values.len();
                let data = Out::<u8>(values.as_mut_ptr().cast());
                isa.run(&Zero { values: data, bits: bytes.as_ptr(), count, zero: 0u16 });
                let mut floats = vec![7.0f32; count];
                let mut halves = vec![Bf16(7); count];
                let (float, half) = (Out(floats.as_mut_ptr()), Out(halves.as_mut_ptr()));
                isa.run(&ZeroVectors { values: float, bits: bytes.as_ptr(), count });
                isa.run(&ZeroVectors { values: half, bits: bytes.as_ptr(), count });
                for (i, value) in values.iter().enumerate() {
                    let kept = want[i / 8] >> (i % 8) & 1 == 1;
                    assert_eq!(*value == 7, kept, "{isa:?}");
                    assert_eq!(floats[i] == 7.0, kept, "{isa:?}");
                    assert_eq!(halves[i] == Bf16(7), kept, "{isa:?}");
                }
            }
        }
    }

    #[test]
    fn the_mask_is_the_same_at_any_number_of_threads_and_from_any_group_on() {
        let stream = Stream::new(0.1, 9, u64::MAX - 3);
        let elements = 3 * SERIAL + 77;
        let mask: Vec<u8> = draw(elements, &stream).unwrap().try_into().unwrap();
        let mut want = vec![0u8; elements.div_ceil(8)];
        fill(&stream, &mut want, 0);
        assert_eq!(mask, want);
        let mut later = vec![0u8; 64];
        fill(&stream, &mut later, 3);
        assert_eq!(later, want[3 * GROUP / 8..][..64]);
    }

    #[test]
    fn the_kept_share_is_one_minus_p() {
        for p in [0.0, 0.1, 0.5, 0.9, 1.0] {
            let mut bits = vec![0u8; 1 << 17];
            fill(&Stream::new(p, 7, 0), &mut bits, 0);
            let kept: u32 = bits.iter().map(|b| b.count_ones()).sum();
            let share = f64::from(kept) / (8.0 * bits.len() as f64);
            assert!((share - (1.0 - p)).abs() < 2e-3, "p {p}: kept {share}");
        }
    }
}
