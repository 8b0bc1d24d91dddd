//! How much what a component does fluctuates: of its first-order effect on the loss
//! `p = <s b E a^T, G> = E dL/dE`, the mean square about a running mean, all modules at once.
//!
//! Around a point where training has settled, the mean of p says nothing, and its variance over batches is
//! `dW^T F dW` with F the covariance of the gradients, Fisher's approximation of the curvature: to second
//! order what the loss would gain if the component were taken away.

use tch::{Device, Kind, Tensor};

use crate::checks;
use crate::errors::{Error, Result};

/// The running sums, float64 vectors with a slot for each component of all modules, in model order.
#[derive(Debug)]
pub struct Sums<'a> {
    /// The running mean of p.
    pub mean: &'a mut Tensor,
    /// The squares of p about it, summed.
    pub squares: &'a mut Tensor,
    /// Steps that the mean holds.
    pub steps: &'a mut Tensor,
}

/// Takes one optimizer step in, in place:
///
/// ```text
/// weight  <- max(1 / (steps + 1), rate)
/// squares <- squares + (1 - weight) (p - mean)^2
/// mean    <- mean + weight (p - mean)
/// steps   <- steps + 1
/// ```
///
/// `values` holds E (rank, 1) of each module, `gradients` those of it; a module without one counts as one of
/// gradient 0. With a `grad_scale`, one number, gradients carry that scale. A step in which any p is not
/// finite changes nothing.
pub fn observe_(
    values: &[Tensor],
    gradients: &[Option<Tensor>],
    sums: Sums<'_>,
    rate: f64,
    grad_scale: Option<&Tensor>,
) -> Result<()> {
    let device = check(values, gradients, &sums, rate, grad_scale)?;
    let mut effects = Vec::with_capacity(values.len());
    let mut slopes = Vec::with_capacity(values.len());
    for (value, gradient) in values.iter().zip(gradients) {
        effects.push(value.f_detach()?.f_reshape([-1])?);
        slopes.push(match gradient {
            Some(gradient) => gradient.f_reshape([-1])?,
            None => effects[effects.len() - 1].f_zeros_like()?,
        });
    }
    let wide = |parts: &[Tensor]| -> Result<Tensor> {
        Ok(Tensor::f_cat(parts, 0)?.f_to_device(device)?.f_to_kind(Kind::Double)?)
    };
    let mut effect = wide(&effects)?.f_mul(&wide(&slopes)?)?;
    if let Some(scale) = grad_scale {
        let scale = scale.f_to_device(device)?.f_to_kind(Kind::Double)?.f_reshape([1])?;
        effect = effect.f_div(&scale)?;
    }
    let finite = effect.f_isfinite()?.f_all()?.f_to_kind(Kind::Double)?;
    let effect = effect.f_nan_to_num(0.0, 0.0, 0.0)?;
    let weight = sums.steps.f_add_scalar(1.0)?.f_reciprocal()?.f_clamp_min(rate)?;
    let apart = effect.f_sub(sums.mean)?.f_mul(&finite)?;
    let rest = weight.f_neg()?.f_add_scalar(1.0)?;
    let _ = sums.squares.f_add_(&apart.f_square()?.f_mul(&rest)?)?;
    let _ = sums.mean.f_add_(&apart.f_mul(&weight)?)?;
    let _ = sums.steps.f_add_(&finite)?;
    Ok(())
}

fn check(
    values: &[Tensor],
    gradients: &[Option<Tensor>],
    sums: &Sums<'_>,
    rate: f64,
    grad_scale: Option<&Tensor>,
) -> Result<Device> {
    if values.is_empty() {
        return Err(Error::Value("values is empty; give those of one module or more".into()));
    }
    checks::one_each("gradients", gradients, values.len())?;
    for (k, (value, gradient)) in values.iter().zip(gradients).enumerate() {
        let name = format!("values[{k}]");
        checks::float(&name, value)?;
        if let Some(gradient) = gradient {
            let name = format!("gradients[{k}]");
            checks::float(&name, gradient)?;
            checks::shape(&name, gradient, &value.size())?;
            checks::same_device(&name, gradient, "its value", value)?;
        }
    }
    let components: i64 = values.iter().map(|value| value.numel() as i64).sum();
    for (name, vector) in
        [("mean", &*sums.mean), ("squares", &*sums.squares), ("steps", &*sums.steps)]
    {
        checks::kind(name, vector, Kind::Double)?;
        checks::shape(name, vector, &[components])?;
        checks::same_device(name, vector, "mean", sums.mean)?;
    }
    if !(rate > 0.0 && rate <= 1.0) {
        return Err(Error::Value(format!("rate is {rate}; give a number above 0 and at most 1")));
    }
    if let Some(scale) = grad_scale {
        checks::one_number("grad_scale", scale)?;
    }
    Ok(sums.mean.device())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zeros() -> [Tensor; 3] {
        [(); 3].map(|()| Tensor::zeros([3], (Kind::Double, Device::Cpu)))
    }

    fn observe(sums: &mut [Tensor; 3], effects: [f32; 3], scale: Option<f32>) {
        let values =
            [Tensor::from_slice(&[2.0f32, 4.0]).view([2, 1]), Tensor::from_slice(&[1.0f32])];
        let gradients = [
            Some(Tensor::from_slice(&[effects[0] / 2.0, effects[1] / 4.0]).view([2, 1])),
            (effects[2] != 0.0).then(|| Tensor::from_slice(&[effects[2]])),
        ];
        let scale = scale.map(|scale| Tensor::from_slice(&[scale]));
        let [mean, squares, steps] = sums;
        observe_(&values, &gradients, Sums { mean, squares, steps }, 0.5, scale.as_ref()).unwrap();
    }

    #[test]
    fn squares_are_taken_about_a_running_mean() {
        let mut sums = zeros();
        observe(&mut sums, [6.0, 1.0, 0.0], None);
        assert_eq!(sums[0], Tensor::from_slice(&[6.0, 1.0, 0.0]));
        assert_eq!(sums[1], Tensor::from_slice(&[0.0, 0.0, 0.0]));
        observe(&mut sums, [2.0, 1.0, 4.0], None);
        assert_eq!(sums[0], Tensor::from_slice(&[4.0, 1.0, 2.0]));
        assert_eq!(sums[1], Tensor::from_slice(&[8.0, 0.0, 8.0]));
        // From here on the rate is more than one over the steps.
        observe(&mut sums, [8.0, 1.0, 2.0], None);
        assert_eq!(sums[0], Tensor::from_slice(&[6.0, 1.0, 2.0]));
        assert_eq!(sums[1], Tensor::from_slice(&[16.0, 0.0, 8.0]));
        assert_eq!(sums[2], Tensor::from_slice(&[3.0, 3.0, 3.0]));
    }

    #[test]
    fn a_scale_of_the_gradients_does_not_count() {
        let (mut plain, mut scaled) = (zeros(), zeros());
        observe(&mut plain, [1.0, 2.0, 4.0], None);
        observe(&mut scaled, [8.0, 16.0, 32.0], Some(8.0));
        assert_eq!(plain, scaled);
    }

    #[test]
    fn a_step_that_is_not_finite_changes_nothing() {
        let mut sums = zeros();
        observe(&mut sums, [1.0, 2.0, 4.0], None);
        let before = sums.each_ref().map(Tensor::copy);
        observe(&mut sums, [f32::INFINITY, 2.0, 7.0], None);
        assert_eq!(sums, before);
    }
}
