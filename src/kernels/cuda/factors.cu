// The small matrices of a layer, before its products and after them. S is the dtype of the parameters, T the
// one of the products.

const int FACTOR_THREADS = 256, FACTOR_ELEMENTS = 1024;

// p = scale B diag(E), (out, rows), and A in T, unless `cast` is null; E of the reserve is a constant.
// Grid: parts of FACTOR_ELEMENTS elements of the larger.
template <typename S, typename T>
__device__ __forceinline__ void factors(
    T* cast, T* p, const S* a, const S* b, const S* e, i64 of_a, i64 of_b, int rows, int active, float scale,
    float reserve) {
    const i64 begin = (i64)blockIdx.x * FACTOR_ELEMENTS, end = begin + FACTOR_ELEMENTS;
    for (i64 at = begin + threadIdx.x; at < end; at += FACTOR_THREADS) {
        if (cast && at < of_a) from_float(cast[at], to_float(a[at]));
        if (at < of_b) {
            const int row = (int)(at % rows);
            const float value = row < active ? to_float(e[row]) : reserve;
            from_float(p[at], to_float(b[at]) * (scale * value));
        }
    }
}

// The gradients of A, B and E, from right = u^T drop(x), (rows, features), and left = t^T gy, (rows, out).
// Grid: parts of FACTOR_ELEMENTS elements of a row of the longer, and one part for E; rows.
template <typename S, typename T>
__device__ __forceinline__ void gradients(
    S* grad_a, S* grad_b, S* grad_e, const T* right, const T* left, const S* b, const S* e, int features,
    int out, int rows, int active, float scale, float reserve, float gain) {
    const int row = blockIdx.y;
    if (blockIdx.x == 0) {
        if (row >= active) return;
        double sum = 0.0;
        for (int at = threadIdx.x; at < out; at += FACTOR_THREADS) {
            sum += to_float(left[(i64)row * out + at]) * to_float(b[(i64)at * rows + row]);
        }
        sum = block_sum<FACTOR_THREADS>(sum);
        if (threadIdx.x == 0) from_float(grad_e[row], (float)(scale * sum));
        return;
    }
    const float factor = scale * (row < active ? to_float(e[row]) : reserve);
    const int begin = ((int)blockIdx.x - 1) * FACTOR_ELEMENTS;
    for (int at = begin + threadIdx.x; at < begin + FACTOR_ELEMENTS; at += FACTOR_THREADS) {
        if (at < features) {
            const i64 index = (i64)row * features + at;
            from_float(grad_a[index], gain * to_float(right[index]));
        }
        if (at < out) from_float(grad_b[(i64)at * rows + row], factor * to_float(left[(i64)row * out + at]));
    }
}

#define DEFINE(S, T)                                                                                          \
    extern "C" __global__ void __launch_bounds__(FACTOR_THREADS) factors_##S##_##T(                           \
        T* cast, T* p, const S* a, const S* b, const S* e, i64 of_a, i64 of_b, int rows, int active,          \
        float scale, float reserve) {                                                                         \
        factors<S, T>(cast, p, a, b, e, of_a, of_b, rows, active, scale, reserve);                            \
    }                                                                                                         \
    extern "C" __global__ void __launch_bounds__(FACTOR_THREADS) gradients_##S##_##T(                         \
        S* grad_a, S* grad_b, S* grad_e, const T* right, const T* left, const S* b, const S* e, int features, \
        int out, int rows, int active, float scale, float reserve, float gain) {                              \
        gradients<S, T>(                                                                                      \
            grad_a, grad_b, grad_e, right, left, b, e, features, out, rows, active, scale, reserve, gain);    \
    }
DEFINE(f32, f32) DEFINE(f16, f16) DEFINE(bf16, bf16) DEFINE(f32, f16) DEFINE(f32, bf16)
#undef DEFINE
