//! The restart warm-up of new components: a row born during training follows its own learning-rate
//! multiplier and its own Adam bias correction, realised after the optimizer's step on the rows
//! concerned (arXiv 2308.12043, section 3.3; the arithmetic is in [`crate::allocation`]).

use tch::{Kind, Tensor};

use crate::allocation::{adam_ratio, restart_ratio, LearningRate};
use crate::checks;
use crate::errors::{Error, Result};

/// What the optimizer's step was, as far as its rows need it.
pub struct Step {
    /// Learning-rate schedule; `None` leaves the multiplier to the optimizer.
    pub learning_rate: Option<LearningRate>,
    /// Adam's betas; `None` for optimizers without bias correction.
    pub betas: Option<(f64, f64)>,
    /// Decoupled weight decay of the step: learning rate times weight decay.
    pub decay: f64,
    /// The step that the optimizer has just taken; the first is 1.
    pub step: u64,
    /// Steps that the optimizer had taken before the first counted one.
    pub lead: u64,
}

impl Step {
    /// The factors `(f, g)` with which a row born at `birth` becomes `f * new + g * old`.
    pub fn factors(&self, birth: u64) -> (f64, f64) {
        let rate = self.learning_rate.map_or(1.0, |lr| restart_ratio(&lr, birth, self.step));
        let bias = self.betas.map_or(1.0, |betas| adam_ratio(betas, birth, self.step, self.lead));
        // The decoupled decay follows the learning rate but not the bias correction.
        let f = rate * bias;
        (f, 1.0 - rate * self.decay - f * (1.0 - self.decay))
    }
}

/// Corrects, in place, the rows of `parameter` (its columns with `dim` 1) after an optimizer step.
///
/// `old` is the parameter before the step, `births` the step at which each row was born (0 for rows
/// that were there from the start).
pub fn correct_(
    parameter: &mut Tensor,
    old: &Tensor,
    births: &[u64],
    dim: i64,
    step: &Step,
) -> Result<()> {
    let (rows, columns) = checks::matrix("parameter", parameter)?;
    checks::shape("old", old, &[rows, columns])?;
    if dim != 0 && dim != 1 {
        return Err(Error::Value(format!("dim is {dim}; it must be 0 or 1")));
    }
    let length = if dim == 0 { rows } else { columns };
    checks::one_each("births", births, length as usize)?;
    let (f, g): (Vec<f64>, Vec<f64>) = births.iter().map(|&birth| step.factors(birth)).unzip();
    if f.iter().all(|&f| f == 1.0) && g.iter().all(|&g| g == 0.0) {
        return Ok(());
    }
    let wide = if parameter.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let shape = if dim == 0 { [-1, 1] } else { [1, -1] };
    let factor = |values: &[f64]| -> Result<Tensor> {
        let vector = Tensor::f_from_slice(values)?.f_to_kind(wide)?;
        Ok(vector.f_reshape(shape)?.f_to_device(parameter.device())?)
    };
    let (f, g) = (factor(&f)?, factor(&g)?);
    let new = parameter.f_to_kind(wide)?.f_mul(&f)?.f_add(&old.f_to_kind(wide)?.f_mul(&g)?)?;
    parameter.f_copy_(&new)?;
    Ok(())
}
