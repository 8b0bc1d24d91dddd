// What all kernels share: number types, access to eight neighbouring elements, sums over a block.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

struct f16 {
    u16 bits;
};
struct bf16 {
    u16 bits;
};
typedef float f32;

#define FOR_EACH_TYPE(DEFINE) DEFINE(f32) DEFINE(f16) DEFINE(bf16)

const int WARP = 32;
const u32 WHOLE_WARP = 0xffffffffu;

__device__ __forceinline__ float to_float(f32 value) { return value; }
__device__ __forceinline__ float to_float(f16 value) { return half_to_float(value.bits); }
__device__ __forceinline__ float to_float(bf16 value) { return __uint_as_float((u32)value.bits << 16); }

__device__ __forceinline__ void from_float(f32& to, float value) { to = value; }
__device__ __forceinline__ void from_float(f16& to, float value) { to.bits = float_to_half(value); }
__device__ __forceinline__ void from_float(bf16& to, float value) { to.bits = float_to_bfloat(value); }

// Eight elements at a multiple of 16 bytes: one or two of the widest loads that there are.
__device__ __forceinline__ void load8(float (&to)[8], const f32* from) {
    const float4 low = ((const float4*)from)[0], high = ((const float4*)from)[1];
    to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
    to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
}

template <typename T>
__device__ __forceinline__ void load8(float (&to)[8], const T* from) {
    const uint4 words = *(const uint4*)from;
    const u32 word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int k = 0; k < 8; k++) {
        T element;
        element.bits = (u16)(word[k / 2] >> (k % 2 * 16));
        to[k] = to_float(element);
    }
}

__device__ __forceinline__ void store8(f32* to, const float (&from)[8]) {
    ((float4*)to)[0] = make_float4(from[0], from[1], from[2], from[3]);
    ((float4*)to)[1] = make_float4(from[4], from[5], from[6], from[7]);
}

template <typename T>
__device__ __forceinline__ void store8(T* to, const float (&from)[8]) {
    u32 word[4];
#pragma unroll
    for (int k = 0; k < 4; k++) {
        T low, high;
        from_float(low, from[2 * k]);
        from_float(high, from[2 * k + 1]);
        word[k] = low.bits | (u32)high.bits << 16;
    }
    *(uint4*)to = make_uint4(word[0], word[1], word[2], word[3]);
}

// The sum over all threads of a block of THREADS, in a fixed order; only thread 0 gets it.
template <int THREADS>
__device__ __forceinline__ double block_sum(double value) {
    __shared__ double of_warp[THREADS / WARP];
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
        value += __shfl_xor_sync(WHOLE_WARP, value, distance);
    }
    if (threadIdx.x % WARP == 0) of_warp[threadIdx.x / WARP] = value;
    __syncthreads();
    double sum = 0.0;
    if (threadIdx.x == 0) {
        for (int warp = 0; warp < THREADS / WARP; warp++) sum += of_warp[warp];
    }
    return sum;
}
