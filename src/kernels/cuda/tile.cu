// A tile of a product of low rank, left (rows, ranks) times right (ranks, features), in registers: what
// the gradient of x and the importance have in common.

// A block takes TILE_ROWS rows and TILE_FEATURES features; a warp TILE_HEIGHT rows, a lane eight features.
const int TILE_THREADS = 256, TILE_HEIGHT = 8;
const int TILE_ROWS = TILE_THREADS / WARP * TILE_HEIGHT, TILE_FEATURES = 8 * WARP;
// Ranks of `left` that the shared memory holds at once.
const int TILE_RANKS = 64;

struct Tile {
    i64 row;      // The first of this warp's rows.
    int feature;  // The first of this lane's features; past the last for a lane that has none.
};

__device__ __forceinline__ Tile this_tile() {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    return {(i64)blockIdx.x * TILE_ROWS + warp * TILE_HEIGHT, (int)blockIdx.y * TILE_FEATURES + 8 * lane};
}

// value[m][k] = sum_r left[row + m][r] right[r][feature + k]; 0 outside of the matrices.
template <typename L, typename R>
__device__ __forceinline__ void multiply_tile(
    float (&value)[TILE_HEIGHT][8], const Tile& tile, const L* left, const R* right, i64 rows, int features,
    int ranks) {
    __shared__ float staged[TILE_ROWS][TILE_RANKS];
    const i64 first = (i64)blockIdx.x * TILE_ROWS;
    const int local = threadIdx.x / WARP * TILE_HEIGHT;
#pragma unroll
    for (int m = 0; m < TILE_HEIGHT; m++) {
#pragma unroll
        for (int k = 0; k < 8; k++) value[m][k] = 0.0f;
    }
    for (int rank = 0; rank < ranks; rank += TILE_RANKS) {
        const int here = ranks - rank < TILE_RANKS ? ranks - rank : TILE_RANKS;
        __syncthreads();
        for (int at = threadIdx.x; at < TILE_ROWS * here; at += TILE_THREADS) {
            const int m = at / here, r = at % here;
            staged[m][r] = first + m < rows ? to_float(left[(first + m) * ranks + rank + r]) : 0.0f;
        }
        __syncthreads();
        if (tile.feature >= features) continue;
        for (int r = 0; r < here; r++) {
            float across[8];
            load8(across, right + (i64)(rank + r) * features + tile.feature);
#pragma unroll
            for (int m = 0; m < TILE_HEIGHT; m++) {
                const float down = staged[local + m][r];
#pragma unroll
                for (int k = 0; k < 8; k++) value[m][k] += down * across[k];
            }
        }
    }
}
