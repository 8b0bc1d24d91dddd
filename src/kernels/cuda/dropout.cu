// Dropout masks, bit for bit those of the CPU (kernels/dropout.rs): Philox4x32-10, a counter decides
// eight elements, sixteen counters a group of 128. Bit i of the packed mask is set where element i stays.

struct Words {
    u32 at[4];
};

__device__ __forceinline__ Words philox(u64 key, Words counter) {
    u32 key0 = (u32)key, key1 = (u32)(key >> 32);
    Words c = counter;
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const u32 a_low = 0xD2511F53u * c.at[0], a_high = __umulhi(0xD2511F53u, c.at[0]);
        const u32 b_low = 0xCD9E8D57u * c.at[2], b_high = __umulhi(0xCD9E8D57u, c.at[2]);
        c = {{b_high ^ c.at[1] ^ key0, b_low, a_high ^ c.at[3] ^ key1, a_low}};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return c;
}

// How a mask is drawn. An element stays if its 16 bits are below `threshold` (0 to 65536).
struct Draw {
    u64 seed;
    u64 offset;
    u32 threshold;
};

// The mask bytes 32 window to 32 window + 31, one a lane: two groups, whose counters lie in a row. The
// bits of eight neighbours come from eight counters, hence the votes.
__device__ __forceinline__ u8 draw_byte(const Draw& draw, i64 window) {
    const int lane = threadIdx.x % WARP;
    const u64 counter = draw.offset + (u64)window * WARP + lane;
    const Words random = philox(draw.seed, Words{{(u32)counter, (u32)(counter >> 32), 0, 0}});
    u32 mine = 0;
#pragma unroll
    for (int w = 0; w < 4; w++) {
        const u32 low = __ballot_sync(WHOLE_WARP, (random.at[w] & 0xffffu) < draw.threshold);
        const u32 high = __ballot_sync(WHOLE_WARP, (random.at[w] >> 16) < draw.threshold);
        const u32 word = lane < 16 ? (low & 0xffffu) | high << 16 : low >> 16 | (high & 0xffff0000u);
        if (lane / 4 % 4 == w) mine = word;
    }
    return (u8)(mine >> lane % 4 * 8);
}

// The mask bytes `begin` to `end`, by a whole block.
__device__ __forceinline__ void draw_bytes(u8* mask, i64 begin, i64 end, const Draw& draw) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    for (i64 window = begin / WARP + warp; window * WARP < end; window += warps) {
        const u8 byte = draw_byte(draw, window);
        const i64 at = window * WARP + lane;
        if (at >= begin && at < end) mask[at] = byte;
    }
}

// Grid: a block for DRAW_BYTES bytes of the mask.
const int DRAW_THREADS = 128, DRAW_BYTES = 2048;

extern "C" __global__ void __launch_bounds__(DRAW_THREADS)
    dropout_bits(u8* mask, i64 bytes, u64 seed, u64 offset, u32 threshold) {
    const i64 begin = (i64)blockIdx.x * DRAW_BYTES;
    const i64 end = begin + DRAW_BYTES < bytes ? begin + DRAW_BYTES : bytes;
    draw_bytes(mask, begin, end, Draw{seed, offset, threshold});
}

// out = x where the mask is set, else 0; out may be x. A thread takes eight elements, the last one what
// is left.
const int APPLY_THREADS = 256;

template <typename T>
__device__ __forceinline__ void apply_mask(T* out, const T* x, const u8* mask, i64 count) {
    const i64 byte = (i64)blockIdx.x * APPLY_THREADS + threadIdx.x, first = 8 * byte;
    if (first >= count) return;
    const u32 bits = mask[byte];
    if (first + 8 <= count) {
        float value[8];
        load8(value, x + first);
#pragma unroll
        for (int k = 0; k < 8; k++) value[k] = bits >> k & 1 ? value[k] : 0.0f;
        store8(out + first, value);
        return;
    }
    for (int k = 0; first + k < count; k++) {
        from_float(out[first + k], bits >> k & 1 ? to_float(x[first + k]) : 0.0f);
    }
}

#define DEFINE(T)                                                          \
    extern "C" __global__ void __launch_bounds__(APPLY_THREADS)            \
        apply_mask_##T(T* out, const T* x, const u8* mask, i64 count) {    \
        apply_mask<T>(out, x, mask, count);                                \
    }
FOR_EACH_TYPE(DEFINE)
#undef DEFINE
