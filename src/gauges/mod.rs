//! What a backward pass adds up for a module, without ever forming its gradient.

pub mod sensitivity;
pub mod sketch;
