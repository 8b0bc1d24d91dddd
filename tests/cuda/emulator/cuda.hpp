// CUDA for one block at a time on the CPU: a fiber a thread, so that barriers, votes and shuffles really
// wait for all who take part. Shared memory is NaN before every block. What it cannot show: races that
// need two warps to run at once, and anything about speed.
#pragma once

#include <link.h>
#include <signal.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

struct Position {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulator {

const unsigned WARP_THREADS = 32, MAX_THREADS = 1024, STACK = 1 << 16;

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    bool done;
};

// All who wait at a barrier go on when the last one has come.
struct Barrier {
    unsigned waiting = 0, round = 0;
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline unsigned current;
inline uint64_t progress;
inline bool reversed;
inline Position thread, block, block_size, grid;
inline Barrier block_barrier, warp_barriers[MAX_THREADS / WARP_THREADS];
inline uint64_t exchanged[MAX_THREADS];
inline int votes[MAX_THREADS];

inline void pause() { swapcontext(&fibers[current].context, &scheduler); }

inline void wait(Barrier& barrier, unsigned count) {
    const unsigned round = barrier.round;
    if (++barrier.waiting == count) {
        barrier.waiting = 0;
        barrier.round++;
        progress++;
        return;
    }
    while (barrier.round == round) pause();
}

inline void wait_for_warp() { wait(warp_barriers[current / WARP_THREADS], WARP_THREADS); }

// `value` as lane `lane` of the same warp gave it.
template <typename T>
T exchange(T value, unsigned lane) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "a slot is too small");
    std::memcpy(&exchanged[current], &value, sizeof(T));
    wait_for_warp();
    std::memcpy(&value, &exchanged[current / WARP_THREADS * WARP_THREADS + lane], sizeof(T));
    wait_for_warp();
    return value;
}

inline void fiber_main() {
    body();
    fibers[current].done = true;
    progress++;
    pause();
}

// Shared memory is thread-local storage of this library (see __shared__ below): one OS thread runs all
// fibers, so all of them see the same.
inline int poison(dl_phdr_info* info, size_t, void* inside) {
    const uintptr_t address = (uintptr_t)inside;
    bool here = false;
    for (int k = 0; k < info->dlpi_phnum; k++) {
        const ElfW(Phdr)& part = info->dlpi_phdr[k];
        const uintptr_t begin = info->dlpi_addr + part.p_vaddr;
        here |= part.p_type == PT_LOAD && address >= begin && address < begin + part.p_memsz;
    }
    for (int k = 0; here && k < info->dlpi_phnum; k++) {
        const ElfW(Phdr)& part = info->dlpi_phdr[k];
        if (part.p_type == PT_TLS && info->dlpi_tls_data) std::memset(info->dlpi_tls_data, 0xff, part.p_memsz);
    }
    return here;
}

inline thread_local volatile char first_use;

inline void poison_shared_memory() {
    // The storage of a thread is made at its first use; before, there would be none to poison.
    first_use = 0;
    dl_iterate_phdr(poison, (void*)&poison_shared_memory);
}

enum Result { DONE = 0, UNKNOWN = 1, STUCK = 2, OUT_OF_BOUNDS = 3, BAD_LAUNCH = 4 };

inline bool in_fiber, faulted;

// An access to memory that is not there ends the launch, not the process: tests put walls of such memory
// behind their tensors.
inline void leave_fiber(int signal) {
    if (!in_fiber) {
        ::signal(signal, SIG_DFL);
        return;
    }
    faulted = true;
    setcontext(&scheduler);
}

struct CaughtFaults {
    struct sigaction before_segv, before_bus;

    CaughtFaults() {
        struct sigaction ours = {};
        ours.sa_handler = leave_fiber;
        ours.sa_flags = SA_NODEFER;
        faulted = false;
        sigaction(SIGSEGV, &ours, &before_segv);
        sigaction(SIGBUS, &ours, &before_bus);
    }

    ~CaughtFaults() {
        sigaction(SIGSEGV, &before_segv, nullptr);
        sigaction(SIGBUS, &before_bus, nullptr);
    }
};

// Runs `kernel` on every block.
inline Result run(Position blocks, unsigned threads, std::function<void()> kernel) {
    if (threads == 0 || threads > MAX_THREADS || threads % WARP_THREADS) return BAD_LAUNCH;
    if (blocks.x == 0 || blocks.y == 0) return BAD_LAUNCH;
    const CaughtFaults caught;
    body = std::move(kernel);
    grid = blocks;
    block_size = {threads, 1};
    if (fibers.size() < threads) fibers.resize(threads);
    for (block.y = 0; block.y < blocks.y; block.y++) {
        for (block.x = 0; block.x < blocks.x; block.x++) {
            poison_shared_memory();
            block_barrier = {};
            for (Barrier& barrier : warp_barriers) barrier = {};
            for (unsigned k = 0; k < threads; k++) {
                Fiber& fiber = fibers[k];
                fiber.stack.resize(STACK);
                fiber.done = false;
                getcontext(&fiber.context);
                fiber.context.uc_stack.ss_sp = fiber.stack.data();
                fiber.context.uc_stack.ss_size = fiber.stack.size();
                fiber.context.uc_link = &scheduler;
                makecontext(&fiber.context, fiber_main, 0);
            }
            for (unsigned left = threads; left > 0;) {
                const uint64_t before = progress;
                left = 0;
                for (unsigned k = 0; k < threads; k++) {
                    current = reversed ? threads - 1 - k : k;
                    thread = {current, 0};
                    if (fibers[current].done) continue;
                    in_fiber = true;
                    swapcontext(&scheduler, &fibers[current].context);
                    in_fiber = false;
                    if (faulted) return OUT_OF_BOUNDS;
                    left += !fibers[current].done;
                }
                if (left > 0 && progress == before) return STUCK;
            }
        }
    }
    return DONE;
}

}  // namespace emulator

#define threadIdx emulator::thread
#define blockIdx emulator::block
#define blockDim emulator::block_size
#define gridDim emulator::grid
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static thread_local

using std::isfinite;

inline void __syncthreads() { emulator::wait(emulator::block_barrier, blockDim.x); }

inline int __syncthreads_and(int vote) {
    emulator::votes[emulator::current] = vote;
    __syncthreads();
    int all = 1;
    for (unsigned k = 0; k < blockDim.x; k++) all &= emulator::votes[k] != 0;
    __syncthreads();
    return all;
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return emulator::exchange(value, emulator::current % emulator::WARP_THREADS ^ mask);
}

inline unsigned __ballot_sync(unsigned, bool vote) {
    unsigned result = 0;
    const unsigned first = emulator::current / emulator::WARP_THREADS * emulator::WARP_THREADS;
    emulator::exchanged[emulator::current] = vote;
    emulator::wait_for_warp();
    for (unsigned lane = 0; lane < emulator::WARP_THREADS; lane++) {
        result |= (unsigned)emulator::exchanged[first + lane] << lane;
    }
    emulator::wait_for_warp();
    return result;
}

inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }

inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// What intrinsics.cu does by instructions of the device.
inline float half_to_float(unsigned short bits) {
    _Float16 value;
    std::memcpy(&value, &bits, sizeof value);
    return (float)value;
}

inline unsigned short float_to_half(float value) {
    const _Float16 half = (_Float16)value;
    unsigned short bits;
    std::memcpy(&bits, &half, sizeof bits);
    return bits;
}

inline unsigned short float_to_bfloat(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (value != value) return (unsigned short)(bits >> 16 | 0x40);
    return (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
