//! Type 6 by the loops of [`crate::kernels::rounds`], float32 and bfloat16 on the CPU: the blocks of x are turned and
//! added up, one product with M takes them all, and what it gives is put into y in one pass. The products are as few
//! as the parts of y, even where x has more blocks.

use tch::{Kind, Tensor};

use super::Rotation;
use crate::errors::Result;
use crate::kernels::plain::as_slice;
use crate::kernels::rounds::{self, Angles, Rounds};
use crate::ops::base::Start;

/// A BLAS is slower by half where the sides of the matrices are no multiples of this.
const GRAIN: usize = 16;

/// Can the loops work on this matrix of tokens?
pub fn takes(m: &Tensor, tokens: &Tensor) -> bool {
    rounds::takes(tokens) && m.kind() != Kind::Double
}

/// How the rows of x and y lie over the parts that M multiplies.
struct Layout {
    features: usize,
    out: usize,
    side: usize,
    fold: bool,
    cos: Tensor,
    sin: Tensor,
}

impl Layout {
    fn of(rotation: &Rotation, m: &Tensor, x: &Tensor, y: &Tensor) -> Result<Self> {
        let float = |table: &Tensor| -> Result<Tensor> {
            Ok(table.f_to_kind(Kind::Float)?.f_contiguous()?)
        };
        Ok(Self {
            features: x.size2()?.1 as usize,
            out: y.size2()?.1 as usize,
            side: m.size2()?.0 as usize,
            fold: rotation.fold,
            cos: float(&rotation.cos)?,
            sin: float(&rotation.sin)?,
        })
    }

    fn parts(&self) -> usize {
        self.features.min(self.out).div_ceil(self.side)
    }

    fn width(&self) -> usize {
        self.side.next_multiple_of(GRAIN)
    }

    fn of_x(&self) -> Rounds<'_> {
        let (parts, count) = (self.parts(), self.features.div_ceil(self.side));
        Rounds {
            long: self.features,
            side: self.side,
            used: if self.fold { count } else { parts },
            parts,
            width: self.width(),
            wraps: true,
            angles: Some(Angles { cos: as_slice(&self.cos), sin: as_slice(&self.sin) }),
        }
    }

    fn of_y(&self) -> Rounds<'_> {
        Rounds {
            long: self.out,
            side: self.side,
            used: self.out.div_ceil(self.side),
            parts: self.parts(),
            width: self.width(),
            wraps: false,
            angles: None,
        }
    }

    /// M of the dtype of the products, with zeros to the width.
    fn padded(&self, m: &Tensor, kind: Kind) -> Result<Tensor> {
        let more = (self.width() - self.side) as i64;
        Ok(m.f_to_kind(kind)?.f_constant_pad_nd([0, more, 0, more])?)
    }

    /// The parts of all tokens one below the other, (tokens * parts, width): a view.
    fn below(&self, short: &Tensor) -> Result<Tensor> {
        let rows = short.size2()?.0 * self.parts() as i64;
        Ok(short.f_view([rows, self.width() as i64])?)
    }
}

/// As [`Rotation::put`]; false if not taken.
pub fn put(
    rotation: &Rotation,
    m: &Tensor,
    x: &Tensor,
    y: &mut Tensor,
    start: Start<'_>,
) -> Result<bool> {
    if !takes(m, x) || !takes(m, y) || x.kind() != y.kind() {
        return Ok(false);
    }
    let layout = Layout::of(rotation, m, x, y)?;
    let Some(turned) = rounds::fold(layout.of_x(), x)? else { return Ok(false) };
    let m = layout.padded(m, x.kind())?;
    let products = layout.below(&turned)?.f_mm(&m.f_tr()?)?.f_view(turned.size().as_slice())?;
    let bias = start.bias()?;
    rounds::unfold(layout.of_y(), &products, y, start.of_loops(bias.as_deref()))
}

/// As [`Rotation::gradients`], of matrices that are taken.
pub fn gradients(
    rotation: &Rotation,
    m: &Tensor,
    x: &Tensor,
    gy: &Tensor,
    needs_m: bool,
    grad_x: Option<(&mut Tensor, Start<'_>)>,
) -> Result<Option<Tensor>> {
    let layout = Layout::of(rotation, m, x, gy)?;
    let Some(summed) = rounds::fold(layout.of_y(), gy)? else { return Ok(None) };
    let below = layout.below(&summed)?;
    if let Some((grad_x, start)) = grad_x {
        let m = layout.padded(m, x.kind())?;
        let products = below.f_mm(&m)?.f_view(summed.size().as_slice())?;
        let bias = start.bias()?;
        rounds::unfold(layout.of_x(), &products, grad_x, start.of_loops(bias.as_deref()))?;
    }
    if !needs_m {
        return Ok(None);
    }
    let Some(turned) = rounds::fold(layout.of_x(), x)? else { return Ok(None) };
    let side = layout.side as i64;
    let all = left_transposed(&below, &layout.below(&turned)?)?;
    Ok(Some(all.f_narrow(0, 0, side)?.f_narrow(1, 0, side)?))
}

/// `left^T right` of matrices of many rows and few columns.
fn left_transposed(left: &Tensor, right: &Tensor) -> Result<Tensor> {
    let (rows, columns) = left.size2()?;
    // One product of bfloat16 takes a third longer than two of half the rows.
    if left.kind() != Kind::BFloat16 || rows % 2 != 0 {
        return Ok(left.f_tr()?.f_mm(right)?);
    }
    let half = |matrix: &Tensor| matrix.f_view([2, rows / 2, columns]);
    let halves = half(left)?.f_transpose(1, 2)?.f_bmm(&half(right)?)?;
    Ok(halves.f_sum_dim_intlist([0i64].as_slice(), false, Kind::Float)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn rows_in_halves_or_not_give_the_same_product() {
        for rows in [1, 2, 7, 64] {
            let random = || Tensor::randint(9, [rows, 16], (Kind::Double, Device::Cpu)) - 4.0;
            let (left, right) = (random(), random());
            let [a, b] = [&left, &right].map(|matrix| matrix.to_kind(Kind::BFloat16));
            let got = left_transposed(&a, &b).unwrap().to_kind(Kind::Double);
            assert!(got.allclose(&left.tr().mm(&right), 1e-2, 1.0, false), "{rows}");
        }
    }
}
