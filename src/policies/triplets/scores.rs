//! How sensitive the loss is to each number of AdaLoRA's triplets (arXiv 2303.10512, section 3.2), smoothed over
//! the steps, and what that makes of a triplet; all modules at once.

use std::iter;

use tch::{Kind, Tensor};

use crate::checks;
use crate::errors::{Error, Result};
use crate::kernels::plain::{self, Plain, Real};
use crate::kernels::smooth::{self, Job};

/// The sensitivities of the triplets of all modules.
pub struct Scores {
    modules: Vec<Module>,
    mean: Tensor,
    uncertainty: Tensor,
    beta1: f64,
    beta2: f64,
}

/// The parameters of a module: A (rank, in), B (out, rank), E (rank, 1).
struct Module {
    a: Tensor,
    b: Tensor,
    e: Tensor,
}

impl Module {
    /// In the order in which `mean` and `uncertainty` hold their numbers.
    fn leaves(&self) -> [&Tensor; 3] {
        [&self.a, &self.b, &self.e]
    }
}

impl Scores {
    /// `a`, `b` and `e` hold leaves, (rank, in), (out, rank) and (rank, 1), one of each a module. `mean` and
    /// `uncertainty` are vectors, float32 or float64, with a slot for each of their numbers: module by module,
    /// A, B and E after each other, row by row. They are changed in place.
    pub fn new(
        a: Vec<Tensor>,
        b: Vec<Tensor>,
        e: Vec<Tensor>,
        mean: Tensor,
        uncertainty: Tensor,
        beta1: f64,
        beta2: f64,
    ) -> Result<Self> {
        if a.is_empty() {
            return Err(Error::Value("a is empty; give the matrices of one module or more".into()));
        }
        checks::one_each("b", &b, a.len())?;
        checks::one_each("e", &e, a.len())?;
        let modules: Vec<_> =
            a.into_iter().zip(b).zip(e).map(|((a, b), e)| Module { a, b, e }).collect();
        let mut numbers = 0;
        for (k, Module { a, b, e }) in modules.iter().enumerate() {
            let (rank, _) = checks::matrix(&format!("a[{k}]"), a)?;
            let (out, _) = checks::matrix(&format!("b[{k}]"), b)?;
            checks::shape(&format!("b[{k}]"), b, &[out, rank])?;
            checks::shape(&format!("e[{k}]"), e, &[rank, 1])?;
            for (name, leaf) in [("a", a), ("b", b), ("e", e)] {
                checks::float(&format!("{name}[{k}]"), leaf)?;
                numbers += leaf.numel() as i64;
            }
        }
        for (name, vector) in [("mean", &mean), ("uncertainty", &uncertainty)] {
            checks::shape(name, vector, &[numbers])?;
            if vector.kind() != Kind::Float {
                checks::kind(name, vector, Kind::Double)?;
            }
            checks::kind(name, vector, mean.kind())?;
            checks::same_device(name, vector, "mean", &mean)?;
        }
        checks::decay("beta1", beta1)?;
        checks::decay("beta2", beta2)?;
        Ok(Self { modules, mean, uncertainty, beta1, beta2 })
    }

    /// Takes the gradients of one step in, with the parameters as they are:
    ///
    /// ```text
    /// I           =  |p dL/dp|
    /// mean        <- beta1 mean + (1 - beta1) I
    /// uncertainty <- beta2 uncertainty + (1 - beta2) |I - mean|      (the new mean)
    /// ```
    ///
    /// for every number p. A parameter without a gradient counts as one of gradient 0; a number whose I is not
    /// finite keeps what it has.
    pub fn observe_(&mut self) -> Result<()> {
        let gradients = self.gradients()?;
        if self.observe_slices(&gradients)? {
            return Ok(());
        }
        let leaves = self.modules.iter().flat_map(Module::leaves);
        let slopes = leaves.clone().zip(&gradients).map(|(leaf, gradient)| match gradient {
            Some(gradient) => Ok(gradient.shallow_clone()),
            None => Ok(leaf.f_zeros_like()?),
        });
        let slopes = slopes.collect::<Result<Vec<_>>>()?;
        let importance = self.flat(leaves)?.f_mul(&self.flat(slopes.iter())?)?.f_abs()?;
        let finite = importance.f_isfinite()?;
        let mean = self.mean.f_mul_scalar(self.beta1)?;
        let mean = mean.f_add(&importance.f_mul_scalar(1.0 - self.beta1)?)?;
        let deviation = importance.f_sub(&mean)?.f_abs()?.f_mul_scalar(1.0 - self.beta2)?;
        let uncertainty = self.uncertainty.f_mul_scalar(self.beta2)?.f_add(&deviation)?;
        self.mean.f_copy_(&mean.f_where_self(&finite, &self.mean)?)?;
        self.uncertainty.f_copy_(&uncertainty.f_where_self(&finite, &self.uncertainty)?)?;
        Ok(())
    }

    /// The score of every triplet i of every module, in model order, a float64 vector:
    /// `s(E_i) + mean_j s(A_ij) + mean_j s(B_ji)` with `s = mean * uncertainty`.
    pub fn values(&self) -> Result<Tensor> {
        let (mean, uncertainty) = (row(&self.mean)?, row(&self.uncertainty)?);
        if let (Some(mean), Some(uncertainty)) = (Plain::of(&mean), Plain::of(&uncertainty)) {
            let mut values = self.values_of_slices::<f32>(mean, uncertainty);
            values.extend(self.values_of_slices::<f64>(mean, uncertainty));
            return Ok(Tensor::from_slice(&values));
        }
        let all = self.mean.f_to_kind(Kind::Double)?;
        let all = all.f_mul(&self.uncertainty.f_to_kind(Kind::Double)?)?;
        let mut start = 0;
        let mut values = Vec::with_capacity(self.modules.len());
        for module in &self.modules {
            let mut next = |leaf: &Tensor| -> Result<Tensor> {
                let part = all.f_narrow(0, start, leaf.numel() as i64)?.f_view(&leaf.size()[..])?;
                start += leaf.numel() as i64;
                Ok(part)
            };
            let [a, b, e] = module.leaves();
            let a = next(a)?.f_mean_dim(1, false, Kind::Double)?;
            let b = next(b)?.f_mean_dim(0, false, Kind::Double)?;
            values.push(next(e)?.f_view([-1])?.f_add(&a)?.f_add(&b)?);
        }
        Ok(Tensor::f_cat(&values, 0)?)
    }

    fn gradients(&self) -> Result<Vec<Option<Tensor>>> {
        let leaves = self.modules.iter().flat_map(Module::leaves);
        let gradient = |leaf: &Tensor| -> Result<Option<Tensor>> {
            let gradient = leaf.f_grad()?;
            Ok(gradient.defined().then_some(gradient))
        };
        leaves.map(gradient).collect()
    }

    /// In one vector where `mean` is, of its dtype: a few launches then do for all modules.
    fn flat<'a>(&self, tensors: impl Iterator<Item = &'a Tensor>) -> Result<Tensor> {
        let device = self.mean.device();
        let rows = tensors
            .map(|tensor| Ok(tensor.f_detach()?.f_reshape([-1])?.f_to_device(device)?))
            .collect::<Result<Vec<_>>>()?;
        Ok(Tensor::f_cat(&rows, 0)?.f_to_kind(self.mean.kind())?)
    }

    /// [`Self::observe_`] by a loop over slices; false where they are none.
    fn observe_slices(&mut self, gradients: &[Option<Tensor>]) -> Result<bool> {
        let (mean, uncertainty) = (row(&self.mean)?, row(&self.uncertainty)?);
        let (Some(mean), Some(uncertainty)) = (Plain::of(&mean), Plain::of(&uncertainty)) else {
            return Ok(false);
        };
        let leaves = self.modules.iter().flat_map(Module::leaves).zip(gradients);
        let pairs: Option<Vec<_>> = leaves
            .map(|(leaf, gradient)| {
                let leaf = Plain::of(leaf).filter(|leaf| leaf.kind == mean.kind)?;
                let Some(gradient) = gradient else { return Some((leaf, None)) };
                let gradient = Plain::of(gradient).filter(|gradient| gradient.is_like(&leaf))?;
                Some((leaf, Some(gradient)))
            })
            .collect();
        let Some(pairs) = pairs else { return Ok(false) };
        let read = pairs.iter().flat_map(|(leaf, gradient)| iter::once(*leaf).chain(*gradient));
        if !plain::disjoint(read, [mean, uncertainty].into_iter()) {
            return Ok(false);
        }
        let betas = (self.beta1, self.beta2);
        observe::<f32>(&pairs, mean.elements_mut(), uncertainty.elements_mut(), betas);
        observe::<f64>(&pairs, mean.elements_mut(), uncertainty.elements_mut(), betas);
        Ok(true)
    }

    /// [`Self::values`] of slices of `T`; nothing where they are none.
    fn values_of_slices<T: Real>(&self, mean: Plain<'_>, uncertainty: Plain<'_>) -> Vec<f64> {
        let (mut means, mut uncertainties) = (mean.elements::<T>(), uncertainty.elements::<T>());
        let mut values = Vec::new();
        if mean.kind != T::KIND {
            return values;
        }
        for module in &self.modules {
            let mut next = |leaf: &Tensor| {
                let (mean, uncertainty);
                (mean, means) = means.split_at(leaf.numel());
                (uncertainty, uncertainties) = uncertainties.split_at(leaf.numel());
                mean.iter().zip(uncertainty).map(|(m, u)| m.wide() * u.wide())
            };
            let [a, b, e] = module.leaves();
            let rank = e.numel();
            let (features, out) = (a.numel() / rank.max(1), b.numel() / rank.max(1));
            let mut of_a = next(a);
            let of_a: Vec<f64> = (0..rank).map(|_| of_a.by_ref().take(features).sum()).collect();
            let (mut of_b, mut scores) = (vec![0.0; rank], next(b));
            for _ in 0..out {
                of_b.iter_mut().zip(&mut scores).for_each(|(sum, score)| *sum += score);
            }
            let means = of_a.iter().zip(&of_b);
            let means = means.map(|(a, b)| a / features as f64 + b / out as f64);
            values.extend(next(e).zip(means).map(|(e, rest)| e + rest));
        }
        values
    }
}

/// Takes a step in; nothing where the slices are of another type.
fn observe<'a, T: Real>(
    pairs: &[(Plain<'a>, Option<Plain<'a>>)],
    mut mean: &'a mut [T],
    mut uncertainty: &'a mut [T],
    (beta1, beta2): (f64, f64),
) {
    let mut jobs = Vec::with_capacity(pairs.len());
    for (leaf, gradient) in pairs {
        let values = leaf.elements::<T>();
        let (own_mean, own_uncertainty);
        (own_mean, mean) = mean.split_at_mut(values.len());
        (own_uncertainty, uncertainty) = uncertainty.split_at_mut(values.len());
        let gradients = gradient.map(|gradient| gradient.elements::<T>());
        jobs.push(Job { values, gradients, mean: own_mean, uncertainty: own_uncertainty });
    }
    smooth::run(&mut jobs, beta1, beta2);
}

/// A contiguous vector as a matrix of one row.
fn row(vector: &Tensor) -> Result<Tensor> {
    Ok(vector.f_view([1, vector.numel() as i64])?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(values: &[f64], size: [i64; 2], gradient: &[f64]) -> Tensor {
        let leaf = Tensor::from_slice(values).reshape(size).set_requires_grad(true);
        if !gradient.is_empty() {
            (&leaf * Tensor::from_slice(gradient).reshape(size)).sum(Kind::Double).backward();
        }
        leaf
    }

    /// Rank 2, of 3 features and 1 output.
    fn scores(gradient_of_e: &[f64]) -> Scores {
        let a = leaf(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [2, 3], &[1.0, 1.0, 1.0, 0.0, 0.0, -2.0]);
        let b = leaf(&[2.0, -2.0], [1, 2], &[4.0, 4.0]);
        let e = leaf(&[1.0, -3.0], [2, 1], gradient_of_e);
        let zeros = || Tensor::zeros([10], (Kind::Double, tch::Device::Cpu));
        Scores::new(vec![a], vec![b], vec![e], zeros(), zeros(), 0.5, 0.75).unwrap()
    }

    #[test]
    fn a_step_from_nothing_is_taken_in() {
        let mut scores = scores(&[2.0, 2.0]);
        scores.observe_().unwrap();
        let importance = [1.0, 2.0, 3.0, 0.0, 0.0, 12.0, 8.0, 8.0, 2.0, 6.0];
        assert_eq!(scores.mean, Tensor::from_slice(&importance.map(|i| 0.5 * i)));
        // 0.25 |I - 0.5 I|
        assert_eq!(scores.uncertainty, Tensor::from_slice(&importance.map(|i| 0.125 * i)));
        let score = |i: f64| 0.0625 * i * i;
        let first = score(2.0) + (score(1.0) + score(2.0) + score(3.0)) / 3.0 + score(8.0);
        let second = score(6.0) + score(12.0) / 3.0 + score(8.0);
        assert!(scores.values().unwrap().allclose(
            &Tensor::from_slice(&[first, second]),
            1e-15,
            0.0,
            false
        ));
    }

    #[test]
    fn the_second_step_takes_the_new_mean_for_the_uncertainty() {
        let mut scores = scores(&[2.0, 2.0]);
        scores.observe_().unwrap();
        let _ = scores.modules[0].e.grad().fill_(4.0);
        scores.observe_().unwrap();
        // I = 2, then 4: mean 1, 2.5; uncertainty 0.25, 0.1875 + 0.25 * 1.5.
        assert_eq!(scores.mean.double_value(&[8]), 2.5);
        assert_eq!(scores.uncertainty.double_value(&[8]), 0.5625);
    }

    #[test]
    fn without_a_gradient_the_importance_is_0_and_what_is_not_finite_is_left_out() {
        let mut scores = scores(&[]);
        let _ = scores.mean.fill_(4.0);
        let _ = scores.uncertainty.fill_(8.0);
        let _ = scores.modules[0].b.grad().fill_(f64::NAN);
        scores.observe_().unwrap();
        assert_eq!(scores.mean.narrow(0, 6, 4), Tensor::from_slice(&[4.0, 4.0, 2.0, 2.0]));
        assert_eq!(scores.uncertainty.narrow(0, 6, 4), Tensor::from_slice(&[8.0, 8.0, 6.5, 6.5]));
    }

    #[test]
    fn loops_on_slices_do_what_torch_does() {
        let random = |size: &[i64]| Tensor::randn(size, (Kind::Double, tch::Device::Cpu));
        let size = [[5, 7], [3, 5], [5, 1]];
        let values = size.map(|size| random(&size));
        let gradients = size.map(|size| random(&size));
        let made = |spread: bool| {
            let leaves = [0, 1, 2].map(|i| {
                let mut leaf = values[i].copy();
                if spread {
                    leaf = leaf.repeat_interleave_self_int(2, 1, None).slice(1, 0, None, 2);
                }
                let leaf = leaf.set_requires_grad(true);
                (&leaf * &gradients[i]).sum(Kind::Double).backward();
                vec![leaf]
            });
            let [a, b, e] = leaves;
            let ones = || Tensor::ones([55], (Kind::Double, tch::Device::Cpu));
            let mut scores = Scores::new(a, b, e, ones(), ones(), 0.85, 0.7).unwrap();
            scores.observe_().unwrap();
            scores
        };
        let (plain, torch) = (made(false), made(true));
        for (found, wanted) in [
            (&plain.mean, &torch.mean),
            (&plain.uncertainty, &torch.uncertainty),
            (&plain.values().unwrap(), &torch.values().unwrap()),
        ] {
            assert!(found.allclose(wanted, 1e-13, 0.0, false));
        }
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused_by_name() {
        let zeros = |size: &[i64]| Tensor::zeros(size, (Kind::Float, tch::Device::Cpu));
        let made = |e: &[i64], numbers: i64, beta: f64| {
            let (a, b) = (vec![zeros(&[2, 3])], vec![zeros(&[4, 2])]);
            let vectors = (zeros(&[numbers]), zeros(&[numbers]));
            match Scores::new(a, b, vec![zeros(e)], vectors.0, vectors.1, beta, 0.5) {
                Ok(_) => String::new(),
                Err(error) => error.to_string(),
            }
        };
        assert_eq!(made(&[2, 1], 16, 0.5), "");
        assert_eq!(made(&[3, 1], 16, 0.5), "e[0] has shape [3, 1]; it must be [2, 1]");
        assert_eq!(made(&[2, 1], 15, 0.5), "mean has shape [15]; it must be [16]");
        assert!(made(&[2, 1], 16, 1.0).starts_with("beta1 is 1"));
    }
}
