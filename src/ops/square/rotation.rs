//! Type 6, rotation: block i of x, turned by the angles of R_i, times one matrix M. Where the loops of [`cpu`] can, they
//! turn the tokens and add up the blocks that one part of y takes, before the product; elsewhere it is the matrix that
//! is turned, M R_i once a call, and the stack (blocks, q, q) is the largest thing that is made.

use tch::Tensor;

use super::shares::Blocks;
use super::sums::Pattern;
use crate::checks;
use crate::errors::{Error, Result};
use crate::ops::base::Start;

mod cpu;

/// How type 6 turns the blocks.
pub struct Rotation {
    /// Cosines of the angles of every block, (blocks, q / 2).
    pub cos: Tensor,
    /// Sines.
    pub sin: Tensor,
    /// Do input blocks beyond the outputs' go to the first ones again, or nowhere?
    pub fold: bool,
}

impl Rotation {
    /// Fails unless it has the angles for `features` inputs and a matrix of `side` rows.
    pub fn check(&self, m: &Tensor, features: i64) -> Result<()> {
        let side = m.size2()?.0;
        if side % 2 != 0 {
            return Err(Error::Value(format!(
                "M has {side} rows; type 6 turns pairs: it must be even"
            )));
        }
        let blocks = (features + side - 1) / side;
        for (name, table) in [("cos", &self.cos), ("sin", &self.sin)] {
            checks::kind(name, table, m.kind())?;
            checks::shape(name, table, &[blocks, side / 2])?;
            checks::same_device(name, table, "M", m)?;
        }
        Ok(())
    }

    /// `M R_i` of every block, (blocks, q, q), of an M with the scale in it.
    fn turned(&self, m: &Tensor) -> Result<Tensor> {
        let half = m.size2()?.0 / 2;
        let (first, second) = (m.f_narrow(1, 0, half)?, m.f_narrow(1, half, half)?);
        let (cos, sin) = (self.cos.f_unsqueeze(1)?, self.sin.f_unsqueeze(1)?);
        let left = cos.f_mul(&first)?.f_add_(&sin.f_mul(&second)?)?;
        let right = cos.f_mul(&second)?.f_sub_(&sin.f_mul(&first)?)?;
        Ok(Tensor::f_cat(&[left, right], 2)?)
    }

    /// The gradient of M from those of all `M R_i`.
    fn turned_back(&self, gradients: &Tensor) -> Result<Tensor> {
        let half = gradients.size3()?.2 / 2;
        let (left, right) = (gradients.f_narrow(2, 0, half)?, gradients.f_narrow(2, half, half)?);
        let (cos, sin) = (self.cos.f_unsqueeze(1)?, self.sin.f_unsqueeze(1)?);
        let first = cos.f_mul(&left)?.f_sub_(&sin.f_mul(&right)?)?;
        let second = sin.f_mul(&left)?.f_add_(&cos.f_mul(&right)?)?;
        let sum = |part: Tensor| part.f_sum_dim_intlist([0i64].as_slice(), false, gradients.kind());
        Ok(Tensor::f_cat(&[sum(first)?, sum(second)?], 1)?)
    }

    /// Puts the update of `x` (tokens, in), dropped, into `y` (tokens, out), which holds what `start` says. `m` has
    /// the scale and the dropout's gain in it.
    pub fn put(&self, m: &Tensor, x: &Tensor, y: &mut Tensor, start: Start<'_>) -> Result<()> {
        if cpu::put(self, m, x, y, start)? {
            return Ok(());
        }
        start.write(y)?;
        let blocks = self.blocks(m, x.size2()?.1, y.size2()?.1)?;
        let turned = self.turned(m)?.f_to_kind(x.kind())?;
        if blocks.period == y.size2()?.1 && y.kind() == x.kind() {
            return add_products(&blocks, &turned, x, y);
        }
        let size = [x.size2()?.0, blocks.period];
        let products = Tensor::f_zeros(size, (x.kind(), x.device()))?;
        add_products(&blocks, &turned, x, &products)?;
        Pattern::Cyclic.put(&products, y, Start::Add, false)
    }

    /// The gradient of M, without the scale, where it is needed, from `gy` (tokens, out), of the dtype of x; that
    /// of x is put into `grad_x` (tokens, in). `m` as for [`Rotation::put`].
    pub fn gradients(
        &self,
        m: &Tensor,
        x: &Tensor,
        gy: &Tensor,
        needs_m: bool,
        mut grad_x: Option<(&mut Tensor, Start<'_>)>,
    ) -> Result<Option<Tensor>> {
        if cpu::takes(m, x) && cpu::takes(m, gy) {
            return cpu::gradients(self, m, x, gy, needs_m, grad_x);
        }
        if let Some((grad_x, start)) = &mut grad_x {
            start.write(grad_x)?;
        }
        let (features, side) = (x.size2()?.1, m.size2()?.0);
        let blocks = self.blocks(m, features, gy.size2()?.1)?;
        let summed = if blocks.period == gy.size2()?.1 {
            gy.shallow_clone()
        } else {
            Pattern::Cyclic.sum(gy, blocks.period, false)?
        };
        let grad_m = if needs_m {
            let of_blocks = Tensor::f_zeros([blocks.count, side, side], (x.kind(), x.device()))?;
            for piece in &blocks.pieces {
                let left = summed.f_narrow(1, piece.out, piece.rows)?.f_tr()?;
                let right = x.f_narrow(1, piece.columns.long, piece.columns.length)?;
                let mut part = block_part(&of_blocks, piece)?;
                let _ = part.f_addmm_(&left, &right)?;
            }
            Some(self.turned_back(&of_blocks.f_to_kind(m.kind())?)?)
        } else {
            None
        };
        if let Some((grad_x, _)) = grad_x {
            let turned = self.turned(m)?.f_to_kind(x.kind())?;
            for piece in &blocks.pieces {
                let left = summed.f_narrow(1, piece.out, piece.rows)?;
                let mut part = grad_x.f_narrow(1, piece.columns.long, piece.columns.length)?;
                let _ = part.f_addmm_(&left, &block_part(&turned, piece)?)?;
            }
        }
        Ok(grad_m)
    }

    fn blocks(&self, m: &Tensor, features: i64, out: i64) -> Result<Blocks> {
        Ok(Blocks::of(features, out, m.size2()?.0, self.fold))
    }
}

fn add_products(blocks: &Blocks, turned: &Tensor, x: &Tensor, y: &Tensor) -> Result<()> {
    for piece in &blocks.pieces {
        let left = x.f_narrow(1, piece.columns.long, piece.columns.length)?;
        let mut part = y.f_narrow(1, piece.out, piece.rows)?;
        let _ = part.f_addmm_(&left, &block_part(turned, piece)?.f_tr()?)?;
    }
    Ok(())
}

/// The part of a piece's block that it takes, (rows, columns): a view.
fn block_part(blocks: &Tensor, piece: &super::shares::Piece) -> Result<Tensor> {
    let block = blocks.f_select(0, piece.block)?.f_narrow(0, 0, piece.rows)?;
    Ok(block.f_narrow(1, piece.columns.short, piece.columns.length)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    #[test]
    fn the_first_block_stands_and_the_second_is_turned() {
        // Two blocks of a pair each, the second turned by a quarter: R_1 (a, b) = (-b, a).
        let table = |values: &[f64]| Tensor::from_slice(values).reshape([2, 1]);
        let rotation = Rotation { cos: table(&[1.0, 0.0]), sin: table(&[0.0, 1.0]), fold: true };
        let m = Tensor::eye(2, (Kind::Double, Device::Cpu));
        let x = Tensor::from_slice(&[1.0, 2.0, 3.0, 4.0]).reshape([1, 4]);
        let mut y = Tensor::zeros([1, 4], (Kind::Double, Device::Cpu));
        rotation.put(&m, &x, &mut y, Start::Add).unwrap();
        assert_eq!(y, Tensor::from_slice(&[1.0, 2.0, -4.0, 3.0]).reshape([1, 4]));
    }

    #[test]
    fn the_loops_turn_what_libtorch_turns() {
        let random =
            |rows: i64, columns: i64| Tensor::randn([rows, columns], (Kind::Double, Device::Cpu));
        // Blocks of inputs and outputs: as many, fewer inputs, fewer outputs, less than one.
        for (features, out, fold) in
            [(40, 44, true), (20, 75, true), (75, 20, true), (75, 20, false), (5, 7, true)]
        {
            let (side, tokens) = (12, 19);
            let m = random(side, side);
            let (x, gy, bias) = (random(tokens, features), random(tokens, out), random(1, out));
            let angles = random((features + side - 1) / side, side / 2);
            let run = |kind: Kind| {
                let [m, x, gy, bias, cos, sin] =
                    [&m, &x, &gy, &bias, &angles.cos(), &angles.sin()].map(|t| t.to_kind(kind));
                let rotation = Rotation { cos, sin, fold };
                let of = |columns| Tensor::full([tokens, columns], f64::NAN, (kind, Device::Cpu));
                let (mut y, mut grad_x) = (of(out), of(features));
                rotation.put(&m, &x, &mut y, Start::Bias(Some(&bias.get(0)))).unwrap();
                let to = Some((&mut grad_x, Start::Bias(None)));
                let grad_m = rotation.gradients(&m, &x, &gy, true, to).unwrap().unwrap();
                [y, grad_x, grad_m].map(|t| t.to_kind(Kind::Double))
            };
            for (got, want) in run(Kind::Float).iter().zip(run(Kind::Double)) {
                assert!(got.allclose(&want, 1e-4, 1e-4, false), "{features} {out} {fold}");
            }
        }
    }

    #[test]
    fn an_odd_matrix_is_refused() {
        let table = Tensor::zeros([1, 1], (Kind::Double, Device::Cpu));
        let rotation = Rotation { cos: table.shallow_clone(), sin: table, fold: true };
        let m = Tensor::zeros([3, 3], (Kind::Double, Device::Cpu));
        let error = rotation.check(&m, 3).unwrap_err();
        assert_eq!(error.to_string(), "M has 3 rows; type 6 turns pairs: it must be even");
    }
}
