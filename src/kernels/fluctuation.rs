//! How much first-order effects fluctuate: the sums of [`crate::policies::fluctuation`] on slices.

use super::plain::{Plain, Real};

/// The running sums, a number a component.
pub struct Sums<'a> {
    /// The running mean of the effects.
    pub mean: &'a mut [f64],
    /// Their squares about it, summed.
    pub squares: &'a mut [f64],
    /// Steps that the mean holds.
    pub steps: &'a mut [f64],
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

/// Takes the effects of one step in, unless one is not finite.
pub fn observe(effects: &[f64], sums: Sums<'_>, rate: f64) {
    if !effects.iter().all(|effect| effect.is_finite()) {
        return;
    }
    let of_each = sums.mean.iter_mut().zip(sums.squares).zip(sums.steps);
    for (&effect, ((mean, square), step)) in effects.iter().zip(of_each) {
        let weight = (1.0 / (*step + 1.0)).max(rate);
        let apart = effect - *mean;
        *square += apart * apart * (1.0 - weight);
        *mean += apart * weight;
        *step += 1.0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mean_follows_and_squares_are_about_it() {
        let (mut mean, mut squares, mut steps) = ([1.0], [2.0], [3.0]);
        let sums = Sums { mean: &mut mean, squares: &mut squares, steps: &mut steps };
        observe(&[5.0], sums, 0.1);
        // 16 * 3 / 4 and 4 / 4.
        assert_eq!((mean, squares, steps), ([2.0], [14.0], [4.0]));
        let sums = Sums { mean: &mut mean, squares: &mut squares, steps: &mut steps };
        observe(&[f64::NAN], sums, 0.1);
        assert_eq!((mean, squares, steps), ([2.0], [14.0], [4.0]));
    }
}
