//! What a backward pass adds up for a module, without ever forming its gradient.

pub mod energy;
pub mod sensitivity;
pub mod sketch;
pub mod sketch_scores;
