//! The smoothing of the importances over the optimizer steps, all modules at once (arXiv 2308.12043, eq. 7 to
//! 9).

use tch::{Kind, Tensor};

use crate::checks;
use crate::errors::Result;
use crate::kernels::cuda;

/// Smooths the importances of one optimizer step into `mean` and `uncertainty`, in place:
///
/// ```text
/// mean        <- beta1 mean + (1 - beta1) I
/// uncertainty <- beta2 uncertainty + (1 - beta2) |I - mean|      (the new mean)
/// ```
///
/// with `I = importance * factor`. All three are float64 vectors, one slot a module. A step in which
/// any importance is not finite changes nothing.
pub fn smooth_(
    importance: &Tensor,
    factor: &Tensor,
    mean: &mut Tensor,
    uncertainty: &mut Tensor,
    beta1: f64,
    beta2: f64,
    queue: cuda::Stream,
) -> Result<()> {
    check(importance, factor, mean, uncertainty, beta1, beta2)?;
    if cuda::smooth_(importance, factor, mean, uncertainty, beta1, beta2, queue)? {
        return Ok(());
    }
    let importance = importance.f_mul(factor)?;
    let finite = importance.f_isfinite()?.f_all()?;
    let new_mean = mean.f_mul_scalar(beta1)?.f_add(&importance.f_mul_scalar(1.0 - beta1)?)?;
    let deviation = importance.f_sub(&new_mean)?.f_abs()?.f_mul_scalar(1.0 - beta2)?;
    let new_uncertainty = uncertainty.f_mul_scalar(beta2)?.f_add(&deviation)?;
    mean.f_copy_(&new_mean.f_where_self(&finite, mean)?)?;
    uncertainty.f_copy_(&new_uncertainty.f_where_self(&finite, uncertainty)?)?;
    Ok(())
}

/// Fails unless the arguments of [`smooth_`] fit together.
pub fn check(
    importance: &Tensor,
    factor: &Tensor,
    mean: &Tensor,
    uncertainty: &Tensor,
    beta1: f64,
    beta2: f64,
) -> Result<()> {
    let size = [checks::vector("importance", importance)?];
    let vectors = [
        ("importance", importance),
        ("factor", factor),
        ("mean", mean),
        ("uncertainty", uncertainty),
    ];
    for (name, vector) in vectors {
        checks::kind(name, vector, Kind::Double)?;
        checks::shape(name, vector, &size)?;
        checks::same_device(name, vector, "importance", importance)?;
    }
    checks::decay("beta1", beta1)?;
    checks::decay("beta2", beta2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_step_of_the_smoothing() {
        let (importance, factor) = (Tensor::from_slice(&[8.0]), Tensor::from_slice(&[0.5]));
        let (mut mean, mut uncertainty) = (Tensor::from_slice(&[2.0]), Tensor::from_slice(&[1.0]));
        smooth_(&importance, &factor, &mut mean, &mut uncertainty, 0.5, 0.75, cuda::Stream(0))
            .unwrap();
        // 0.5 * 2 + 0.5 * 4, then 0.75 * 1 + 0.25 * |4 - 3|.
        assert_eq!((mean, uncertainty), (Tensor::from_slice(&[3.0]), Tensor::from_slice(&[1.0])));
    }
}
