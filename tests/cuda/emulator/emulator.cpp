// The kernels as they are, compiled for the CPU, and a launch by name with the arguments that the CUDA
// driver takes: an address for each.

#include "cuda.hpp"

#include <map>
#include <string>
#include <tuple>
#include <utility>

#include "prelude.cu"
#include "dropout.cu"
#include "down.cu"
#include "tile.cu"
#include "grad_x.cu"
#include "score.cu"
#include "smooth.cu"
#include "orthogonality.cu"
#include "factors.cu"
#include "newborn.cu"

namespace {

using Launch = std::function<void(void**)>;

template <typename... Parameters, size_t... Index>
Launch launch(void (*kernel)(Parameters...), std::index_sequence<Index...>) {
    using Types = std::tuple<std::decay_t<Parameters>...>;
    return [kernel](void** arguments) { kernel(*(std::tuple_element_t<Index, Types>*)arguments[Index]...); };
}

template <typename... Parameters>
Launch launch(void (*kernel)(Parameters...)) {
    return launch(kernel, std::index_sequence_for<Parameters...>());
}

const std::map<std::string, Launch> kernels = {
#define ONE(NAME) {#NAME, launch(NAME)},
#define EACH(NAME) ONE(NAME##_f32) ONE(NAME##_f16) ONE(NAME##_bf16)
    ONE(dropout_bits) ONE(score_total) ONE(smooth) ONE(orthogonality_residual)
    EACH(apply_mask) EACH(down_8) EACH(down_16) EACH(add_grad_x) EACH(score_tile)
    EACH(orthogonality_gram) EACH(orthogonality_gradient) EACH(keep_newborns) EACH(mix_newborns)
#define PAIRS(NAME) EACH(NAME##_f32) ONE(NAME##_f16_f16) ONE(NAME##_bf16_bf16)
    PAIRS(factors) PAIRS(gradients)
#undef PAIRS
#undef EACH
#undef ONE
};

std::string launched;

}  // namespace

// 0, or why not: see emulator::Result.
extern "C" int emulator_launch(
    const char* name, unsigned grid_x, unsigned grid_y, unsigned threads, void** arguments) {
    const auto found = kernels.find(name);
    if (found == kernels.end()) return emulator::UNKNOWN;
    launched += std::string(name) + "\n";
    const Launch& kernel = found->second;
    return emulator::run({grid_x, grid_y}, threads, [&] { kernel(arguments); });
}

// Lets the threads of every block run from the last to the first.
extern "C" void emulator_reverse(int reversed) { emulator::reversed = reversed != 0; }

// The names of the kernels launched since the last call, a line each.
extern "C" const char* emulator_launched() {
    static std::string result;
    result.swap(launched);
    launched.clear();
    return result.c_str();
}

extern "C" void emulator_philox(u64 key, const u32* counter, u32* out) {
    const Words words = philox(key, Words{{counter[0], counter[1], counter[2], counter[3]}});
    std::memcpy(out, words.at, sizeof words.at);
}

// Rounds a float to the 16-bit types, to check the emulator's own conversions.
extern "C" void emulator_round(float value, unsigned short* half, unsigned short* bfloat) {
    *half = float_to_half(value);
    *bfloat = float_to_bfloat(value);
}
