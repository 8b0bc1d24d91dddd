//! Loops that libtorch does badly or not at all, on raw slices. The only place with `unsafe`.

pub mod blend;
pub mod cuda;
pub mod dropout;
pub mod energy;
pub mod fluctuation;
pub mod groups;
pub mod orthonormal;
pub mod philox;
pub mod plain;
pub mod pool;
mod real;
pub mod rounds;
pub mod rows;
pub mod score;
pub mod simd;
pub mod smooth;
mod split;
pub mod take;
pub mod tokens;
