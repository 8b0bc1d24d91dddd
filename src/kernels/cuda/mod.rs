//! Kernels for CUDA devices, compiled at run time ([`compile`]) and launched on torch's current stream
//! ([`runtime`]). The sources are the `.cu` files beside this one.
//!
//! Every function says whether it took the call. Where it did not (no driver, no compiler, a dtype that no
//! kernel is for), nothing has happened and the caller does the work through libtorch; [`unavailable`]
//! tells why.

pub mod bindings;
pub mod compile;
mod factors;
mod layer;
mod newborn;
mod runtime;
mod score;
mod step;

pub use factors::{factors, gradients, Parameters};
pub use layer::{add_grad_x, apply_mask, down, draw_mask, takes};
pub use newborn::{keep as keep_newborns, mix as mix_newborns, Part};
pub use runtime::{emulate, kernels, unavailable, EmulatedLaunch, Stream};
pub use score::accumulate;
pub use step::{add_orthogonality_gradient_, smooth_};

/// Loads the kernels of device `ordinal`, compiling them if no process did before; the reason where that
/// fails. Otherwise the first call that needs them does it, which a CUDA graph capture may not.
pub fn prepare(ordinal: usize) -> Result<(), String> {
    runtime::device(ordinal).map(|_| ())
}
