//! How sensitive the loss is to each number of a parameter, smoothed over the steps.

use super::real::Real;
use super::split::split;

/// A parameter with its gradient, and what is smoothed of it.
pub struct Job<'a, T> {
    /// The parameter.
    pub values: &'a [T],
    /// Its gradient; `None`: 0.
    pub gradients: Option<&'a [T]>,
    /// The smoothed sensitivities.
    pub mean: &'a mut [T],
    /// Their uncertainties.
    pub uncertainty: &'a mut [T],
}

/// Takes `I = |value * gradient|` of one step in, over torch's threads:
///
/// ```text
/// mean        <- beta1 mean + (1 - beta1) I
/// uncertainty <- beta2 uncertainty + (1 - beta2) |I - mean|      (the new mean)
/// ```
///
/// A number whose I is not finite keeps what it has.
pub fn run<T: Real>(jobs: &mut [Job<'_, T>], beta1: f64, beta2: f64) {
    split(
        jobs,
        |job| job.mean.len(),
        |part| part.iter_mut().for_each(|job| one(job, beta1, beta2)),
    );
}

fn one<T: Real>(job: &mut Job<'_, T>, beta1: f64, beta2: f64) {
    let (old1, new1) = (T::nearest(beta1), T::nearest(1.0 - beta1));
    let (old2, new2) = (T::nearest(beta2), T::nearest(1.0 - beta2));
    let smoothed = job.mean.iter_mut().zip(job.uncertainty.iter_mut());
    let Some(gradients) = job.gradients else {
        for (mean, uncertainty) in smoothed {
            *mean = old1 * *mean;
            *uncertainty = old2 * *uncertainty + new2 * mean.abs();
        }
        return;
    };
    for ((mean, uncertainty), (value, gradient)) in smoothed.zip(job.values.iter().zip(gradients)) {
        let importance = (*value * *gradient).abs();
        let new_mean = old1 * *mean + new1 * importance;
        let new_uncertainty = old2 * *uncertainty + new2 * (importance - new_mean).abs();
        let finite = importance < T::nearest(f64::INFINITY);
        *mean = if finite { new_mean } else { *mean };
        *uncertainty = if finite { new_uncertainty } else { *uncertainty };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_step() {
        let (mut mean, mut uncertainty) = ([2.0f32, 2.0, 2.0], [1.0f32, 1.0, 1.0]);
        let mut job = Job {
            values: &[2.0, -1.0, 1.0],
            gradients: Some(&[2.0, 2.0, f32::NAN]),
            mean: &mut mean,
            uncertainty: &mut uncertainty,
        };
        one(&mut job, 0.5, 0.75);
        assert_eq!(mean, [3.0, 2.0, 2.0]);
        assert_eq!(uncertainty, [1.0, 0.75, 1.0]);
    }

    #[test]
    fn without_a_gradient_the_mean_decays() {
        let (mut mean, mut uncertainty) = ([4.0f64], [8.0]);
        let mut job =
            Job { values: &[2.0], gradients: None, mean: &mut mean, uncertainty: &mut uncertainty };
        one(&mut job, 0.5, 0.75);
        assert_eq!((mean, uncertainty), ([2.0], [6.5]));
    }
}
