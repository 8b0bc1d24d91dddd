//! Dropout masks on the CPU: Philox4x32-10 (Salmon et al., SC 2011), 16 random bits an element, kept
//! as one packed bit an element. A mask depends on the seed and the position only.

use tch::{Device, Kind, Tensor};

use crate::errors::{Error, Result};

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
/// Counters computed at once, so that the compiler vectorises over them.
const LANES: usize = 16;
/// Elements that one group of counters decides: 8 of 16 bits a counter.
const GROUP: usize = LANES * 8;

/// Philox4x32-10 of the counters `first .. first + LANES`; word w of counter l is `[w][l]`.
// Indexed loops over the lanes are what LLVM turns into vector code here.
#[allow(clippy::needless_range_loop)]
#[inline(always)]
fn philox(seed: u64, first: u64) -> [[u32; LANES]; 4] {
    let mut c = [[0u32; LANES]; 4];
    for l in 0..LANES {
        let counter = first.wrapping_add(l as u64);
        c[0][l] = counter as u32;
        c[1][l] = (counter >> 32) as u32;
    }
    let mut key = [seed as u32, (seed >> 32) as u32];
    for _ in 0..10 {
        for l in 0..LANES {
            let a = u64::from(MULTIPLIERS[0]) * u64::from(c[0][l]);
            let b = u64::from(MULTIPLIERS[1]) * u64::from(c[2][l]);
            let x = (b >> 32) as u32 ^ c[1][l] ^ key[0];
            let y = (a >> 32) as u32 ^ c[3][l] ^ key[1];
            c[0][l] = x;
            c[1][l] = b as u32;
            c[2][l] = y;
            c[3][l] = a as u32;
        }
        key[0] = key[0].wrapping_add(WEYL[0]);
        key[1] = key[1].wrapping_add(WEYL[1]);
    }
    c
}

#[inline(always)]
fn fill(bytes: &mut [u8], seed: u64, threshold: u32) {
    for (group, out) in bytes.chunks_mut(GROUP / 8).enumerate() {
        let words = philox(seed, (group * LANES) as u64);
        let mut bits = [0u8; GROUP / 8];
        for (w, word) in words.iter().enumerate() {
            for half in 0..2 {
                let mut kept = 0u16;
                for (l, v) in word.iter().enumerate() {
                    kept |= u16::from((v >> (16 * half)) & 0xFFFF < threshold) << l;
                }
                bits[w * 4 + half * 2..][..2].copy_from_slice(&kept.to_le_bytes());
            }
        }
        out.copy_from_slice(&bits[..out.len()]);
    }
}

#[inline(always)]
fn zero_dropped<T: Copy + Default>(values: &mut [T], bits: &[u8]) {
    for (chunk, byte) in values.chunks_mut(8).zip(bits) {
        for (i, value) in chunk.iter_mut().enumerate() {
            if byte >> i & 1 == 0 {
                *value = T::default();
            }
        }
    }
}

/// Compiles `$body` for AVX-512, AVX2 and the baseline, and runs the best that the processor has.
macro_rules! dispatch {
    ($(#[$doc:meta])* $name:ident $(<$t:ident>)? ($($arg:ident: $ty:ty),*) => $body:expr) => {
        $(#[$doc])*
        fn $name $(<$t: Copy + Default>)? ($($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
                fn avx512 $(<$t: Copy + Default>)? ($($arg: $ty),*) { $body }
                #[target_feature(enable = "avx2")]
                fn avx2 $(<$t: Copy + Default>)? ($($arg: $ty),*) { $body }
                if is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                {
                    // SAFETY: the processor has every feature that the function is compiled for.
                    return unsafe { avx512($($arg),*) };
                }
                if is_x86_feature_detected!("avx2") {
                    // SAFETY: as above.
                    return unsafe { avx2($($arg),*) };
                }
            }
            $body
        }
    };
}

dispatch! {
    /// Draws the packed bits of a mask: bit i is set where element i is kept.
    fill_bits(bytes: &mut [u8], seed: u64, threshold: u32) => fill(bytes, seed, threshold)
}
dispatch! {
    /// Zeroes the elements whose bit is not set.
    zero_bits<T>(values: &mut [T], bits: &[u8]) => zero_dropped(values, bits)
}

fn threshold(p: f64) -> u32 {
    ((1.0 - p) * 65536.0).round() as u32
}

/// Probability with which a mask for dropout probability `p` really keeps an element (16 bits fine).
pub fn keep_probability(p: f64) -> f64 {
    f64::from(threshold(p)) / 65536.0
}

/// Packed mask of `elements` elements: uint8 of ceil(elements / 8) on the CPU.
pub fn draw(elements: usize, p: f64, seed: u64) -> Result<Tensor> {
    let bytes = elements.div_ceil(8);
    let mask = Tensor::f_empty([bytes as i64], (Kind::Uint8, Device::Cpu))?;
    if bytes > 0 {
        // SAFETY: the tensor was just made: contiguous, `bytes` bytes long, known to nobody else.
        let out = unsafe { std::slice::from_raw_parts_mut(mask.data_ptr().cast::<u8>(), bytes) };
        fill_bits(out, seed, threshold(p));
    }
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
    // SAFETY: both tensors are contiguous CPU tensors of the checked lengths, an element of `values`
    // is as wide as the integer chosen for it, all-zero bits are 0 in every floating-point dtype,
    // and the caller holds `values` mutably.
    unsafe {
        let bits = std::slice::from_raw_parts(mask.data_ptr().cast::<u8>(), n.div_ceil(8));
        let data = values.data_ptr();
        match values.kind().elt_size_in_bytes() {
            2 => zero_bits(std::slice::from_raw_parts_mut(data.cast::<u16>(), n), bits),
            4 => zero_bits(std::slice::from_raw_parts_mut(data.cast::<u32>(), n), bits),
            _ => zero_bits(std::slice::from_raw_parts_mut(data.cast::<u64>(), n), bits),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_matches_the_published_vector() {
        // Random123's known answer for counter 0, key 0.
        let words = philox(0, 0);
        let first = [words[0][0], words[1][0], words[2][0], words[3][0]];
        assert_eq!(first, [0x6627_E8D5, 0xE169_C58D, 0xBC57_AC4C, 0x9B00_DBD8]);
    }

    #[test]
    fn dispatched_loops_equal_the_portable_ones() {
        for n in [1, 7, 8, 127, 128, 129, 1000] {
            let (mut a, mut b) = (vec![0u8; n], vec![0u8; n]);
            fill_bits(&mut a, 42, threshold(0.3));
            fill(&mut b, 42, threshold(0.3));
            assert_eq!(a, b);
            let (mut x, mut y) = (vec![7u16; 8 * n - 3], vec![7u16; 8 * n - 3]);
            zero_bits(&mut x, &a);
            zero_dropped(&mut y, &b);
            assert_eq!(x, y);
        }
    }

    #[test]
    fn the_kept_share_is_one_minus_p() {
        for p in [0.0, 0.1, 0.5, 0.9, 1.0] {
            let mut bits = vec![0u8; 1 << 17];
            fill_bits(&mut bits, 7, threshold(p));
            let kept: u32 = bits.iter().map(|b| b.count_ones()).sum();
            let share = f64::from(kept) / (8.0 * bits.len() as f64);
            assert!((share - (1.0 - p)).abs() < 2e-3, "p {p}: kept {share}");
        }
    }
}
