// Rows, or columns, born during training (policies/restart.rs): kept before the optimizer's step, mixed after
// it with what became of them. All parameters of an optimizer's group in one launch.

// A part of a matrix, of `height` times `width` elements whose lines lie `stride` apart, and where it is kept.
struct Newborn {
    void* values;
    void* old;
    int height, width, stride, old_stride;
    float now, before;  // The part becomes now * itself + before * old.
};

const int NEWBORNS = 512;
struct Newborns {
    Newborn at[NEWBORNS];
};

// Grid: parts of NEWBORN_ELEMENTS elements (of the largest), newborns.
const int NEWBORN_THREADS = 256, NEWBORN_ELEMENTS = 2048;

template <typename Do>
__device__ __forceinline__ void for_each_newborn(const Newborn& newborn, const Do& action) {
    const i64 count = (i64)newborn.height * newborn.width, begin = (i64)blockIdx.x * NEWBORN_ELEMENTS;
    const i64 end = begin + NEWBORN_ELEMENTS < count ? begin + NEWBORN_ELEMENTS : count;
    for (i64 at = begin + threadIdx.x; at < end; at += NEWBORN_THREADS) {
        const i64 line = at / newborn.width, along = at % newborn.width;
        action(line * newborn.stride + along, line * newborn.old_stride + along);
    }
}

template <typename T>
__device__ __forceinline__ void keep_newborns(const Newborns& newborns) {
    const Newborn newborn = newborns.at[blockIdx.y];
    const T* values = (const T*)newborn.values;
    T* old = (T*)newborn.old;
    for_each_newborn(newborn, [=](i64 at, i64 kept) { old[kept] = values[at]; });
}

template <typename T>
__device__ __forceinline__ void mix_newborns(const Newborns& newborns) {
    const Newborn newborn = newborns.at[blockIdx.y];
    T* values = (T*)newborn.values;
    const T* old = (const T*)newborn.old;
    for_each_newborn(newborn, [=](i64 at, i64 kept) {
        from_float(values[at], newborn.now * to_float(values[at]) + newborn.before * to_float(old[kept]));
    });
}

#define DEFINE(T)                                                            \
    extern "C" __global__ void __launch_bounds__(NEWBORN_THREADS)            \
        keep_newborns_##T(const __grid_constant__ Newborns newborns) {       \
        keep_newborns<T>(newborns);                                          \
    }                                                                        \
    extern "C" __global__ void __launch_bounds__(NEWBORN_THREADS)            \
        mix_newborns_##T(const __grid_constant__ Newborns newborns) {        \
        mix_newborns<T>(newborns);                                           \
    }
FOR_EACH_TYPE(DEFINE)
#undef DEFINE
