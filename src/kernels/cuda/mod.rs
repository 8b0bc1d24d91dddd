//! Kernels for CUDA devices, compiled at run time ([`compile`]) and launched on torch's current stream
//! ([`runtime`]). A file has the launches of the kernels in the `.cu` file beside it.
//!
//! Every function says whether it took the call. Where it did not (no driver, no compiler, a dtype that no
//! kernel is for), nothing has happened and the caller does the work through libtorch; [`unavailable`]
//! tells why. Whether a call of a layer is taken depends on the device and the dtype of x alone ([`takes`]),
//! never on shapes, so that every mask of a training has one form; shapes that a fused kernel cannot do are
//! composed of others.

pub mod compile;
mod down;
mod dropout;
mod factors;
mod grad_x;
mod list;
mod newborn;
mod operands;
mod orthogonality;
mod runtime;
mod score;
mod smooth;
mod tile;

pub use down::down;
pub use dropout::{apply_mask, draw_mask};
pub use factors::{gradients, scaled, Parameters};
pub use grad_x::add_grad_x;
pub use newborn::{keep as keep_newborns, mix as mix_newborns, Part};
pub use orthogonality::add_orthogonality_gradient_;
pub use runtime::{emulate, takes, unavailable, EmulatedLaunch, Stream};
pub use score::accumulate;
pub use smooth::smooth_;

/// All kernels, in the order in which their sources need each other. A new file of kernels has its line here.
const KERNELS: [list::Kernels; 9] = [
    dropout::KERNELS,
    down::KERNELS,
    tile::KERNELS,
    grad_x::KERNELS,
    score::KERNELS,
    smooth::KERNELS,
    orthogonality::KERNELS,
    factors::KERNELS,
    newborn::KERNELS,
];

/// The names of all kernels.
pub fn kernels() -> Vec<String> {
    KERNELS.iter().flat_map(list::Kernels::names).collect()
}

/// Loads the kernels of device `ordinal`, compiling them if no process did before; the reason where that
/// fails. Otherwise the first call that needs them does it, which a CUDA graph capture may not.
pub fn prepare(ordinal: usize) -> Result<(), String> {
    runtime::device(ordinal).map(|_| ())
}
