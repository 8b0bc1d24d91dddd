//! Philox4x32-10 (Salmon et al., SC 2011): random numbers as a function of a counter and a key.

/// Multipliers of the words 0 and 2.
pub(super) const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
/// What each round adds to the key.
pub(super) const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
/// Counters computed at once, so that the compiler vectorises over them.
pub const LANES: usize = 16;

/// The ten rounds; word w of lane l is `[w][l]`.
// Indexed loops over the lanes are what LLVM turns into vector code here.
#[allow(clippy::needless_range_loop)]
#[inline(always)]
fn rounds(mut c: [[u32; LANES]; 4], mut key: [u32; 2]) -> [[u32; LANES]; 4] {
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

/// The words of the counters `first .. first + LANES`; word w of counter l is `[w][l]`.
#[allow(clippy::needless_range_loop)]
#[inline(always)]
pub fn philox(seed: u64, first: u64) -> [[u32; LANES]; 4] {
    let mut c = [[0u32; LANES]; 4];
    for l in 0..LANES {
        let counter = first.wrapping_add(l as u64);
        c[0][l] = counter as u32;
        c[1][l] = (counter >> 32) as u32;
    }
    rounds(c, [seed as u32, (seed >> 32) as u32])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_vectors() {
        // Random123's known answers: counter, key, words.
        let known = [
            ([0; 4], [0; 2], [0x6627_E8D5, 0xE169_C58D, 0xBC57_AC4C, 0x9B00_DBD8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408F_276D, 0x41C8_3B0E, 0xA20B_C7C6, 0x6D54_51FD]),
            (
                [0x243F_6A88, 0x85A3_08D3, 0x1319_8A2E, 0x0370_7344],
                [0xA409_3822, 0x299F_31D0],
                [0xD16C_FE09, 0x94FD_CCEB, 0x5001_E420, 0x2412_6EA1],
            ),
        ];
        for (counter, key, words) in known {
            let got = rounds(counter.map(|word| [word; LANES]), key);
            assert_eq!(got, words.map(|word| [word; LANES]));
        }
    }

    #[test]
    fn a_counter_carries_into_its_upper_word() {
        let lanes = philox(7, (1 << 32) - 1);
        let next = philox(7, 1 << 32);
        assert_eq!(lanes[0][1], next[0][0]);
    }
}
