//! Loops that libtorch does badly or not at all, on raw slices. The only place with `unsafe`.

pub mod cuda;
pub mod dropout;
