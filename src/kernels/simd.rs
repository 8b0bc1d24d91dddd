//! Vectors of float32 for the loops over tokens, for AVX-512, AVX2 and any processor, and the dtypes
//! that they load from and store to. The arithmetic is float32 whatever the dtype.

// The safety contract is one for all methods, and stands at the traits.
#![allow(clippy::missing_safety_doc)]

use tch::Kind;

use super::philox::philox;

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

/// Vectors with special instructions of x86-64.
#[cfg(target_arch = "x86_64")]
pub mod x86 {
    use super::super::philox::{MULTIPLIERS, WEYL};
    use super::Simd;
    use std::arch::x86_64::*;

    /// High and low words of `factor * values`, 16 lanes.
    #[inline(always)]
    unsafe fn wide_product(values: __m512i, factor: __m512i) -> (__m512i, __m512i) {
        // The processor multiplies every second lane: once for the even ones, once for the odd.
        unsafe {
            let even = _mm512_mul_epu32(values, factor);
            let odd = _mm512_mul_epu32(_mm512_srli_epi64::<32>(values), factor);
            (
                _mm512_mask_shuffle_epi32::<0b11_11_01_01>(odd, 0x5555, even),
                _mm512_mask_shuffle_epi32::<0b10_10_00_00>(even, 0xAAAA, odd),
            )
        }
    }

    /// [`Simd::transpose_16x16`] in sixteen registers of 256 bits.
    #[inline(always)]
    unsafe fn transpose_16x16(from: *const u16, stride: usize, to: *mut u16, to_stride: usize) {
        unsafe {
            let mut rows = [_mm256_setzero_si256(); 16];
            for (r, row) in rows.iter_mut().enumerate() {
                *row = _mm256_loadu_si256(from.add(r * stride).cast());
            }
            // Pairs of rows, then of pairs, then of quadruples are interleaved inside the halves.
            let mut pairs = rows;
            for k in 0..8 {
                pairs[2 * k] = _mm256_unpacklo_epi16(rows[2 * k], rows[2 * k + 1]);
                pairs[2 * k + 1] = _mm256_unpackhi_epi16(rows[2 * k], rows[2 * k + 1]);
            }
            let mut fours = pairs;
            for k in 0..4 {
                for h in 0..2 {
                    let (low, high) = (pairs[4 * k + h], pairs[4 * k + 2 + h]);
                    fours[4 * k + 2 * h] = _mm256_unpacklo_epi32(low, high);
                    fours[4 * k + 2 * h + 1] = _mm256_unpackhi_epi32(low, high);
                }
            }
            let mut eights = fours;
            for k in 0..2 {
                for h in 0..4 {
                    let (low, high) = (fours[8 * k + h], fours[8 * k + 4 + h]);
                    eights[8 * k + 2 * h] = _mm256_unpacklo_epi64(low, high);
                    eights[8 * k + 2 * h + 1] = _mm256_unpackhi_epi64(low, high);
                }
            }
            for h in 0..8 {
                let (low, high) = (eights[h], eights[8 + h]);
                let first = _mm256_permute2x128_si256::<0x20>(low, high);
                let second = _mm256_permute2x128_si256::<0x31>(low, high);
                _mm256_storeu_si256(to.add(h * to_stride).cast(), first);
                _mm256_storeu_si256(to.add((8 + h) * to_stride).cast(), second);
            }
        }
    }

    /// 256 bits, with FMA.
    #[derive(Clone, Copy)]
    pub struct Avx2(__m256);

    // SAFETY: intrinsics of AVX2 and FMA; pointers as the caller promises.
    unsafe impl Simd for Avx2 {
        const LANES: usize = 8;
        const ROWS: usize = 4;
        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            unsafe { Self(_mm256_set1_ps(value)) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { Self(_mm256_loadu_ps(from)) }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { _mm256_storeu_ps(to, self.0) }
        }
        #[inline(always)]
        unsafe fn load_bf16(from: *const u16) -> Self {
            unsafe {
                let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
                Self(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide)))
            }
        }
        #[inline(always)]
        unsafe fn store_bf16(self, to: *mut u16) {
            unsafe {
                let bits = _mm256_castps_si256(self.0);
                let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
                let round = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF));
                let rounded = _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, round));
                let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(self.0, self.0));
                let halves = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC0), nan);
                let packed = _mm256_packus_epi32(halves, halves);
                let ordered = _mm256_permute4x64_epi64::<0b1000>(packed);
                _mm_storeu_si128(to.cast(), _mm256_castsi256_si128(ordered));
            }
        }
        #[inline(always)]
        unsafe fn fma(self, factor: Self, term: Self) -> Self {
            unsafe { Self(_mm256_fmadd_ps(self.0, factor.0, term.0)) }
        }
        #[inline(always)]
        unsafe fn abs(self) -> Self {
            unsafe { Self(_mm256_andnot_ps(_mm256_set1_ps(-0.0), self.0)) }
        }
        #[inline(always)]
        unsafe fn keep(self, bits: u32) -> Self {
            unsafe {
                let lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
                let set = _mm256_and_si256(_mm256_set1_epi32(bits as i32), lanes);
                let kept = _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lanes));
                Self(_mm256_and_ps(self.0, kept))
            }
        }
        #[inline(always)]
        unsafe fn sum(self) -> f32 {
            unsafe {
                let half =
                    _mm_add_ps(_mm256_castps256_ps128(self.0), _mm256_extractf128_ps::<1>(self.0));
                let pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
                _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps::<1>(pair, pair)))
            }
        }
        #[inline(always)]
        unsafe fn transpose_16x16(from: *const u16, stride: usize, to: *mut u16, to_stride: usize) {
            unsafe { transpose_16x16(from, stride, to, to_stride) }
        }
    }

    /// 512 bits.
    #[derive(Clone, Copy)]
    pub struct Avx512(__m512);

    // SAFETY: intrinsics of AVX-512 F, BW, DQ and VL; pointers as the caller promises.
    unsafe impl Simd for Avx512 {
        const LANES: usize = 16;
        const ROWS: usize = 8;
        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            unsafe { Self(_mm512_set1_ps(value)) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { Self(_mm512_loadu_ps(from)) }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { _mm512_storeu_ps(to, self.0) }
        }
        #[inline(always)]
        unsafe fn load_bf16(from: *const u16) -> Self {
            unsafe {
                let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
                Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)))
            }
        }
        #[inline(always)]
        unsafe fn store_bf16(self, to: *mut u16) {
            unsafe {
                let bits = _mm512_castps_si512(self.0);
                let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
                let round = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF));
                let rounded = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, round));
                let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(self.0, self.0);
                let halves = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC0));
                _mm256_storeu_si256(to.cast(), _mm512_cvtepi32_epi16(halves));
            }
        }
        #[inline(always)]
        unsafe fn fma(self, factor: Self, term: Self) -> Self {
            unsafe { Self(_mm512_fmadd_ps(self.0, factor.0, term.0)) }
        }
        #[inline(always)]
        unsafe fn abs(self) -> Self {
            unsafe { Self(_mm512_abs_ps(self.0)) }
        }
        #[inline(always)]
        unsafe fn keep(self, bits: u32) -> Self {
            unsafe { Self(_mm512_maskz_mov_ps(bits as u16, self.0)) }
        }
        #[inline(always)]
        unsafe fn sum(self) -> f32 {
            unsafe { _mm512_reduce_add_ps(self.0) }
        }
        #[inline(always)]
        unsafe fn transpose_16x16(from: *const u16, stride: usize, to: *mut u16, to_stride: usize) {
            unsafe { transpose_16x16(from, stride, to, to_stride) }
        }
        #[inline(always)]
        unsafe fn keep_group(seed: u64, first: u64, threshold: u32) -> [u16; 8] {
            unsafe {
                let lanes = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
                let start = _mm512_set1_epi64(first as i64);
                let counters = [
                    _mm512_add_epi64(start, lanes),
                    _mm512_add_epi64(start, _mm512_add_epi64(lanes, _mm512_set1_epi64(8))),
                ];
                let pick = |from: i32| {
                    let index = _mm512_setr_epi32(
                        from,
                        from + 2,
                        from + 4,
                        from + 6,
                        from + 8,
                        from + 10,
                        from + 12,
                        from + 14,
                        from + 16,
                        from + 18,
                        from + 20,
                        from + 22,
                        from + 24,
                        from + 26,
                        from + 28,
                        from + 30,
                    );
                    _mm512_permutex2var_epi32(counters[0], index, counters[1])
                };
                let mut c = [pick(0), pick(1), _mm512_setzero_si512(), _mm512_setzero_si512()];
                let factors = MULTIPLIERS.map(|factor| _mm512_set1_epi32(factor as i32));
                let mut key = [seed as u32, (seed >> 32) as u32];
                for _ in 0..10 {
                    let (high_a, low_a) = wide_product(c[0], factors[0]);
                    let (high_b, low_b) = wide_product(c[2], factors[1]);
                    let k = key.map(|word| _mm512_set1_epi32(word as i32));
                    c = [
                        _mm512_ternarylogic_epi32::<0x96>(high_b, c[1], k[0]),
                        low_b,
                        _mm512_ternarylogic_epi32::<0x96>(high_a, c[3], k[1]),
                        low_a,
                    ];
                    key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
                }
                let limit = _mm512_set1_epi32(threshold as i32);
                let mut kept = [0u16; 8];
                for (w, word) in c.into_iter().enumerate() {
                    let low = _mm512_and_si512(word, _mm512_set1_epi32(0xFFFF));
                    kept[2 * w] = _mm512_cmplt_epu32_mask(low, limit);
                    kept[2 * w + 1] = _mm512_cmplt_epu32_mask(_mm512_srli_epi32::<16>(word), limit);
                }
                kept
            }
        }
    }
}

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

    #[cfg(target_arch = "x86_64")]
    fn present(self) -> bool {
        match self {
            Self::Avx512 => {
                is_x86_feature_detected!("avx512f")
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

/// Runs `kernel` with the best instructions of this processor.
pub fn on_best<K: Kernel>(kernel: &K) -> K::Output {
    Isa::available().next().unwrap_or(Isa::Portable).run(kernel)
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
