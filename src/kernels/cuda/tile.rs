//! The tiles of a matrix by which blocks of threads share it.

use super::list::Kernels;

pub(super) const KERNELS: Kernels = Kernels::of(include_str!("tile.cu"));

// As tile.cu has them.
/// Threads of a tile.
pub const TILE_THREADS: u32 = 256;
/// Rows of a tile.
pub const TILE_ROWS: i64 = 64;
/// Features of a tile.
const TILE_FEATURES: i64 = 256;

/// The grid of tiles over a matrix.
pub fn tiles(rows: i64, features: i64) -> (i64, i64) {
    ((rows + TILE_ROWS - 1) / TILE_ROWS, (features + TILE_FEATURES - 1) / TILE_FEATURES)
}
