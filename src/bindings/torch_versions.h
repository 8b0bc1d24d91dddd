// Put in front of all C++ (.cargo/config.toml): what torch-sys 0.26, written for torch 2.13, calls and later ones have
// no more under these names. Nothing of ours calls it; it only has to compile.

#pragma once

#include <torch/version.h>

#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 13
#error "increlora_rs builds for torch 2.13 and later; for 2.11 and 2.12 there is `make wheel TORCH=2.11.0`"
#endif

#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 14

#include <ATen/ATen.h>

namespace torch {

inline at::Tensor cholesky(const at::Tensor &self, bool upper) { return at::linalg_cholesky(self, upper); }

inline at::Tensor &cholesky_out(at::Tensor &out, const at::Tensor &self, bool upper) {
  return at::linalg_cholesky_out(out, self, upper);
}

inline std::tuple<at::Tensor, at::Tensor> qr(const at::Tensor &self, bool some) {
  return at::linalg_qr(self, some ? "reduced" : "complete");
}

inline std::tuple<at::Tensor &, at::Tensor &> qr_out(at::Tensor &q, at::Tensor &r, const at::Tensor &self, bool some) {
  return at::linalg_qr_out(q, r, self, some ? "reduced" : "complete");
}

} // namespace torch

#endif
