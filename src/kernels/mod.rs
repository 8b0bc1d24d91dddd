//! Loops that libtorch does badly or not at all, on raw slices. The only place with `unsafe`.

pub mod blend;
pub mod dropout;
pub mod orthonormal;
pub mod plain;
mod real;
mod split;
