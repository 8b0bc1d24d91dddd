// The update's part of the gradient of x: gx (+)= gain u A where the mask is set, in one pass over gx.

// Grid: tiles of rows, tiles of features. `features` is a multiple of 8, gx and a of 16 bytes.
template <typename T>
__device__ __forceinline__ void add_grad_x(
    T* gx, const T* u, const T* a, const u8* mask, int tokens, int features, int ranks, float gain,
    int accumulate) {
    const Tile tile = this_tile();
    float value[TILE_HEIGHT][8];
    multiply_tile(value, tile, u, a, tokens, features, ranks);
    if (tile.feature >= features) return;
#pragma unroll
    for (int m = 0; m < TILE_HEIGHT; m++) {
        if (tile.row + m >= tokens) break;
        const i64 at = (tile.row + m) * features + tile.feature;
        const u32 bits = mask ? mask[at / 8] : 0xff;
        float sum[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
        if (accumulate) load8(sum, gx + at);
#pragma unroll
        for (int k = 0; k < 8; k++) sum[k] += bits >> k & 1 ? gain * value[m][k] : 0.0f;
        store8(gx + at, sum);
    }
}

#define DEFINE(T)                                                                                      \
    extern "C" __global__ void __launch_bounds__(TILE_THREADS) add_grad_x_##T(                         \
        T* gx, const T* u, const T* a, const u8* mask, int tokens, int features, int ranks, float gain, \
        int accumulate) {                                                                              \
        add_grad_x<T>(gx, u, a, mask, tokens, features, ranks, gain, accumulate);                      \
    }
FOR_EACH_TYPE(DEFINE)
#undef DEFINE
