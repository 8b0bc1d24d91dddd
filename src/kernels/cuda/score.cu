// The importance of a module, sum |dW * G| (arXiv 2308.12043, eq. 6): G comes in blocks of rows, dW = P A
// is rebuilt in registers. Without atomics: the sums have one order, whatever the device does.

// The sum over one tile of a block of G (rows, features). Grid: tiles of rows, tiles of features.
template <typename T>
__device__ __forceinline__ void score_tile(
    double* partial, const T* g, const float* p, const float* a, int rows, int features, int ranks) {
    const Tile tile = this_tile();
    float weight[TILE_HEIGHT][8];
    multiply_tile(weight, tile, p, a, rows, features, ranks);
    float sum = 0.0f;
    if (tile.feature < features) {
#pragma unroll
        for (int m = 0; m < TILE_HEIGHT; m++) {
            if (tile.row + m >= rows) break;
            float gradient[8];
            load8(gradient, g + (tile.row + m) * features + tile.feature);
#pragma unroll
            for (int k = 0; k < 8; k++) sum += fabsf(gradient[k] * weight[m][k]);
        }
    }
    const double total = block_sum<TILE_THREADS>(sum);
    if (threadIdx.x == 0) partial[blockIdx.y * gridDim.x + blockIdx.x] = total;
}

#define DEFINE(T)                                                                                      \
    extern "C" __global__ void __launch_bounds__(TILE_THREADS) score_tile_##T(                         \
        double* partial, const T* g, const float* p, const float* a, int rows, int features, int ranks) { \
        score_tile<T>(partial, g, p, a, rows, features, ranks);                                        \
    }
FOR_EACH_TYPE(DEFINE)
#undef DEFINE

// target += gain * the sum of all partial sums. Grid: one block.
const int TOTAL_THREADS = 256;

extern "C" __global__ void __launch_bounds__(TOTAL_THREADS)
    score_total(double* target, const double* partial, int count, double gain) {
    double sum = 0.0;
    for (int k = threadIdx.x; k < count; k += TOTAL_THREADS) sum += partial[k];
    sum = block_sum<TOTAL_THREADS>(sum);
    if (threadIdx.x == 0) *target += gain * sum;
}
