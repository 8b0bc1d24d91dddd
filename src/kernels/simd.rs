//! Vectors of float32 for the loops over tokens, for AVX-512, AVX2 and any processor, and the dtypes
//! that they load from and store to. The arithmetic is float32 whatever the dtype.

// The safety contract is one for all methods, and stands at the traits.
#![allow(clippy::missing_safety_doc)]

use std::sync::OnceLock;

use tch::Kind;

use super::philox::philox;

/// Bytes of a line of the cache.
pub const LINE: usize = 64;
/// Most lanes of any [`Simd`].
pub const MAX_LANES: usize = 16;

/// A few float32 that are worked on at once.
///
/// # Safety
/// Methods may be called on a processor with the instructions of the type only; [`on_best`] sees to it,
/// and with pointers to as many elements as they say.
pub unsafe trait Simd: Copy {
    /// How many.
    const LANES: usize;
    /// Rows of the small factor worked on at once: as many as the registers hold.
    const ROWS: usize;
    /// All lanes the same.
    unsafe fn splat(value: f32) -> Self;
    /// `LANES` float32 at `from`.
    unsafe fn load(from: *const f32) -> Self;
    /// Writes `LANES` float32 at `to`.
    unsafe fn store(self, to: *mut f32);
    /// `LANES` bfloat16 at `from`.
    unsafe fn load_bf16(from: *const u16) -> Self;
    /// Writes `LANES` bfloat16 at `to`, rounded to the nearest, ties to even.
    unsafe fn store_bf16(self, to: *mut u16);
    /// `self * factor + term`.
    unsafe fn fma(self, factor: Self, term: Self) -> Self;
    /// `|self|`.
    unsafe fn abs(self) -> Self;
    /// Zero in the lanes whose bit is not set.
    unsafe fn keep(self, bits: u32) -> Self;
    /// Sum of the lanes.
    unsafe fn sum(self) -> f32;

    /// Asks for the memory at `place`, which need not be there, ahead of its use.
    #[inline(always)]
    unsafe fn prefetch(_place: *const u8) {}

    /// Adds the sum of the lanes of each to a value of its own at `to`.
    #[inline(always)]
    unsafe fn add_sums<const N: usize>(values: &[Self; N], to: *mut f32) {
        // SAFETY: as the caller promises.
        unsafe { add_each_sum(values, to) };
    }

    /// Transposes 16 x 16 elements of 16 bits: rows `stride` apart at `from`, columns `to_stride` at `to`.
    #[inline(always)]
    unsafe fn transpose_16x16(from: *const u16, stride: usize, to: *mut u16, to_stride: usize) {
        // SAFETY: as the caller promises.
        unsafe {
            for row in 0..16 {
                for column in 0..16 {
                    *to.add(column * to_stride + row) = *from.add(row * stride + column);
                }
            }
        }
    }

    /// Which of 128 random 16-bit numbers are below `threshold`: bit l of `[2 w + h]` is of half h of
    /// word w of the counter `first + l` under the key `seed`.
    #[inline(always)]
    unsafe fn keep_group(seed: u64, first: u64, threshold: u32) -> [u16; 8] {
        let words = philox(seed, first);
        let mut kept = [0u16; 8];
        for (w, word) in words.iter().enumerate() {
            for half in 0..2 {
                for (l, v) in word.iter().enumerate() {
                    kept[2 * w + half] |= u16::from((v >> (16 * half)) & 0xFFFF < threshold) << l;
                }
            }
        }
        kept
    }
}

/// [`Simd::add_sums`], a vector after the other.
///
/// # Safety
/// As for the method.
#[inline(always)]
unsafe fn add_each_sum<V: Simd, const N: usize>(values: &[V; N], to: *mut f32) {
    for (n, value) in values.iter().enumerate() {
        // SAFETY: as the caller promises.
        unsafe { *to.add(n) += value.sum() };
    }
}

/// A dtype of the loops.
///
/// # Safety
/// `KIND` must be torch's name of the type's layout. As for [`Simd`], the methods may be called where
/// the processor has the instructions of `V`, with pointers to as many elements as they say.
pub unsafe trait Element: Copy + Send + Sync + 'static {
    /// torch's name of it.
    const KIND: Kind;
    /// The same value as float32.
    fn widen(self) -> f32;
    /// The nearest value.
    fn nearest(value: f32) -> Self;
    /// `V::LANES` elements at `from`.
    unsafe fn load<V: Simd>(from: *const Self) -> V;
    /// Writes `V::LANES` elements at `to`.
    unsafe fn store<V: Simd>(value: V, to: *mut Self);

    /// The `count` elements at `from`, zeros after them.
    #[inline(always)]
    unsafe fn load_some<V: Simd>(from: *const Self, count: usize) -> V {
        let mut lanes = [0.0f32; MAX_LANES];
        for (l, lane) in lanes.iter_mut().enumerate().take(count) {
            // SAFETY: the caller promises `count` elements.
            *lane = unsafe { *from.add(l) }.widen();
        }
        // SAFETY: `lanes` has room for every Simd.
        unsafe { V::load(lanes.as_ptr()) }
    }

    /// Writes the first `count` lanes at `to`.
    #[inline(always)]
    unsafe fn store_some<V: Simd>(value: V, to: *mut Self, count: usize) {
        let mut lanes = [0.0f32; MAX_LANES];
        // SAFETY: `lanes` has room for every Simd; the caller promises `count` elements at `to`.
        unsafe {
            value.store(lanes.as_mut_ptr());
            for (l, &lane) in lanes.iter().enumerate().take(count) {
                *to.add(l) = Self::nearest(lane);
            }
        }
    }
}

// SAFETY: torch's Float is IEEE binary32.
unsafe impl Element for f32 {
    const KIND: Kind = Kind::Float;
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
    #[inline(always)]
    fn nearest(value: f32) -> Self {
        value
    }
    #[inline(always)]
    unsafe fn load<V: Simd>(from: *const Self) -> V {
        unsafe { V::load(from) }
    }
    #[inline(always)]
    unsafe fn store<V: Simd>(value: V, to: *mut Self) {
        unsafe { value.store(to) }
    }
}

/// bfloat16: the upper half of a float32.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(transparent)]
pub struct Bf16(pub u16);

// SAFETY: torch's BFloat16 is the upper half of IEEE binary32.
unsafe impl Element for Bf16 {
    const KIND: Kind = Kind::BFloat16;
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }
    #[inline(always)]
    fn nearest(value: f32) -> Self {
        let bits = value.to_bits();
        if value.is_nan() {
            return Self(0x7FC0);
        }
        Self((bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16) as u16)
    }
    #[inline(always)]
    unsafe fn load<V: Simd>(from: *const Self) -> V {
        unsafe { V::load_bf16(from.cast()) }
    }
    #[inline(always)]
    unsafe fn store<V: Simd>(value: V, to: *mut Self) {
        unsafe { value.store_bf16(to.cast()) }
    }
}

/// Eight lanes without any special instruction.
#[derive(Clone, Copy)]
pub struct Portable([f32; 8]);

// SAFETY: uses no special instruction; pointers as the caller promises.
unsafe impl Simd for Portable {
    const LANES: usize = 8;
    const ROWS: usize = 4;
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Self([value; 8])
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        Self(unsafe { from.cast::<[f32; 8]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe { to.cast::<[f32; 8]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        let halves = unsafe { from.cast::<[u16; 8]>().read_unaligned() };
        Self(halves.map(|half| f32::from_bits(u32::from(half) << 16)))
    }
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16) {
        let halves = self.0.map(|value| Bf16::nearest(value).0);
        unsafe { to.cast::<[u16; 8]>().write_unaligned(halves) }
    }
    #[inline(always)]
    unsafe fn fma(self, factor: Self, term: Self) -> Self {
        Self(std::array::from_fn(|l| self.0[l] * factor.0[l] + term.0[l]))
    }
    #[inline(always)]
    unsafe fn abs(self) -> Self {
        Self(self.0.map(f32::abs))
    }
    #[inline(always)]
    unsafe fn keep(self, bits: u32) -> Self {
        Self(std::array::from_fn(|l| if bits >> l & 1 == 1 { self.0[l] } else { 0.0 }))
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        let v = self.0;
        ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]))
    }
}

#[cfg(target_arch = "x86_64")]
pub mod x86;

/// `count` values at `from`, all of a vector's or fewer, then zeros.
///
/// # Safety
/// There are so many; the processor has the instructions of `V`.
#[inline(always)]
pub unsafe fn load_at<V: Simd, E: Element>(from: *const E, count: usize) -> V {
    // SAFETY: as the caller promises.
    unsafe {
        if count == V::LANES {
            E::load(from)
        } else {
            E::load_some(from, count)
        }
    }
}

/// `count` values to `to`.
///
/// # Safety
/// As for [`load_at`].
#[inline(always)]
pub unsafe fn store_at<V: Simd, E: Element>(value: V, to: *mut E, count: usize) {
    // SAFETY: as the caller promises.
    unsafe {
        if count == V::LANES {
            E::store(value, to);
        } else {
            E::store_some(value, to, count);
        }
    }
}

/// What can be run with any vector.
pub trait Kernel {
    /// What it gives.
    type Output;
    /// Runs it.
    ///
    /// # Safety
    /// The processor has the instructions of `V`.
    unsafe fn run<V: Simd>(&self) -> Self::Output;
}

/// Instructions to choose from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Isa {
    /// AVX-512 F, BW, DQ, VL.
    Avx512,
    /// AVX2 and FMA.
    Avx2,
    /// No special ones.
    Portable,
}

impl Isa {
    /// Those that this processor has, the best first.
    pub fn available() -> impl Iterator<Item = Self> {
        [Self::Avx512, Self::Avx2, Self::Portable].into_iter().filter(|isa| isa.present())
    }

    /// The best of this processor, and of what torch's own switch allows: `ATEN_CPU_CAPABILITY`, read once.
    pub fn best() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| Self::allowed(std::env::var("ATEN_CPU_CAPABILITY").ok().as_deref()))
    }

    /// The best of this processor under a value of the switch; torch ignores those that it does not know.
    fn allowed(switch: Option<&str>) -> Self {
        let mut found = Self::available().filter(|isa| match switch {
            Some("default") => *isa == Self::Portable,
            Some("avx2") => *isa != Self::Avx512,
            _ => true,
        });
        found.next().unwrap_or(Self::Portable)
    }

    #[cfg(target_arch = "x86_64")]
    fn present(self) -> bool {
        match self {
            // Code for AVX-512 is compiled for AVX2 and FMA too.
            Self::Avx512 => {
                Self::Avx2.present()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            Self::Portable => true,
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn present(self) -> bool {
        self == Self::Portable
    }

    /// Runs `kernel` with these instructions; with portable ones where the processor lacks them.
    pub fn run<K: Kernel>(self, kernel: &K) -> K::Output {
        #[cfg(target_arch = "x86_64")]
        {
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
            unsafe fn avx512<K: Kernel>(kernel: &K) -> K::Output {
                unsafe { kernel.run::<x86::Avx512>() }
            }
            #[target_feature(enable = "avx2,fma")]
            unsafe fn avx2<K: Kernel>(kernel: &K) -> K::Output {
                unsafe { kernel.run::<x86::Avx2>() }
            }
            match self {
                // SAFETY: the processor has every feature that the function is compiled for.
                Self::Avx512 if self.present() => return unsafe { avx512(kernel) },
                // SAFETY: as above.
                Self::Avx2 if self.present() => return unsafe { avx2(kernel) },
                _ => {}
            }
        }
        // SAFETY: portable code runs everywhere.
        unsafe { kernel.run::<Portable>() }
    }
}

/// Runs `kernel` with [`Isa::best`].
pub fn on_best<K: Kernel>(kernel: &K) -> K::Output {
    Isa::best().run(kernel)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct RoundTrip<'a>(&'a [f32], bool);

    impl Kernel for RoundTrip<'_> {
        type Output = Vec<u32>;
        #[inline(always)]
        unsafe fn run<V: Simd>(&self) -> Vec<u32> {
            let mut out = Vec::new();
            for chunk in self.0.chunks_exact(V::LANES) {
                let mut halves = vec![Bf16(0); V::LANES];
                let mut wide = vec![0.0f32; V::LANES];
                unsafe {
                    let value = V::load(chunk.as_ptr());
                    let value = if self.1 { value.keep(0xA5A5).abs() } else { value };
                    Bf16::store(value, halves.as_mut_ptr());
                    Bf16::load::<V>(halves.as_ptr())
                        .fma(V::splat(1.0), V::splat(0.0))
                        .store(wide.as_mut_ptr());
                }
                out.extend(wide.iter().map(|v| v.to_bits()));
            }
            out
        }
    }

    #[test]
    fn torchs_switch_leaves_out_what_it_does_not_allow() {
        let best = Isa::available().next().unwrap();
        assert_eq!(Isa::allowed(Some("default")), Isa::Portable);
        assert_ne!(Isa::allowed(Some("avx2")), Isa::Avx512);
        assert_eq!([None, Some("avx512"), Some("?")].map(Isa::allowed), [best; 3]);
    }

    #[test]
    fn all_instructions_round_alike_and_as_one_element_does() {
        let mut values: Vec<f32> =
            (0..256u32).map(|i| f32::from_bits(i.wrapping_mul(0x9E37_79B9))).collect();
        values.extend([
            f32::NAN,
            -f32::NAN,
            f32::INFINITY,
            f32::NEG_INFINITY,
            0.0,
            1.003_906_3,
            f32::MAX,
            1.0,
        ]);
        values.extend([1.011_718_8; 8]);
        let one: Vec<u32> =
            values.iter().map(|&v| (Bf16::nearest(v).widen() + 0.0).to_bits()).collect();
        for isa in Isa::available() {
            let got = isa.run(&RoundTrip(&values, false));
            for (g, w) in got.iter().zip(&one) {
                assert!(
                    g == w || (f32::from_bits(*g).is_nan() && f32::from_bits(*w).is_nan()),
                    "{isa:?}"
                );
            }
        }
    }

    #[test]
    fn kept_lanes_keep_their_magnitude() {
        let values: Vec<f32> = (0..16).map(|i| i as f32 - 8.0).collect();
        for isa in Isa::available() {
            let got = isa.run(&RoundTrip(&values, true));
            let lanes = if isa == Isa::Avx512 { 16 } else { 8 };
            for (i, bits) in got.iter().enumerate() {
                let want = if 0xA5A5u32 >> (i % lanes) & 1 == 1 { values[i].abs() } else { 0.0 };
                assert_eq!(f32::from_bits(*bits), want, "{isa:?} lane {i}");
            }
        }
    }
}
