//! How an update acts on the input of a module: forward and backward. Each op adds to what [`base`] makes.

pub mod base;
pub mod block_diagonal;
pub mod dropout;
pub mod low_rank;
pub mod square;
