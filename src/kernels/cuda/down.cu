// t = gain A drop(x), with the mask drawn on the way: x is read once for every sixteen ranks, drop(x)
// is never written.

// Grid: a block for DOWN_TOKENS rows of x. `features` is a multiple of 8, x and a of 16 bytes.
const int DOWN_THREADS = 128, DOWN_ROWS = 4, DOWN_TOKENS = DOWN_THREADS / WARP * DOWN_ROWS;

// Sums each of COUNT values over the warp. Lane l ends with the sums COUNT / 32 * l and following in
// front: each step halves the values a lane still carries, so 64 sums cost 62 shuffles and not 320.
template <int COUNT, int BIT = WARP / 2>
__device__ __forceinline__ void scatter_sums(float* value) {
    const bool upper = threadIdx.x & BIT;
#pragma unroll
    for (int k = 0; k < COUNT / 2; k++) {
        const float given = upper ? value[k] : value[k + COUNT / 2];
        const float kept = upper ? value[k + COUNT / 2] : value[k];
        value[k] = kept + __shfl_xor_sync(WHOLE_WARP, given, BIT);
    }
    if constexpr (BIT > 1) scatter_sums<COUNT / 2, BIT / 2>(value);
}

// RANKS ranks from `rank` on of the DOWN_ROWS tokens of this warp.
template <typename T, int RANKS>
__device__ __forceinline__ void down_ranks(
    T* t, const T* x, const T* a, const u8* mask, i64 token, int tokens, int features, int rank, int ranks,
    float gain) {
    const int lane = threadIdx.x % WARP;
    const int here = ranks - rank < RANKS ? ranks - rank : RANKS;
    float sum[DOWN_ROWS * RANKS];
#pragma unroll
    for (int k = 0; k < DOWN_ROWS * RANKS; k++) sum[k] = 0.0f;
    for (int feature = 8 * lane; feature < features; feature += 8 * WARP) {
        float kept[DOWN_ROWS][8];
#pragma unroll
        for (int m = 0; m < DOWN_ROWS; m++) {
            // Rows past the last count as dropped: their sums are not stored.
            const bool real = token + m < tokens;
            const i64 at = (real ? token + m : 0) * features + feature;
            load8(kept[m], x + at);
            const u32 bits = real ? mask[at / 8] : 0;
#pragma unroll
            for (int k = 0; k < 8; k++) kept[m][k] = bits >> k & 1 ? kept[m][k] : 0.0f;
        }
#pragma unroll
        for (int r = 0; r < RANKS; r++) {
            if (r < here) {
                float right[8];
                load8(right, a + (i64)(rank + r) * features + feature);
#pragma unroll
                for (int m = 0; m < DOWN_ROWS; m++) {
#pragma unroll
                    for (int k = 0; k < 8; k++) sum[m * RANKS + r] += kept[m][k] * right[k];
                }
            }
        }
    }
    scatter_sums<DOWN_ROWS * RANKS>(sum);
    const int each = DOWN_ROWS * RANKS / WARP;
#pragma unroll
    for (int k = 0; k < each; k++) {
        const int m = (each * lane + k) / RANKS, r = (each * lane + k) % RANKS;
        if (token + m < tokens && r < here) from_float(t[(token + m) * ranks + rank + r], gain * sum[k]);
    }
}

template <typename T, int RANKS>
__device__ __forceinline__ void down(
    T* t, u8* mask, const T* x, const T* a, int tokens, int features, int ranks, float gain, const Draw& draw) {
    const i64 first = (i64)blockIdx.x * DOWN_TOKENS;
    const i64 last = first + DOWN_TOKENS < tokens ? first + DOWN_TOKENS : tokens;
    // A row has whole bytes, so that the block reads no byte but those that it draws.
    draw_bytes(mask, first * features / 8, last * features / 8, draw);
    __syncthreads();
    const i64 token = first + threadIdx.x / WARP * DOWN_ROWS;
    for (int rank = 0; rank < ranks; rank += RANKS) {
        down_ranks<T, RANKS>(t, x, a, mask, token, tokens, features, rank, ranks, gain);
    }
}

#define DEFINE_FOR(T, RANKS)                                                                             \
    extern "C" __global__ void __launch_bounds__(DOWN_THREADS) down_##RANKS##_##T(                       \
        T* t, u8* mask, const T* x, const T* a, int tokens, int features, int ranks, float gain, u64 seed, \
        u64 offset, u32 threshold) {                                                                     \
        down<T, RANKS>(t, mask, x, a, tokens, features, ranks, gain, Draw{seed, offset, threshold});     \
    }
#define DEFINE(T) DEFINE_FOR(T, 8) DEFINE_FOR(T, 16)
FOR_EACH_TYPE(DEFINE)
#undef DEFINE
#undef DEFINE_FOR
