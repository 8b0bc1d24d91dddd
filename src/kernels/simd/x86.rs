//! Vectors with special instructions of x86-64.

// The safety contract is one for all methods, and stands at the traits.
#![allow(clippy::missing_safety_doc)]

use super::super::philox::{MULTIPLIERS, WEYL};
use super::{add_each_sum, Simd};
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

/// Where the upper halves of 16 words of 32 bits are.
#[inline(always)]
unsafe fn upper_halves() -> __m512i {
    let mut places = [0i16; 32];
    for (n, place) in places.iter_mut().enumerate() {
        *place = (2 * (n as i16 % 16)) + 1;
    }
    // SAFETY: 512 bits are there.
    unsafe { _mm512_loadu_si512(places.as_ptr().cast()) }
}

/// The sums of the lanes of eight vectors: they are added crosswise, with two shuffles for two vectors instead of four
/// for each.
#[inline(always)]
unsafe fn sums_of_eight(v: [__m512; 8]) -> __m256 {
    unsafe {
        let pairs: [__m512; 4] = std::array::from_fn(|n| {
            let (a, b) = (v[2 * n], v[2 * n + 1]);
            _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b))
        });
        let fours: [__m512; 2] = std::array::from_fn(|n| {
            let (low, high) = (_mm512_castps_pd(pairs[2 * n]), _mm512_castps_pd(pairs[2 * n + 1]));
            let halves = (_mm512_unpacklo_pd(low, high), _mm512_unpackhi_pd(low, high));
            _mm512_add_ps(_mm512_castpd_ps(halves.0), _mm512_castpd_ps(halves.1))
        });
        // Each quarter has the four sums of its lanes: quarters 0 + 2 and 1 + 3 of both, then those.
        let outer = _mm512_shuffle_f32x4::<0b01_00_01_00>(fours[0], fours[1]);
        let inner = _mm512_shuffle_f32x4::<0b11_10_11_10>(fours[0], fours[1]);
        let halves = _mm512_add_ps(outer, inner);
        let (low, high) = (_mm512_castps512_ps256(halves), _mm512_extractf32x8_ps::<1>(halves));
        _mm256_add_ps(
            _mm256_permute2f128_ps::<0x20>(low, high),
            _mm256_permute2f128_ps::<0x31>(low, high),
        )
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
    unsafe fn prefetch(place: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(place.cast()) }
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
            let number = _mm512_cmp_ps_mask::<_CMP_ORD_Q>(self.0, self.0);
            let nan = _mm512_set1_epi32(0x7FC0_0000);
            let rounded = _mm512_mask_add_epi32(nan, number, bits, round);
            // One shuffle takes all upper halves; the narrowing conversion is two, after a shift.
            let upper = _mm512_permutexvar_epi16(upper_halves(), rounded);
            _mm256_storeu_si256(to.cast(), _mm512_castsi512_si256(upper));
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
    unsafe fn add_sums<const N: usize>(values: &[Self; N], to: *mut f32) {
        // SAFETY: as the caller promises; eight values are there in the first case.
        unsafe {
            if N == 8 {
                let sums = sums_of_eight(std::array::from_fn(|n| values[n % N].0));
                _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), sums));
                return;
            }
            add_each_sum(values, to);
        }
    }
    #[inline(always)]
    unsafe fn prefetch(place: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(place.cast()) }
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
