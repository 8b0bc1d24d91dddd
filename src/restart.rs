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
    /// Fails unless its numbers can be right.
    pub fn check(&self) -> Result<()> {
        if let Some(lr) = self.learning_rate {
            checks::finite("multiplier", lr.multiplier)?;
        }
        if let Some((beta1, beta2)) = self.betas {
            checks::decay("betas[0]", beta1)?;
            checks::decay("betas[1]", beta2)?;
        }
        checks::finite("decay", self.decay)
    }

    /// The factors `(f, g)` with which a row born at `birth` becomes `f * new + g * old`.
    pub fn factors(&self, birth: u64) -> (f64, f64) {
        let rate = self.learning_rate.map_or(1.0, |lr| restart_ratio(&lr, birth, self.step));
        let bias = self.betas.map_or(1.0, |betas| adam_ratio(betas, birth, self.step, self.lead));
        // The decoupled decay follows the learning rate but not the bias correction.
        let f = rate * bias;
        (f, 1.0 - rate * self.decay - f * (1.0 - self.decay))
    }
}

/// Fails unless the arguments of [`correct_`] fit together.
pub fn check(parameter: &Tensor, old: &Tensor, births: &[u64], dim: i64) -> Result<()> {
    let (rows, columns) = checks::matrix("parameter", parameter)?;
    checks::float("parameter", parameter)?;
    checks::float("old", old)?;
    checks::same_device("old", old, "parameter", parameter)?;
    checks::shape("old", old, &[rows, columns])?;
    if dim != 0 && dim != 1 {
        return Err(Error::Value(format!("dim is {dim}; it must be 0 or 1")));
    }
    let length = if dim == 0 { rows } else { columns };
    checks::one_each("births", births, length as usize)
}

/// Corrects, in place, the rows of `parameter` (its columns with `dim` 1) after an optimizer step.
///
/// `old` is the parameter before the step, `births` the step at which each row was born (0 for rows
/// that were there from the start). The arguments have passed [`check`].
pub fn correct_(
    parameter: &mut Tensor,
    old: &Tensor,
    births: &[u64],
    dim: i64,
    step: &Step,
) -> Result<()> {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn step() -> Step {
        let rate = LearningRate { multiplier: 0.75, warmup: 10, linear_until: Some(100) };
        Step {
            learning_rate: Some(rate),
            betas: Some((0.9, 0.999)),
            decay: 0.01,
            step: 30,
            lead: 4,
        }
    }

    #[test]
    fn rows_from_the_start_keep_what_the_optimizer_gave_them() {
        assert_eq!(step().factors(0), (1.0, 0.0));
    }

    #[test]
    fn decay_follows_the_learning_rate_and_not_the_bias_correction() {
        let (old, update) = (3.0, 0.2);
        let new = old * (1.0 - 0.01) - update;
        let (f, g) = step().factors(25);
        // Age 5 of a climb of 10 steps: m_new = 0.5 under m = 0.75.
        let rate = 0.5 / 0.75;
        let bias = adam_ratio((0.9, 0.999), 25, 30, 4);
        let want = old * (1.0 - rate * 0.01) - rate * bias * update;
        assert!((f * new + g * old - want).abs() < 1e-14);
    }

    #[test]
    fn without_a_learning_rate_only_the_bias_is_corrected() {
        let (f, _) = Step { learning_rate: None, ..step() }.factors(25);
        assert_eq!(f, adam_ratio((0.9, 0.999), 25, 30, 4));
    }

    #[test]
    fn without_a_schedule_and_betas_every_row_is_left_alone() {
        let (f, g) = Step { learning_rate: None, betas: None, ..step() }.factors(25);
        assert_eq!((f, g), (1.0, 0.0));
    }

    #[test]
    fn columns_are_born_where_dim_is_one() {
        let mut parameter = Tensor::from_slice(&[1.0, 2.0, 3.0, 4.0]).reshape([2, 2]);
        let old = Tensor::zeros([2, 2], (Kind::Double, tch::Device::Cpu));
        let lr = LearningRate { multiplier: 1.0, warmup: 4, linear_until: None };
        let step = Step { learning_rate: Some(lr), betas: None, decay: 0.0, step: 3, lead: 0 };
        correct_(&mut parameter, &old, &[0, 2], 1, &step).unwrap();
        let want = Tensor::from_slice(&[1.0, 0.5, 3.0, 1.0]).reshape([2, 2]);
        assert_eq!(parameter, want);
    }
}
