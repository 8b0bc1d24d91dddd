//! The update of one module by a square matrix M (q, q) between a fixed compression of x and a fixed decompression
//! to y, `y += s D M C drop(x)`, forward and backward (MoRA, arXiv 2405.12130, eq. 6; type 6, eq. 9, in
//! [`rotation`]).

use tch::{Kind, Tensor};

use self::rotation::Rotation;
use self::sums::Pattern;
use crate::checks;
use crate::errors::{Error, Result};
use crate::ops::base::{self, Start};
use crate::ops::dropout::Dropout;

pub mod rotation;
pub mod shares;
pub mod sums;

/// The fixed maps around M.
pub enum Form {
    /// Types 1 to 4: sums of inputs, and outputs that repeat what M gives.
    Sums {
        /// Which inputs are summed.
        down: Pattern,
        /// Which outputs repeat one position.
        up: Pattern,
    },
    /// Type 6.
    Rotation(Rotation),
}

impl Form {
    /// The form of type `number`; type 6 with the cosines and sines of its angles.
    pub fn of(number: i64, angles: Option<(Tensor, Tensor)>, fold: bool) -> Result<Self> {
        let (down, up) = match (number, angles) {
            (1, None) => (Pattern::Cyclic, Pattern::Cyclic),
            (2, None) => (Pattern::Neighbours, Pattern::Neighbours),
            (3, None) => (Pattern::Neighbours, Pattern::Cyclic),
            (4, None) => (Pattern::Cyclic, Pattern::Neighbours),
            (6, Some((cos, sin))) => return Ok(Self::Rotation(Rotation { cos, sin, fold })),
            _ => {
                return Err(Error::Value(format!(
                    "form is {number}; it must be 1, 2, 3 or 4, or 6 with the tables cos and sin"
                )))
            }
        };
        Ok(Self::Sums { down, up })
    }
}

/// The parameters of one adapted module.
pub struct Square {
    /// M, (q, q).
    pub m: Tensor,
    /// The scale s.
    pub scale: f64,
    /// What is around it.
    pub form: Form,
}

/// What the backward pass gives; `None` where it was not asked for.
pub struct Gradients {
    /// For x, flat (tokens, in).
    pub x: Option<Tensor>,
    /// For M.
    pub m: Option<Tensor>,
}

/// What a backward pass is given beside the gradient of y.
pub struct Given<'a> {
    /// Features of x.
    pub features: i64,
    /// What [`forward`] gave, for types 1 to 4.
    pub kept: Option<&'a Tensor>,
    /// x, flat, for type 6.
    pub x: Option<&'a Tensor>,
    /// The dtype of x.
    pub kind: Kind,
    /// The dropout of x.
    pub dropout: Option<&'a Dropout>,
    /// Of the base layer: the gradient of x is then the whole layer's.
    pub weight: Option<&'a Tensor>,
    /// Are the gradients of M and of x wanted?
    pub needs: (bool, bool),
}

impl Square {
    fn check(&self, features: i64) -> Result<i64> {
        checks::float("M", &self.m)?;
        let (side, _) = checks::matrix("M", &self.m)?;
        checks::shape("M", &self.m, &[side.max(1), side.max(1)])?;
        checks::finite("scale", self.scale)?;
        if let Form::Rotation(rotation) = &self.form {
            rotation.check(&self.m, features)?;
        }
        Ok(side)
    }

    /// M times the scale and the dropout's gain.
    fn scaled(&self, gain: f64) -> Result<Tensor> {
        let factor = self.scale * gain;
        if factor == 1.0 {
            return Ok(self.m.shallow_clone());
        }
        Ok(self.m.f_mul_scalar(factor)?)
    }
}

/// Forward. Puts the update of `x` (tokens, in) into `y` (tokens, out), contiguous, which holds what `start` says.
/// Gives what the backward pass of types 1 to 4 needs, `C drop(x)` without the dropout's gain, (tokens, q); type 6
/// needs x.
pub fn forward(
    square: &Square,
    x: &Tensor,
    y: &mut Tensor,
    start: Start<'_>,
    dropout: Option<&mut Dropout>,
) -> Result<Option<Tensor>> {
    for (name, tensor) in [("x", x), ("y", &*y), ("M", &square.m)] {
        checks::float(name, tensor)?;
        checks::same_device(name, tensor, "x", x)?;
    }
    let (tokens, features) = checks::matrix("x", x)?;
    let side = square.check(features)?;
    let (_, out) = checks::matrix("y", y)?;
    checks::shape("y", y, &[tokens, out])?;
    let m = square.scaled(Dropout::gain(dropout.as_deref()))?;
    let dropped = Dropout::drop(dropout, &x.f_contiguous()?)?;
    match &square.form {
        Form::Sums { down, up } => {
            let sums = down.sum(&dropped, side, true)?;
            up.put(&sums.f_mm(&m.f_to_kind(x.kind())?.f_tr()?)?, y, start, false)?;
            Ok(Some(sums))
        }
        Form::Rotation(rotation) => {
            rotation.put(&m, &dropped, y, start)?;
            Ok(None)
        }
    }
}

/// Backward: the gradients for x and M from `gy`, the gradient of y (tokens, out).
pub fn backward(square: &Square, gy: &Tensor, given: &Given<'_>) -> Result<Gradients> {
    let side = square.check(given.features)?;
    checks::float("gy", gy)?;
    checks::same_device("gy", gy, "M", &square.m)?;
    let (tokens, out) = checks::matrix("gy", gy)?;
    let gy = gy.f_to_kind(given.kind)?.f_contiguous()?;
    let gain = Dropout::gain(given.dropout);
    let (m, (needs_m, needs_x)) = (square.scaled(gain)?, given.needs);
    if let Some(weight) = given.weight {
        checks::kind("weight", weight, given.kind)?;
        checks::same_device("weight", weight, "gy", &gy)?;
        checks::shape("weight", weight, &[out, given.features])?;
    }
    // The base layer's share, to which the update's is added; what a dropout may zero comes first.
    let (mut grad_x, start) = match (given.weight, given.dropout) {
        (Some(weight), None) if needs_x => (Some(gy.f_mm(weight)?), Start::Add),
        _ => {
            let size = [tokens, given.features];
            let empty = || Tensor::f_empty(size, (given.kind, gy.device()));
            (needs_x.then(empty).transpose()?, Start::Bias(None))
        }
    };
    let grad_m = match &square.form {
        Form::Sums { down, up } => {
            let sums = given.kept.ok_or_else(|| missing("kept"))?;
            checks::shape("kept", sums, &[tokens, side])?;
            let u = up.sum(&gy, side, false)?;
            let grad_m =
                if needs_m { Some(u.f_tr()?.f_mm(&sums.f_to_kind(given.kind)?)?) } else { None };
            if let Some(grad_x) = &mut grad_x {
                down.put(&u.f_mm(&m.f_to_kind(given.kind)?)?, grad_x, start, true)?;
            }
            grad_m
        }
        Form::Rotation(rotation) => {
            let x = given.x.ok_or_else(|| missing("x"))?.f_to_kind(given.kind)?.f_contiguous()?;
            checks::shape("x", &x, &[tokens, given.features])?;
            let dropped = Dropout::drop_again(given.dropout, &x)?;
            let grad_x = grad_x.as_mut().map(|grad_x| (grad_x, start));
            rotation.gradients(&m, &dropped, &gy, needs_m, grad_x)?
        }
    };
    let m = match grad_m {
        Some(grad) => Some(
            grad.f_to_kind(square.m.kind())?.f_mul_scalar(square.scale * gain)?.f_contiguous()?,
        ),
        None => None,
    };
    if let (Some(grad_x), Some(dropout)) = (&mut grad_x, given.dropout) {
        Dropout::zero_gradient_(Some(dropout), grad_x)?;
        if let Some(weight) = given.weight {
            base::add_grad_x(weight, &gy, grad_x)?;
        }
    }
    Ok(Gradients { x: grad_x, m })
}

fn missing(name: &str) -> Error {
    Error::Value(format!("{name} is None; give the one of the forward"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(rows: i64, values: &[f64]) -> Tensor {
        Tensor::from_slice(values).reshape([rows, -1])
    }

    fn first_type() -> Square {
        let form = Form::of(1, None, true).unwrap();
        Square { m: matrix(2, &[1.0, 2.0, 3.0, 4.0]), scale: 0.5, form }
    }

    #[test]
    fn forward_sums_multiplies_and_repeats() {
        let mut y = matrix(1, &[100.0, 200.0, 300.0]);
        // The sums are (1 + 3, 2 + 1): the row is filled from its beginning.
        let x = matrix(1, &[1.0, 2.0, 3.0]);
        let kept = forward(&first_type(), &x, &mut y, Start::Add, None).unwrap();
        assert_eq!(kept, Some(matrix(1, &[4.0, 3.0])));
        assert_eq!(y, matrix(1, &[105.0, 212.0, 305.0]));
    }

    #[test]
    fn backward_gives_the_gradients() {
        let kept = matrix(1, &[4.0, 3.0]);
        let given = Given {
            features: 3,
            kept: Some(&kept),
            x: None,
            kind: Kind::Double,
            dropout: None,
            weight: None,
            needs: (true, true),
        };
        // Outputs 0 and 2 are one: u = (1 + 3, 2).
        let got = backward(&first_type(), &matrix(1, &[1.0, 2.0, 3.0]), &given).unwrap();
        assert_eq!(got.m, Some(matrix(2, &[8.0, 6.0, 4.0, 3.0])));
        // u M s = (5, 8); input 0 is in both sums.
        assert_eq!(got.x, Some(matrix(1, &[13.0, 8.0, 5.0])));
    }

    #[test]
    fn types_that_there_are_not_are_refused() {
        for (number, angles) in [(0, false), (5, false), (7, false), (6, false), (1, true)] {
            let table = angles.then(|| (matrix(1, &[1.0]), matrix(1, &[0.0])));
            assert!(Form::of(number, table, true).is_err(), "{number}");
        }
    }
}
