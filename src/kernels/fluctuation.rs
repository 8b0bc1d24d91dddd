//! How much first-order effects fluctuate: the means of [`crate::policies::fluctuation`] on slices.

use super::plain::{Plain, Real};

/// The running means, a number a component.
pub struct Means<'a> {
    /// Of the effects.
    pub mean: &'a mut [f64],
    /// Of their squares about it.
    pub squares: &'a mut [f64],
    /// Steps that they hold.
    pub steps: &'a mut [f64],
}

/// How much of a running mean is the last step's, at least; above 0 and at most 1.
#[derive(Debug, Clone, Copy)]
pub struct Rates {
    /// Of the mean of the effects.
    pub mean: f64,
    /// Of the mean of their squares.
    pub squares: f64,
}

impl Rates {
    /// Name and value of one that is none; None: both are.
    pub fn refusal(&self) -> Option<(&'static str, f64)> {
        let named = [("mean_rate", self.mean), ("square_rate", self.squares)];
        named.into_iter().find(|&(_, rate)| !(rate > 0.0 && rate <= 1.0))
    }
}

/// Appends value times gradient of each number of a parameter; without a gradient it is 0. Both are of one type.
pub fn add_effects(effects: &mut Vec<f64>, value: &Plain<'_>, gradient: Option<&Plain<'_>>) {
    add_products::<f32>(effects, value, gradient);
    add_products::<f64>(effects, value, gradient);
}

fn add_products<T: Real>(effects: &mut Vec<f64>, value: &Plain<'_>, gradient: Option<&Plain<'_>>) {
    let values = value.elements::<T>();
    match gradient {
        // What is not finite is to be noticed here, too.
        None => effects.extend(values.iter().map(|value| value.wide() * 0.0)),
        Some(gradient) => {
            let pairs = values.iter().zip(gradient.elements::<T>());
            effects.extend(pairs.map(|(value, gradient)| value.wide() * gradient.wide()));
        }
    }
}

/// Takes the effects of one step in, over their root mean square, unless one is not finite.
pub fn observe(effects: &mut [f64], means: Means<'_>, rates: Rates) {
    if !effects.iter().all(|effect| effect.is_finite()) {
        return;
    }
    // By the largest first, for a square of what is far from 1 is no number; of zeros nothing is divided.
    let largest = effects.iter().fold(f64::MIN_POSITIVE, |most, effect| most.max(effect.abs()));
    effects.iter_mut().for_each(|effect| *effect /= largest);
    let squares: f64 = effects.iter().map(|effect| effect * effect).sum();
    let size = (squares / effects.len() as f64).sqrt().max(f64::MIN_POSITIVE);
    let of_each = means.mean.iter_mut().zip(means.squares).zip(means.steps);
    for (&mut effect, ((mean, square), step)) in effects.iter_mut().zip(of_each) {
        let weight = (1.0 / (*step + 1.0)).max(rates.mean);
        let share = (1.0 / step.max(1.0)).max(rates.squares);
        let apart = effect / size - *mean;
        *square += (apart * apart * (1.0 - weight) - *square) * share;
        *mean += apart * weight;
        *step += 1.0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATES: Rates = Rates { mean: 0.5, squares: 0.25 };
    type Three = [f64; 3];

    fn after(steps: &[Three]) -> [Three; 3] {
        let mut all = [[0.0; 3]; 3];
        for effects in steps {
            let [mean, squares, steps] = &mut all;
            observe(&mut effects.clone(), Means { mean, squares, steps }, RATES);
        }
        all
    }

    #[test]
    fn a_mean_follows_and_squares_are_about_it() {
        // Of root mean square 1.
        let (one, two) = ([1.0, -1.0, 1.0], [1.0, 1.0, -1.0]);
        assert_eq!(after(&[one]), [one, [0.0; 3], [1.0; 3]]);
        assert_eq!(after(&[one, two]), [[1.0, 0.0, 0.0], [0.0, 2.0, 2.0], [2.0; 3]]);
        // From here on the mean's rate is more than one over the steps.
        let wanted = [[1.0, -0.5, 0.5], [0.0, 1.25, 1.25], [3.0; 3]];
        assert_eq!(after(&[one, two, one]), wanted);
        assert_eq!(after(&[one, two, one, [1.0, f64::NAN, 0.0]]), wanted);
    }

    #[test]
    fn a_factor_of_all_effects_does_not_count() {
        let steps = [[1.0, 2.0, 4.0], [3.0, -1.0, 0.0]];
        for exponent in [-1000, -3, 1000] {
            let scaled = steps.map(|effects| effects.map(|effect| effect * 2f64.powi(exponent)));
            assert_eq!(after(&scaled), after(&steps));
        }
    }

    #[test]
    fn effects_of_nothing_are_none() {
        assert_eq!(after(&[[0.0; 3]]), [[0.0; 3], [0.0; 3], [1.0; 3]]);
        let mut effects: [f64; 0] = [];
        observe(&mut effects, Means { mean: &mut [], squares: &mut [], steps: &mut [] }, RATES);
    }
}
