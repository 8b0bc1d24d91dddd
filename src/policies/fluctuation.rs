//! How much what a component does fluctuates: of its first-order effect on the loss
//! `p = <s b E a^T, G> = E dL/dE`, the mean square about a running mean, all modules at once.
//!
//! Around a point where training has settled, the mean of p says nothing, and its variance over batches is
//! `dW^T F dW` with F the covariance of the gradients, Fisher's approximation of the curvature: to second
//! order what the loss would gain if the component were taken away.

use tch::{Device, Kind, Tensor};

use crate::checks;
use crate::errors::{Error, Result};
use crate::kernels::fluctuation as loops;
use crate::kernels::plain::{self, Plain};

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

/// E of all modules, for every step.
pub struct Components {
    values: Vec<Tensor>,
}

impl Components {
    /// `values` holds leaves, E (rank, 1) of each module; they may change their size in place.
    pub fn new(values: Vec<Tensor>) -> Result<Self> {
        check_values(&values)?;
        Ok(Self { values })
    }

    /// [`observe_`] with the leaves' own gradients.
    pub fn observe_(&self, sums: Sums<'_>, rate: f64, grad_scale: Option<&Tensor>) -> Result<()> {
        let gradients = self.values.iter().map(|value| -> Result<_> {
            let gradient = value.f_grad()?;
            Ok(gradient.defined().then_some(gradient))
        });
        let gradients: Vec<_> = gradients.collect::<Result<_>>()?;
        observe_(&self.values, &gradients, sums, rate, grad_scale)
    }
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
    if observe_plain(values, gradients, &sums, rate, grad_scale)? {
        return Ok(());
    }
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

/// [`observe_`] on slices; false, with nothing done, where they are not to be had.
fn observe_plain(
    values: &[Tensor],
    gradients: &[Option<Tensor>],
    sums: &Sums<'_>,
    rate: f64,
    grad_scale: Option<&Tensor>,
) -> Result<bool> {
    if grad_scale.is_some_and(|scale| scale.device() != Device::Cpu) {
        return Ok(false);
    }
    let rows = [&*sums.mean, &*sums.squares, &*sums.steps].map(|vector| vector.f_view([1, -1]));
    let [Ok(mean), Ok(squares), Ok(steps)] = rows else { return Ok(false) };
    let [Some(mean), Some(squares), Some(steps)] = [&mean, &squares, &steps].map(Plain::of) else {
        return Ok(false);
    };
    if !plain::disjoint(std::iter::empty(), [mean, squares, steps].into_iter()) {
        return Ok(false);
    }
    let mut effects = Vec::with_capacity(mean.columns);
    for (value, gradient) in values.iter().zip(gradients) {
        let Some(value) = Plain::of(value) else { return Ok(false) };
        match gradient {
            None => loops::add_effects(&mut effects, &value, None),
            Some(gradient) => match Plain::of(gradient).filter(|found| found.is_like(&value)) {
                Some(gradient) => loops::add_effects(&mut effects, &value, Some(&gradient)),
                None => return Ok(false),
            },
        }
    }
    if let Some(scale) = grad_scale {
        let scale = scale.f_to_kind(Kind::Double)?.f_double_value(&[])?;
        effects.iter_mut().for_each(|effect| *effect /= scale);
    }
    let sums = loops::Sums {
        mean: mean.elements_mut(),
        squares: squares.elements_mut(),
        steps: steps.elements_mut(),
    };
    loops::observe(&effects, sums, rate);
    Ok(true)
}

fn check_values(values: &[Tensor]) -> Result<()> {
    if values.is_empty() {
        return Err(Error::Value("values is empty; give those of one module or more".into()));
    }
    for (k, value) in values.iter().enumerate() {
        numbered("values", k, |name| checks::float(name, value))?;
    }
    Ok(())
}

/// A check of one of many, whose number is written only where it fails.
fn numbered(name: &str, k: usize, check: impl Fn(&str) -> Result<()>) -> Result<()> {
    check(name).or_else(|_| check(&format!("{name}[{k}]")))
}

fn check(
    values: &[Tensor],
    gradients: &[Option<Tensor>],
    sums: &Sums<'_>,
    rate: f64,
    grad_scale: Option<&Tensor>,
) -> Result<Device> {
    check_values(values)?;
    checks::one_each("gradients", gradients, values.len())?;
    for (k, (value, gradient)) in values.iter().zip(gradients).enumerate() {
        let Some(gradient) = gradient else { continue };
        numbered("gradients", k, |name| {
            checks::float(name, gradient)?;
            checks::shape(name, gradient, &value.size())?;
            checks::same_device(name, gradient, "its value", value)
        })?;
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
        // One that is no matrix takes torch's way.
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

    #[test]
    fn slices_are_worked_on_as_torch_does_it() {
        tch::manual_seed(3);
        let random = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, Device::Cpu));
        let (mut ours, mut torchs) = (zeros(), zeros());
        for step in 0..20 {
            let values = [random(&[2, 1]), random(&[1, 1])];
            let gradients = [Some(random(&[2, 1])), (step != 5).then(|| random(&[1, 1]))];
            let scale = (step % 3 == 1).then(|| Tensor::from_slice(&[3.0f32]));
            for (sums, flat) in [(&mut ours, false), (&mut torchs, true)] {
                // Vectors are no matrices, and take torch's way.
                let shaped =
                    |tensor: &Tensor| if flat { tensor.reshape([-1]) } else { tensor.copy() };
                let values = values.each_ref().map(shaped);
                let gradients = gradients.each_ref().map(|found| found.as_ref().map(shaped));
                let [mean, squares, steps] = sums;
                let sums = Sums { mean, squares, steps };
                observe_(&values, &gradients, sums, 0.1, scale.as_ref()).unwrap();
            }
        }
        assert_eq!(ours, torchs);
    }

    #[test]
    fn components_are_observed_by_their_own_gradients() {
        let value = Tensor::from_slice(&[2.0f32, 4.0, 1.0]).view([3, 1]).set_requires_grad(true);
        let components = Components::new(vec![value.shallow_clone()]).unwrap();
        let [mut mean, mut squares, mut steps] = zeros();
        let mut observe = || {
            let sums = Sums { mean: &mut mean, squares: &mut squares, steps: &mut steps };
            components.observe_(sums, 0.5, None).unwrap();
        };
        observe();
        (&value * 3.0).sum(Kind::Float).backward();
        observe();
        assert_eq!(mean, Tensor::from_slice(&[3.0, 6.0, 1.5]));
        assert_eq!(squares, Tensor::from_slice(&[18.0, 72.0, 4.5]));
        assert_eq!(steps, Tensor::from_slice(&[2.0, 2.0, 2.0]));
    }
}
