//! How an update acts on the input of a module: forward and backward. Each op adds to what [`base`] makes.

pub mod base;
pub mod dropout;
pub mod low_rank;
