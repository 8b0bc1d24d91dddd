//! IncreLoRA on torch tensors: the adapter's forward and backward, the importance of a module, the
//! orthogonality regulariser and the allocation of ranks (arXiv 2308.12043).
//!
//! The rooms know nothing of Python; [`bindings`] gives them to it as `increlora_rs._core`.

pub mod adapter;
pub mod allocation;
pub mod bindings;
mod checks;
pub mod errors;
pub mod importance;
pub mod kernels;
pub mod orthogonality;
pub mod restart;
pub mod sketch;
pub mod step;

use pyo3::prelude::*;

/// The extension module.
#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    bindings::register(module)
}
