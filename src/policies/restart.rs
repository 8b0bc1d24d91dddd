//! The restart warm-up of new components: a row born during training follows its own learning-rate
//! multiplier and its own Adam bias correction, realised after the optimizer's step on the rows
//! concerned (arXiv 2308.12043, section 3.3; the arithmetic is in [`super::growth`]).

use std::collections::HashMap;

use tch::{Kind, Tensor};

use crate::checks;
use crate::errors::{Error, Result};
use crate::kernels::blend::{self, Keep, Mix, Tail};
use crate::kernels::cuda;
use crate::kernels::plain::{self, Plain, Real};
use crate::policies::growth::{adam_ratio, restart_ratio, LearningRate};

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

    /// The weights `(f, g)` with which a row born at `birth` becomes `f * new + g * old`.
    pub fn weights(&self, birth: u64) -> (f64, f64) {
        let rate = self.learning_rate.map_or(1.0, |lr| restart_ratio(&lr, birth, self.step));
        let bias = self.betas.map_or(1.0, |betas| adam_ratio(betas, birth, self.step, self.lead));
        // The decoupled decay follows the learning rate but not the bias correction.
        let f = rate * bias;
        (f, 1.0 - rate * self.decay - f * (1.0 - self.decay))
    }
}

/// A parameter with rows, or columns, that were born during training: they stand at its end.
pub struct Newborn {
    parameter: Tensor,
    /// Births from the first row born during training on.
    births: Vec<u64>,
    /// 0: rows are born; 1: columns are.
    dim: i64,
    /// What the newborn rows were before the optimizer's step; contiguous.
    old: Tensor,
}

/// A newborn part that the loops on slices can do.
#[derive(Clone, Copy)]
struct Slices<'a> {
    tail: Tail,
    parameter: Plain<'a>,
    old: Plain<'a>,
    births: &'a [u64],
}

impl Newborn {
    /// `births` are those of all rows (columns with `dim` 1), 0 where they were there from the start.
    /// None where all were.
    pub fn new(parameter: Tensor, births: &[u64], dim: i64) -> Result<Option<Self>> {
        let (rows, columns) = checks::matrix("parameter", &parameter)?;
        checks::float("parameter", &parameter)?;
        if dim != 0 && dim != 1 {
            return Err(Error::Value(format!("dim is {dim}; it must be 0 or 1")));
        }
        let length = if dim == 0 { rows } else { columns };
        checks::one_each("births", births, length as usize)?;
        let Some(first) = births.iter().position(|&birth| birth > 0) else { return Ok(None) };
        let births = births[first..].to_vec();
        let count = births.len() as i64;
        let size = if dim == 0 { [count, columns] } else { [rows, count] };
        let old = Tensor::f_empty(size, (parameter.f_kind()?, parameter.device()))?;
        Ok(Some(Self { parameter, births, dim, old }))
    }

    /// As [`new`](Self::new), with the whole parameter's value before the step.
    pub fn with_old(
        parameter: Tensor,
        old: &Tensor,
        births: &[u64],
        dim: i64,
    ) -> Result<Option<Self>> {
        let (rows, columns) = checks::matrix("parameter", &parameter)?;
        checks::float("old", old)?;
        checks::same_device("old", old, "parameter", &parameter)?;
        checks::shape("old", old, &[rows, columns])?;
        let Some(mut newborn) = Self::new(parameter, births, dim)? else { return Ok(None) };
        newborn.old = newborn.part_of(old)?.f_contiguous()?;
        Ok(Some(newborn))
    }

    /// The newborn rows of a matrix of the parameter's shape: a view.
    fn part_of(&self, matrix: &Tensor) -> Result<Tensor> {
        let count = self.births.len() as i64;
        Ok(matrix.f_narrow(self.dim, matrix.size()[self.dim as usize] - count, count)?)
    }

    /// Newborn rows for a kernel.
    fn part(&self, first: usize, count: usize, weights: (f64, f64)) -> cuda::Part<'_> {
        let (first, count) = (first as i64, count as i64);
        let Self { parameter, old, dim, .. } = self;
        cuda::Part { parameter, old, dim: *dim, first, count, weights }
    }

    fn slices(&self) -> Option<Slices<'_>> {
        let (parameter, old) = (Plain::of(&self.parameter)?, Plain::of(&self.old)?);
        let Plain { rows, columns, .. } = parameter;
        let (by_row, count) = (self.dim == 0, self.births.len());
        let first = if by_row { rows } else { columns }.checked_sub(count)?;
        let size = if by_row { (count, columns) } else { (rows, count) };
        let fits = parameter.kind == old.kind && (old.rows, old.columns) == size;
        let tail = Tail { columns, first, rows: by_row };
        fits.then_some(Slices { tail, parameter, old, births: &self.births })
    }

    fn keep_with_torch(&mut self) -> Result<()> {
        let part = self.part_of(&self.parameter)?;
        Ok(self.old.f_copy_(&part)?)
    }

    fn correct_with_torch(&self, weights: &Weights) -> Result<()> {
        let mut part = self.part_of(&self.parameter)?;
        let wide = if part.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        let shape = if self.dim == 0 { [-1, 1] } else { [1, -1] };
        let row = |which: fn(&(f64, f64)) -> f64| -> Result<Tensor> {
            let values: Vec<f64> = self.births.iter().map(|birth| which(&weights[birth])).collect();
            let vector = Tensor::f_from_slice(&values)?.f_to_kind(wide)?;
            Ok(vector.f_reshape(shape)?.f_to_device(part.device())?)
        };
        let old = self.old.f_to_kind(wide)?.f_mul(&row(|weights| weights.1)?)?;
        let new = part.f_to_kind(wide)?.f_mul(&row(|weights| weights.0)?)?.f_add(&old)?;
        Ok(part.f_copy_(&new)?)
    }
}

/// Keeps what the newborn rows are, before an optimizer step.
pub fn keep(newborns: &mut [Newborn], queue: cuda::Stream) -> Result<()> {
    if has_kernels(newborns, queue) {
        let whole = |newborn| Newborn::part(newborn, 0, newborn.births.len(), (0.0, 1.0));
        let parts: Vec<_> = newborns.iter().map(whole).collect();
        if cuda::keep_newborns(&parts, queue)? {
            return Ok(());
        }
    }
    let slices: Vec<_> = newborns.iter().map(Newborn::slices).collect();
    keep_slices::<f32>(&slices);
    keep_slices::<f64>(&slices);
    let done: Vec<bool> = slices.iter().map(Option::is_some).collect();
    let mut others = newborns.iter_mut().zip(done).filter(|(_, done)| !done);
    others.try_for_each(|(newborn, _)| newborn.keep_with_torch())
}

fn keep_slices<T: Real>(slices: &[Option<Slices<'_>>]) {
    let jobs = slices.iter().flatten().filter(|s| s.parameter.kind == T::KIND).map(|s| Keep::<T> {
        tail: s.tail,
        matrix: s.parameter.elements(),
        old: s.old.elements_mut(),
    });
    blend::keep(&mut jobs.collect::<Vec<_>>());
}

/// The weights `(f, g)` of each birth.
type Weights = HashMap<u64, (f64, f64)>;

/// Corrects, in place, the newborn rows after an optimizer step; what they were has been kept.
pub fn correct(newborns: &[Newborn], step: &Step, queue: cuda::Stream) -> Result<()> {
    step.check()?;
    let mut weights = Weights::new();
    for &birth in newborns.iter().flat_map(|newborn| &newborn.births) {
        weights.entry(birth).or_insert_with(|| step.weights(birth));
    }
    if weights.values().all(|&weights| weights == (1.0, 0.0)) {
        return Ok(());
    }
    if has_kernels(newborns, queue)
        && apart(newborns)
        && cuda::mix_newborns(&parts_to_correct(newborns, &weights), queue)?
    {
        return Ok(());
    }
    let mut slices: Vec<_> = newborns.iter().map(Newborn::slices).collect();
    let written = slices.iter().flatten().map(|slices| slices.parameter);
    if !plain::disjoint(std::iter::empty(), written) {
        slices.fill(None);
    }
    correct_slices::<f32>(&slices, &weights);
    correct_slices::<f64>(&slices, &weights);
    let mut others = newborns.iter().zip(&slices).filter(|(_, slices)| slices.is_none());
    others.try_for_each(|(newborn, _)| newborn.correct_with_torch(&weights))
}

/// Spares the CPU, in every step, the parts that only a kernel takes.
fn has_kernels(newborns: &[Newborn], queue: cuda::Stream) -> bool {
    newborns.first().is_some_and(|newborn| cuda::takes(&newborn.parameter, queue))
}

/// Does no parameter lie where another does? One that is given twice is corrected twice, which the threads
/// of a kernel would do at once.
fn apart(newborns: &[Newborn]) -> bool {
    let mut spans: Vec<(usize, usize)> = newborns
        .iter()
        .map(|Newborn { parameter, .. }| {
            let first = parameter.data_ptr() as usize;
            (first, first + parameter.numel() * parameter.kind().elt_size_in_bytes())
        })
        .collect();
    spans.sort_unstable();
    spans.windows(2).all(|pair| pair[0].1 <= pair[1].0)
}

/// The rows of one birth after the other, those left out that stay as they are.
fn parts_to_correct<'a>(newborns: &'a [Newborn], weights: &Weights) -> Vec<cuda::Part<'a>> {
    let mut parts = Vec::new();
    for newborn in newborns {
        let mut first = 0;
        for run in newborn.births.chunk_by(|one, next| one == next) {
            let weights = weights[&run[0]];
            if weights != (1.0, 0.0) {
                parts.push(newborn.part(first, run.len(), weights));
            }
            first += run.len();
        }
    }
    parts
}

fn correct_slices<T: Real>(slices: &[Option<Slices<'_>>], weights: &Weights) {
    let slices = || slices.iter().flatten().filter(|slices| slices.parameter.kind == T::KIND);
    let weights = slices().flat_map(|slices| slices.births).map(|birth| {
        let (f, g) = weights[birth];
        (T::nearest(f), T::nearest(g))
    });
    let weights: Vec<_> = weights.collect();
    let mut rest = &weights[..];
    let jobs = slices().map(|slices| {
        let (weights, later) = rest.split_at(slices.births.len());
        rest = later;
        Mix {
            tail: slices.tail,
            matrix: slices.parameter.elements_mut(),
            old: slices.old.elements(),
            weights,
        }
    });
    blend::mix(&mut jobs.collect::<Vec<_>>());
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

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
        assert_eq!(step().weights(0), (1.0, 0.0));
    }

    #[test]
    fn decay_follows_the_learning_rate_and_not_the_bias_correction() {
        let (old, update) = (3.0, 0.2);
        let new = old * (1.0 - 0.01) - update;
        let (f, g) = step().weights(25);
        // Age 5 of a climb of 10 steps: m_new = 0.5 under m = 0.75.
        let rate = 0.5 / 0.75;
        let bias = adam_ratio((0.9, 0.999), 25, 30, 4);
        let want = old * (1.0 - rate * 0.01) - rate * bias * update;
        assert!((f * new + g * old - want).abs() < 1e-14);
    }

    #[test]
    fn without_a_learning_rate_only_the_bias_is_corrected() {
        let (f, _) = Step { learning_rate: None, ..step() }.weights(25);
        assert_eq!(f, adam_ratio((0.9, 0.999), 25, 30, 4));
    }

    #[test]
    fn without_a_schedule_and_betas_every_row_is_left_alone() {
        let (f, g) = Step { learning_rate: None, betas: None, ..step() }.weights(25);
        assert_eq!((f, g), (1.0, 0.0));
    }

    #[test]
    fn columns_are_born_where_dim_is_one() {
        let parameter = Tensor::from_slice(&[1.0, 2.0, 3.0, 4.0]).reshape([2, 2]);
        let old = Tensor::zeros([2, 2], (Kind::Double, Device::Cpu));
        let lr = LearningRate { multiplier: 1.0, warmup: 4, linear_until: None };
        let step = Step { learning_rate: Some(lr), betas: None, decay: 0.0, step: 3, lead: 0 };
        let newborn = Newborn::with_old(parameter.shallow_clone(), &old, &[0, 2], 1).unwrap();
        correct(&[newborn.unwrap()], &step, cuda::Stream(0)).unwrap();
        let want = Tensor::from_slice(&[1.0, 0.5, 3.0, 1.0]).reshape([2, 2]);
        assert_eq!(parameter, want);
    }

    /// The parameter after a step that added `update` to it, its columns or rows born as given.
    fn stepped(mut parameter: Tensor, update: &Tensor, births: &[u64], dim: i64) -> Tensor {
        let newborn = Newborn::new(parameter.shallow_clone(), births, dim).unwrap().unwrap();
        let mut newborns = [newborn];
        keep(&mut newborns, cuda::Stream(0)).unwrap();
        let _ = parameter.f_add_(update).unwrap();
        correct(&newborns, &step(), cuda::Stream(0)).unwrap();
        parameter
    }

    #[test]
    fn loops_on_slices_do_what_torch_does() {
        for kind in [Kind::Float, Kind::Double] {
            for (rank, across) in [(1, 1), (2, 7), (7, 33), (8, 768), (33, 16), (64, 100)] {
                let births: Vec<u64> =
                    (1..=rank as u64).map(|i| 30 * i / (rank as u64 + 1)).collect();
                for dim in [0, 1] {
                    let size = if dim == 0 { [rank, across] } else { [across, rank] };
                    let parameter = Tensor::randn(size, (kind, Device::Cpu));
                    let update = Tensor::randn(size, (kind, Device::Cpu));
                    let plain = stepped(parameter.copy(), &update, &births, dim);
                    // Every other column of a wider matrix: not contiguous, and so left to torch.
                    let wider = parameter.repeat_interleave_self_int(2, 1, None);
                    let strided = stepped(wider.slice(1, 0, None, 2), &update, &births, dim);
                    let tolerance = if kind == Kind::Float { 1e-6 } else { 1e-14 };
                    assert!(plain.allclose(&strided, tolerance, tolerance, false));
                }
            }
        }
    }
}
