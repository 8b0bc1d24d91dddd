"""Philox4x32-10 and the layout of dropout masks, written from their description."""

import numpy as np

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


def philox(counter, key):
    """Four words for a counter of four words (arrays of uint64 or numbers) and a key of two."""
    c0, c1, c2, c3 = (np.asarray(word, np.uint64) for word in counter)
    k0, k1 = key
    for _ in range(10):
        a, b = np.uint64(MULTIPLIERS[0]) * c0, np.uint64(MULTIPLIERS[1]) * c2
        c0, c1, c2, c3 = (
            (b >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            b & np.uint64(WORD),
            (a >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            a & np.uint64(WORD),
        )
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return np.stack([c0, c1, c2, c3])


def kept(elements, p, seed, offset=0):
    """Which of ``elements`` elements a mask keeps, bool."""
    threshold = round((1.0 - p) * 65536)
    index = np.arange(elements, dtype=np.uint64)
    group, place = index // np.uint64(128), (index % np.uint64(128)).astype(int)
    counters = [(offset + int(g) * 16 + k) % 2**64 for g in range(int(group.max()) + 1) for k in range(16)]
    low = np.array([c & WORD for c in counters], np.uint64)
    high = np.array([c >> 32 for c in counters], np.uint64)
    words = philox((low, high, 0 * low, 0 * low), (seed & WORD, seed >> 32))
    word = words[place // 32, group.astype(int) * 16 + place % 16]
    half = (word >> (np.uint64(16) * (place % 32 // 16).astype(np.uint64))) & np.uint64(0xFFFF)
    return half < threshold
