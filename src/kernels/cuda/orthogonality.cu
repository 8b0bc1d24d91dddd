// The gradient of the regulariser that keeps components orthonormal (policies/orthogonality.rs), for all
// modules in three launches: Gram matrices in parts, their residuals and norms, the gradients.

// One A (rank, length) or B (length, rank) and its gradient of the same shape.
struct Matrix {
    const void* values;
    void* gradient;
    i64 scratch;  // Where its Gram matrices begin in the scratch memory.
    int length;
    int rank;
};

// The table is an argument of the launch: nothing to copy to the device before it.
const int MATRICES = 512;
struct Matrices {
    Matrix at[MATRICES];
    int a_count;  // The first are A, the others B.
};

const int STEP_THREADS = 256;
const int MAX_RANK = 64;
// Vectors of `rank` numbers that the shared memory holds at once, with a column to spread the banks.
const int STAGED = 64;
typedef float Stage[STAGED][MAX_RANK + 1];
// Vectors whose products one block sums.
const int GRAM_LENGTH = 1024;
// Entries of a Gram matrix that a thread holds: a square of them.
const int GRAM_SIDE = 4, GRAM_ENTRIES = GRAM_SIDE * GRAM_SIDE;

// Number `at` of the entries of vectors `first` to `first + count`, in the order in which they lie in memory.
struct Entry {
    int vector;
    int component;
    i64 index;
};

__device__ __forceinline__ Entry entry(const Matrix& matrix, bool is_a, int first, int count, int at) {
    if (is_a) {
        const int vector = at % count, component = at / count;
        return {vector, component, (i64)component * matrix.length + first + vector};
    }
    return {at / matrix.rank, at % matrix.rank, (i64)first * matrix.rank + at};
}

template <typename T>
__device__ __forceinline__ void stage(Stage& staged, const Matrix& matrix, bool is_a, int first, int count) {
    for (int at = threadIdx.x; at < count * matrix.rank; at += STEP_THREADS) {
        const Entry from = entry(matrix, is_a, first, count, at);
        staged[from.vector][from.component] = to_float(((const T*)matrix.values)[from.index]);
    }
}

__device__ __forceinline__ int smaller(int a, int b) { return a < b ? a : b; }

// Grid: parts of GRAM_LENGTH vectors (of the longest matrix), matrices.
template <typename T>
__device__ __forceinline__ void gram(const Matrices& matrices, float* scratch) {
    __shared__ Stage staged;
    __shared__ float sums[STEP_THREADS][GRAM_ENTRIES + 1];
    const Matrix matrix = matrices.at[blockIdx.y];
    const bool is_a = (int)blockIdx.y < matrices.a_count;
    const int begin = blockIdx.x * GRAM_LENGTH, rank = matrix.rank;
    if (begin >= matrix.length) return;
    const int end = smaller(begin + GRAM_LENGTH, matrix.length);
    // Threads that a small matrix does not need for its entries share the vectors.
    const int side = (rank + GRAM_SIDE - 1) / GRAM_SIDE, squares = side * side;
    const int shares = STEP_THREADS / squares, share = threadIdx.x / squares;
    const int row = threadIdx.x % squares / side * GRAM_SIDE, column = threadIdx.x % side * GRAM_SIDE;
    float sum[GRAM_SIDE][GRAM_SIDE] = {};
    for (int first = begin; first < end; first += STAGED) {
        const int count = smaller(STAGED, end - first);
        __syncthreads();
        stage<T>(staged, matrix, is_a, first, count);
        __syncthreads();
        if (share >= shares) continue;
        for (int vector = share; vector < count; vector += shares) {
#pragma unroll
            for (int i = 0; i < GRAM_SIDE; i++) {
#pragma unroll
                for (int j = 0; j < GRAM_SIDE; j++) {
                    sum[i][j] += staged[vector][row + i] * staged[vector][column + j];
                }
            }
        }
    }
#pragma unroll
    for (int k = 0; k < GRAM_ENTRIES; k++) sums[threadIdx.x][k] = sum[k / GRAM_SIDE][k % GRAM_SIDE];
    __syncthreads();
    float* part = scratch + matrix.scratch + (i64)blockIdx.x * rank * rank;
    for (int at = threadIdx.x; at < rank * rank; at += STEP_THREADS) {
        const int i = at / rank, j = at % rank;
        const int square = i / GRAM_SIDE * side + j / GRAM_SIDE;
        const int place = i % GRAM_SIDE * GRAM_SIDE + j % GRAM_SIDE;
        float total = 0.0f;
        for (int k = 0; k < shares; k++) total += sums[k * squares + square][place];
        part[at] = total;
    }
}

// Puts `gram - I` in place of the first part, and its norm in norms. Grid: matrices.
extern "C" __global__ void __launch_bounds__(STEP_THREADS)
    orthogonality_residual(const __grid_constant__ Matrices matrices, float* scratch, double* norms) {
    const Matrix matrix = matrices.at[blockIdx.x];
    const int entries = matrix.rank * matrix.rank, parts = (matrix.length + GRAM_LENGTH - 1) / GRAM_LENGTH;
    float* residual = scratch + matrix.scratch;
    double squares = 0.0;
    for (int at = threadIdx.x; at < entries; at += STEP_THREADS) {
        float value = at % (matrix.rank + 1) == 0 ? -1.0f : 0.0f;
        for (int part = 0; part < parts; part++) value += residual[(i64)part * entries + at];
        residual[at] = value;
        squares += (double)value * value;
    }
    squares = block_sum<STEP_THREADS>(squares);
    if (threadIdx.x == 0) norms[blockIdx.x] = sqrt(squares);
}

// gradient += factor * 2 / count / norm * residual * values; the mean of all norms goes to `mean`, where
// there is one. Grid: parts of STAGED vectors (of the longest matrix), matrices.
template <typename T>
__device__ __forceinline__ void orthogonality_gradient(
    const Matrices& matrices, const float* scratch, const double* norms, const double* all_norms, int count,
    const double* factor, double* mean) {
    __shared__ Stage staged;
    __shared__ Stage residual;
    if (mean && blockIdx.x == 0 && blockIdx.y == 0) {
        double sum = 0.0;
        for (int k = threadIdx.x; k < count; k += STEP_THREADS) sum += all_norms[k];
        sum = block_sum<STEP_THREADS>(sum);
        if (threadIdx.x == 0) *mean = sum / count;
    }
    const Matrix matrix = matrices.at[blockIdx.y];
    const bool is_a = (int)blockIdx.y < matrices.a_count;
    const int first = blockIdx.x * STAGED, rank = matrix.rank;
    if (first >= matrix.length) return;
    const int here = smaller(STAGED, matrix.length - first);
    const float raw = (float)(*factor * 2.0 / count / norms[blockIdx.y]);
    // An orthonormal matrix has norm 0 and gradient 0.
    const float weight = isfinite(raw) ? raw : 0.0f;
    for (int at = threadIdx.x; at < rank * rank; at += STEP_THREADS) {
        residual[at / rank][at % rank] = weight * scratch[matrix.scratch + at];
    }
    stage<T>(staged, matrix, is_a, first, here);
    __syncthreads();
    T* gradient = (T*)matrix.gradient;
    for (int at = threadIdx.x; at < here * rank; at += STEP_THREADS) {
        const Entry to = entry(matrix, is_a, first, here, at);
        float sum = 0.0f;
        for (int k = 0; k < rank; k++) sum += residual[to.component][k] * staged[to.vector][k];
        from_float(gradient[to.index], to_float(gradient[to.index]) + sum);
    }
}

#define DEFINE(T)                                                                                      \
    extern "C" __global__ void __launch_bounds__(STEP_THREADS, 4)                                      \
        orthogonality_gram_##T(const __grid_constant__ Matrices matrices, float* scratch) {            \
        gram<T>(matrices, scratch);                                                                    \
    }                                                                                                  \
    extern "C" __global__ void __launch_bounds__(STEP_THREADS) orthogonality_gradient_##T(             \
        const __grid_constant__ Matrices matrices, const float* scratch, const double* norms,          \
        const double* all_norms, int count, const double* factor, double* mean) {                      \
        orthogonality_gradient<T>(matrices, scratch, norms, all_norms, count, factor, mean);           \
    }
FOR_EACH_TYPE(DEFINE)
#undef DEFINE
