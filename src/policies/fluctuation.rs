//! How much what a component does fluctuates: of its first-order effect on the loss
//! `p = <s b E a^T, G> = E dL/dE`, the mean square about a running mean, all modules at once.
//!
//! Each step's effects are held against their own root mean square over all components: as the loss falls all
//! of them get smaller, and what a component did early would outweigh what it does now.
//!
//! Around a point where training has settled, the mean of p says nothing, and its variance over batches is
//! `dW^T F dW` with F the covariance of the gradients, Fisher's approximation of the curvature: to second
//! order what the loss would gain if the component were taken away.

use tch::{Device, Kind, Tensor};

use crate::checks;
use crate::errors::{Error, Result};
use crate::kernels::fluctuation::{self as loops, Rates};
use crate::kernels::plain::{self, Plain};

/// The running means, float64 vectors with a slot for each component of all modules, in model order.
#[derive(Debug)]
pub struct Means<'a> {
    /// Of p.
    pub mean: &'a mut Tensor,
    /// Of the squares of p about it.
    pub squares: &'a mut Tensor,
    /// Steps that they hold.
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
    pub fn observe_(&self, means: Means<'_>, rates: Rates) -> Result<()> {
        let gradients = self.values.iter().map(|value| -> Result<_> {
            let gradient = value.f_grad()?;
            Ok(gradient.defined().then_some(gradient))
        });
        let gradients: Vec<_> = gradients.collect::<Result<_>>()?;
        observe_(&self.values, &gradients, means, rates)
    }
}

/// Takes one optimizer step in, in place:
///
/// ```text
/// p       <- p / sqrt(mean p^2 over all components)
/// weight  <- max(1 / (steps + 1), rates.mean)
/// share   <- max(1 / max(steps, 1), rates.squares)
/// squares <- squares + share ((1 - weight) (p - mean)^2 - squares)
/// mean    <- mean + weight (p - mean)
/// steps   <- steps + 1
/// ```
///
/// `values` holds E (rank, 1) of each module, `gradients` those of it; a module without one counts as one of
/// gradient 0. A factor that all gradients carry does not count. A step in which any p is not finite changes
/// nothing.
pub fn observe_(
    values: &[Tensor],
    gradients: &[Option<Tensor>],
    means: Means<'_>,
    rates: Rates,
) -> Result<()> {
    if observe_plain(values, gradients, &means, rates)? {
        return Ok(());
    }
    let device = check(values, gradients, &means, rates)?;
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
    let effect = wide(&effects)?.f_mul(&wide(&slopes)?)?;
    if effect.numel() == 0 {
        return Ok(());
    }
    let finite = effect.f_isfinite()?.f_all()?.f_to_kind(Kind::Double)?;
    let effect = effect.f_nan_to_num(0.0, 0.0, 0.0)?;
    // By the largest first, for a square of what is far from 1 is no number; of zeros nothing is divided.
    let largest = effect.f_abs()?.f_max()?.f_clamp_min(f64::MIN_POSITIVE)?;
    let effect = effect.f_div(&largest)?;
    let size = effect.f_square()?.f_mean(None)?.f_sqrt()?.f_clamp_min(f64::MIN_POSITIVE)?;
    let apart = effect.f_div(&size)?.f_sub(means.mean)?;
    let weight = means.steps.f_add_scalar(1.0)?.f_reciprocal()?.f_clamp_min(rates.mean)?;
    let share = means.steps.f_clamp_min(1.0)?.f_reciprocal()?.f_clamp_min(rates.squares)?;
    let rest = weight.f_neg()?.f_add_scalar(1.0)?;
    let change = apart.f_square()?.f_mul(&rest)?.f_sub(means.squares)?;
    let _ = means.squares.f_add_(&change.f_mul(&share)?.f_mul(&finite)?)?;
    let _ = means.mean.f_add_(&apart.f_mul(&weight)?.f_mul(&finite)?)?;
    let _ = means.steps.f_add_(&finite)?;
    Ok(())
}

/// [`observe_`] on slices; false, with nothing done, where they are not to be had. Such tensors pass [`check`] by what is
/// asked here, which every step pays for.
fn observe_plain(
    values: &[Tensor],
    gradients: &[Option<Tensor>],
    means: &Means<'_>,
    rates: Rates,
) -> Result<bool> {
    let vectors = [&*means.mean, &*means.squares, &*means.steps];
    if vectors.iter().any(|vector| vector.dim() != 1) {
        return Ok(false);
    }
    let rows = vectors.map(|vector| vector.f_view([1, -1]));
    let [Ok(mean), Ok(squares), Ok(steps)] = rows else { return Ok(false) };
    let [Some(mean), Some(squares), Some(steps)] = [&mean, &squares, &steps].map(Plain::of) else {
        return Ok(false);
    };
    let found = [mean, squares, steps];
    let of_one_size = found.iter().all(|one| one.kind == Kind::Double && one.is_like(&mean));
    let fit = of_one_size && !values.is_empty() && values.len() == gradients.len();
    if !fit || rates.refusal().is_some() || !plain::disjoint(std::iter::empty(), found.into_iter())
    {
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
    if effects.len() != mean.columns {
        return Ok(false);
    }
    let means = loops::Means {
        mean: mean.elements_mut(),
        squares: squares.elements_mut(),
        steps: steps.elements_mut(),
    };
    loops::observe(&mut effects, means, rates);
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
    means: &Means<'_>,
    rates: Rates,
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
        [("mean", &*means.mean), ("squares", &*means.squares), ("steps", &*means.steps)]
    {
        checks::kind(name, vector, Kind::Double)?;
        checks::shape(name, vector, &[components])?;
        checks::same_device(name, vector, "mean", means.mean)?;
    }
    match rates.refusal() {
        Some((name, rate)) => {
            Err(Error::Value(format!("{name} is {rate}; give a number above 0 and at most 1")))
        }
        None => Ok(means.mean.device()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATES: Rates = Rates { mean: 0.1, squares: 0.05 };

    fn zeros() -> [Tensor; 3] {
        [(); 3].map(|()| Tensor::zeros([3], (Kind::Double, Device::Cpu)))
    }

    fn observe(all: &mut [Tensor; 3], values: &[Tensor], gradients: &[Option<Tensor>]) {
        let [mean, squares, steps] = all;
        observe_(values, gradients, Means { mean, squares, steps }, RATES).unwrap();
    }

    fn assert_close(ours: &[Tensor; 3], others: &[Tensor; 3]) {
        for (our, other) in ours.iter().zip(others) {
            let apart = (our - other).abs().max().double_value(&[]);
            assert!(apart < 1e-12, "{our} is not {other}");
        }
    }

    #[test]
    fn slices_are_worked_on_as_torch_does_it() {
        tch::manual_seed(3);
        let random = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, Device::Cpu));
        let (mut ours, mut torchs) = (zeros(), zeros());
        for step in 0..30 {
            let values = [random(&[2, 1]), random(&[1, 1])];
            let mut gradients = [Some(random(&[2, 1])), (step != 5).then(|| random(&[1, 1]))];
            if step == 8 {
                gradients[0] = Some(Tensor::from_slice(&[f32::INFINITY, 1.0]).view([2, 1]));
            }
            if step == 11 {
                gradients = [None, None];
            }
            // Vectors are no matrices, and take torch's way.
            let flat = |tensor: &Tensor| tensor.reshape([-1]);
            observe(&mut ours, &values, &gradients);
            observe(
                &mut torchs,
                &values.each_ref().map(flat),
                &gradients.each_ref().map(|found| found.as_ref().map(flat)),
            );
            assert_close(&ours, &torchs);
        }
        assert_eq!(ours[2], Tensor::from_slice(&[29.0; 3]));
    }

    #[test]
    fn components_are_observed_by_their_own_gradients() {
        let value = Tensor::from_slice(&[2.0f32, 4.0, 1.0]).view([3, 1]).set_requires_grad(true);
        let components = Components::new(vec![value.shallow_clone()]).unwrap();
        let (mut found, mut wanted) = (zeros(), zeros());
        let mut observe_own = || {
            let [mean, squares, steps] = &mut found;
            components.observe_(Means { mean, squares, steps }, RATES).unwrap();
        };
        observe_own();
        (&value * 3.0).sum(Kind::Float).backward();
        observe_own();
        let values = [value.detach()];
        observe(&mut wanted, &values, &[None]);
        observe(&mut wanted, &values, &[Some(Tensor::from_slice(&[3.0f32; 3]).view([3, 1]))]);
        assert_close(&found, &wanted);
        assert!(found[0].abs().min().double_value(&[]) > 0.0);
    }
}
