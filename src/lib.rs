//! IncreLoRA on torch tensors: the forward and backward of a low-rank update, the importance of a module, the
//! orthogonality regulariser and the growth of ranks (arXiv 2308.12043).
//!
//! Rooms by role, from the bottom: [`kernels`] are loops and launches, [`gauges`] add up what a backward pass
//! tells of a module, [`ops`] are how an update acts on x, [`policies`] what happens at an optimizer step. A
//! room imports from those before it only, and knows nothing of Python; [`bindings`] gives them to it as
//! `increlora_rs._core`.

pub mod bindings;
mod checks;
pub mod errors;
pub mod gauges;
pub mod kernels;
pub mod ops;
pub mod policies;

use pyo3::prelude::*;

/// The extension module.
#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    bindings::register(module)
}
