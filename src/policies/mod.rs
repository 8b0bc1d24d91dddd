//! What happens at an optimizer step, for all modules in one call.

pub mod fluctuation;
pub mod gate;
pub mod growth;
pub mod moves;
pub mod orthogonality;
pub mod restart;
pub mod smoothing;
pub mod sparsify;
pub mod step;
pub mod triplets;
