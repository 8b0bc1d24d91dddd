//! What the loops over floating-point slices share: the number types, vectors of a few of them, and
//! the choice of the processor's instructions.

use std::ops::{Add, AddAssign, Mul, Sub};

use tch::Kind;

/// float32 or float64.
pub trait Real:
    Copy
    + Default
    + PartialOrd
    + Add<Output = Self>
    + AddAssign
    + Mul<Output = Self>
    + Sub<Output = Self>
    + Send
    + Sync
{
    /// torch's name of the type.
    const KIND: Kind;
    /// 256 bits of them for AVX2.
    #[cfg(target_arch = "x86_64")]
    type Avx2: Vector<Self>;
    /// As many of them without any special instruction.
    type Portable: Vector<Self>;
    /// The nearest value.
    fn nearest(value: f64) -> Self;
    /// The same value, wider.
    fn wide(self) -> f64;
    /// Its absolute value.
    fn abs(self) -> Self;
}

/// A few numbers that are worked on at once.
pub trait Vector<T>: Copy {
    /// How many.
    const LANES: usize;
    /// All lanes the same.
    fn splat(value: T) -> Self;
    /// The elements at `from`.
    ///
    /// # Safety
    /// `LANES` elements can be read there.
    unsafe fn load(from: *const T) -> Self;
    /// Writes the elements at `to`.
    ///
    /// # Safety
    /// `LANES` elements can be written there.
    unsafe fn store(self, to: *mut T);
    /// `self * factor + term`.
    fn times_plus(self, factor: Self, term: Self) -> Self;
    /// `self + other`.
    fn plus(self, other: Self) -> Self;
}

macro_rules! real {
    ($type:ty, $kind:expr, $lanes:literal, $avx2:ty) => {
        impl Real for $type {
            const KIND: Kind = $kind;
            #[cfg(target_arch = "x86_64")]
            type Avx2 = $avx2;
            type Portable = [$type; $lanes];
            #[inline(always)]
            fn nearest(value: f64) -> Self {
                value as Self
            }
            #[inline(always)]
            fn wide(self) -> f64 {
                self.into()
            }
            #[inline(always)]
            fn abs(self) -> Self {
                <$type>::abs(self)
            }
        }

        impl Vector<$type> for [$type; $lanes] {
            const LANES: usize = $lanes;
            #[inline(always)]
            fn splat(value: $type) -> Self {
                [value; $lanes]
            }
            #[inline(always)]
            unsafe fn load(from: *const $type) -> Self {
                // SAFETY: as the caller promises; an array is as aligned as its elements.
                unsafe { *from.cast() }
            }
            #[inline(always)]
            unsafe fn store(self, to: *mut $type) {
                // SAFETY: as above.
                unsafe { *to.cast() = self }
            }
            #[inline(always)]
            fn times_plus(self, factor: Self, term: Self) -> Self {
                std::array::from_fn(|l| self[l] * factor[l] + term[l])
            }
            #[inline(always)]
            fn plus(self, other: Self) -> Self {
                std::array::from_fn(|l| self[l] + other[l])
            }
        }
    };
}

real!(f32, Kind::Float, 8, std::arch::x86_64::__m256);
real!(f64, Kind::Double, 4, std::arch::x86_64::__m256d);

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use super::Vector;
    use std::arch::x86_64::*;

    macro_rules! vector {
        ($vector:ty, $type:ty, $lanes:literal, $splat:ident, $load:ident, $store:ident, $fused:ident, $add:ident) => {
            // SAFETY of all: `dispatch!` uses the type on a processor with AVX2 and FMA only; loads
            // and stores are the unaligned ones, within what the caller promises.
            impl Vector<$type> for $vector {
                const LANES: usize = $lanes;
                #[inline(always)]
                fn splat(value: $type) -> Self {
                    unsafe { $splat(value) }
                }
                #[inline(always)]
                unsafe fn load(from: *const $type) -> Self {
                    unsafe { $load(from) }
                }
                #[inline(always)]
                unsafe fn store(self, to: *mut $type) {
                    unsafe { $store(to, self) }
                }
                #[inline(always)]
                fn times_plus(self, factor: Self, term: Self) -> Self {
                    unsafe { $fused(self, factor, term) }
                }
                #[inline(always)]
                fn plus(self, other: Self) -> Self {
                    unsafe { $add(self, other) }
                }
            }
        };
    }

    vector!(
        __m256,
        f32,
        8,
        _mm256_set1_ps,
        _mm256_loadu_ps,
        _mm256_storeu_ps,
        _mm256_fmadd_ps,
        _mm256_add_ps
    );
    vector!(
        __m256d,
        f64,
        4,
        _mm256_set1_pd,
        _mm256_loadu_pd,
        _mm256_storeu_pd,
        _mm256_fmadd_pd,
        _mm256_add_pd
    );
}

/// A function over `T: Real` whose `$body` is compiled for AVX2 with FMA and for the baseline, with
/// `V` the vector to use; it runs the better one that `Isa::best` allows.
macro_rules! dispatch {
    ($(#[$doc:meta])* fn $name:ident<T, V>($($arg:ident: $type:ty),*) => $body:expr) => {
        $(#[$doc])*
        fn $name<T: Real>($($arg: $type),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma")]
                fn avx2<T: Real>($($arg: $type),*) {
                    type V<T> = <T as Real>::Avx2;
                    $body
                }
                let best = $crate::kernels::simd::Isa::best();
                if best != $crate::kernels::simd::Isa::Portable {
                    // SAFETY: every other choice has AVX2 and FMA, for which the function is compiled.
                    return unsafe { avx2($($arg),*) };
                }
            }
            type V<T> = <T as Real>::Portable;
            $body
        }
    };
}
pub(super) use dispatch;
