//! The regulariser that keeps the components of a module orthonormal,
//! `R = mean over all A, B of ||A A^T - I||_F, ||B^T B - I||_F` (arXiv 2308.12043, eq. 4), and its
//! gradient in closed form: no autograd graph.

use tch::{Device, Kind, Tensor};

use crate::checks;
use crate::errors::{Error, Result};
use crate::kernels::cuda;
use crate::kernels::orthonormal::{self, Job};
use crate::kernels::plain::{self, Plain, Real};

/// The value of R as a float64 scalar tensor, without gradients.
pub fn value(a: &[Tensor], b: &[Tensor]) -> Result<Tensor> {
    check("a", a)?;
    check("b", b)?;
    let items = a.iter().map(|a| (a, true)).chain(b.iter().map(|b| (b, false)));
    let items = items.map(|(matrix, rows)| Item { matrix, grad: None, rows }).collect();
    mean(run(items, None)?, a.len() + b.len(), a[0].device())
}

/// Adds `factor * dR/dA` to `grad_a` and `factor * dR/dB` to `grad_b`, in place; gives R.
///
/// `a` holds matrices (rows, in), `b` matrices (out, rows), the gradients have their shapes. `factor`
/// is a scalar tensor, so that a loss scale can stay on its device. A matrix whose norm is 0 has
/// gradient 0.
pub fn add_gradient_(
    a: &[Tensor],
    b: &[Tensor],
    grad_a: &mut [Tensor],
    grad_b: &mut [Tensor],
    factor: &Tensor,
) -> Result<Tensor> {
    checks::one_each("grad_a", grad_a, a.len())?;
    checks::one_each("grad_b", grad_b, b.len())?;
    check("a", a)?;
    check("b", b)?;
    checks::float("factor", factor)?;
    checks::shape("factor", factor, &[])?;
    for (name, grads, parameters) in [("grad_a", &*grad_a, a), ("grad_b", &*grad_b, b)] {
        for (grad, parameter) in grads.iter().zip(parameters) {
            check_gradient(name, grad, parameter)?;
        }
    }
    let count = a.len() + b.len();
    let rows =
        a.iter().zip(grad_a).map(|(a, grad)| Item { matrix: a, grad: Some(grad), rows: true });
    let columns =
        b.iter().zip(grad_b).map(|(b, grad)| Item { matrix: b, grad: Some(grad), rows: false });
    let factor = factor.f_to_kind(Kind::Double)?.f_div_scalar(count as f64)?;
    mean(run(rows.chain(columns).collect(), Some(&factor))?, count, a[0].device())
}

/// Adds `factor` times the gradient of R over all modules, to those that have gradients.
///
/// `a` and `b` hold leaves, (rows, in) and (out, rows), one of each a module. A module of which one
/// has no gradient is left out, and counts in the mean all the same. Kernels for a CUDA device are queued
/// on `queue`.
pub fn add_to_leaves_(
    a: &[Tensor],
    b: &[Tensor],
    factor: &Tensor,
    queue: cuda::Stream,
) -> Result<()> {
    let mut grads = Vec::with_capacity(a.len());
    for (a, b) in a.iter().zip(b) {
        let pair = (a.f_grad()?, b.f_grad()?);
        if pair.0.defined() && pair.1.defined() {
            grads.push((a, b, pair));
        }
    }
    if let Some((first, ..)) = grads.first().filter(|(first, ..)| cuda::takes(first, queue)) {
        let factor = factor.f_to_device(first.device())?;
        // The kernels take the mean over what they are given.
        let factor = factor.f_mul_scalar(grads.len() as f64 / a.len() as f64)?;
        let (mut grad_a, mut grad_b): (Vec<_>, Vec<_>) =
            grads.iter().map(|(_, _, (a, b))| (a.shallow_clone(), b.shallow_clone())).unzip();
        let (a, b): (Vec<_>, Vec<_>) =
            grads.iter().map(|(a, b, _)| (a.shallow_clone(), b.shallow_clone())).unzip();
        if cuda::add_orthogonality_gradient_(&a, &b, &mut grad_a, &mut grad_b, &factor, queue)?
            .is_some()
        {
            return Ok(());
        }
    }
    let items = grads.iter_mut().flat_map(|(a, b, (grad_a, grad_b))| {
        [
            Item { matrix: a, grad: Some(grad_a), rows: true },
            Item { matrix: b, grad: Some(grad_b), rows: false },
        ]
    });
    let factor = factor.f_div_scalar((a.len() + b.len()) as f64)?;
    let _ = run(items.collect(), Some(&factor))?;
    Ok(())
}

/// Fails unless there are matrices, of floating-point numbers.
pub fn check(name: &str, matrices: &[Tensor]) -> Result<()> {
    if matrices.is_empty() {
        let message = format!("{name} is empty; give the matrices of one module or more");
        return Err(Error::Value(message));
    }
    for matrix in matrices {
        checks::matrix(name, matrix)?;
        checks::float(name, matrix)?;
    }
    Ok(())
}

fn check_gradient(name: &str, grad: &Tensor, parameter: &Tensor) -> Result<()> {
    checks::float(name, grad)?;
    checks::shape(name, grad, &parameter.size())?;
    checks::same_device(name, grad, "its parameter", parameter)
}

/// A matrix, what its gradient is added to, and whether its components are its rows.
struct Item<'a> {
    matrix: &'a Tensor,
    grad: Option<&'a mut Tensor>,
    rows: bool,
}

/// An item that the loops on slices can do.
struct PlainItem<'a> {
    matrix: Plain<'a>,
    grad: Option<Plain<'a>>,
    components: usize,
    rows: bool,
}

impl Item<'_> {
    fn plain(&self) -> Option<PlainItem<'_>> {
        let matrix = Plain::of(self.matrix)?;
        let grad = match &self.grad {
            Some(grad) => Some(Plain::of(grad).filter(|grad| grad.is_like(&matrix))?),
            None => None,
        };
        let components = if self.rows { matrix.rows } else { matrix.columns };
        let few = components <= orthonormal::MOST_COMPONENTS;
        few.then_some(PlainItem { matrix, grad, components, rows: self.rows })
    }
}

/// Sum of the norms on the host, and norms as tensors.
type Norms = (f64, Vec<Tensor>);

fn mean((host, norms): Norms, count: usize, device: Device) -> Result<Tensor> {
    let mut sum = Tensor::from(host).f_to_device(device)?;
    for norm in norms {
        let _ = sum.f_add_(&norm.f_to_kind(Kind::Double)?.f_to_device(device)?)?;
    }
    Ok(sum.f_div_scalar(count as f64)?)
}

/// Adds `factor * d norm / d matrix` to the gradients of all items; gives the norms.
fn run(items: Vec<Item<'_>>, factor: Option<&Tensor>) -> Result<Norms> {
    // A factor on another device would have to be waited for.
    let host_factor = match factor {
        None => Some(0.0),
        Some(factor) if factor.device() == Device::Cpu => Some(factor.f_double_value(&[])?),
        Some(_) => None,
    };
    let mut plain: Vec<_> =
        items.iter().map(|item| host_factor.and_then(|_| item.plain())).collect();
    if !disjoint(&plain) {
        plain.fill_with(|| None);
    }
    let all = plain.iter().flatten();
    let factor_of_slices = host_factor.unwrap_or_default();
    let sum =
        on_slices::<f32>(all.clone(), factor_of_slices) + on_slices::<f64>(all, factor_of_slices);
    let done: Vec<bool> = plain.iter().map(Option::is_some).collect();
    let others = items.into_iter().zip(done).filter(|(_, done)| !done);
    let norms = others.map(|(item, _)| with_torch(item, factor)).collect::<Result<_>>()?;
    Ok((sum, norms))
}

fn disjoint(items: &[Option<PlainItem<'_>>]) -> bool {
    let items = || items.iter().flatten();
    plain::disjoint(items().map(|item| item.matrix), items().filter_map(|item| item.grad))
}

fn on_slices<'a, T: Real>(items: impl Iterator<Item = &'a PlainItem<'a>>, factor: f64) -> f64 {
    let mut jobs: Vec<Job<'_, T>> = items
        .filter(|item| item.matrix.kind == T::KIND)
        .map(|item| Job {
            matrix: item.matrix.elements(),
            grad: item.grad.map(|grad| grad.elements_mut()),
            components: item.components,
            rows: item.rows,
            norm: 0.0,
        })
        .collect();
    orthonormal::run(&mut jobs, factor);
    jobs.iter().map(|job| job.norm).sum()
}

fn with_torch(item: Item<'_>, factor: Option<&Tensor>) -> Result<Tensor> {
    let wide = if item.matrix.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let matrix = item.matrix.f_to_kind(wide)?;
    let gram =
        if item.rows { matrix.f_mm(&matrix.f_tr()?)? } else { matrix.f_tr()?.f_mm(&matrix)? };
    let identity = Tensor::f_eye(gram.size()[0], (wide, gram.device()))?;
    let residual = gram.f_sub(&identity)?;
    let norm = residual.f_square()?.f_sum(wide)?.f_sqrt()?;
    if let (Some(grad), Some(factor)) = (item.grad, factor) {
        check_gradient("a gradient", grad, item.matrix)?;
        let weight = factor.f_to_device(norm.device())?.f_mul_scalar(2.0)?.f_div(&norm)?;
        let weight = weight.f_nan_to_num(0.0, 0.0, 0.0)?.f_to_kind(wide)?;
        let residual = residual.f_mul(&weight)?;
        let gradient = if item.rows { residual.f_mm(&matrix)? } else { matrix.f_mm(&residual)? };
        let _ = grad.f_add_(&gradient.f_to_kind(grad.kind())?)?;
    }
    Ok(norm)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrices() -> ([Tensor; 1], [Tensor; 1]) {
        let a = Tensor::from_slice(&[2.0, 0.0]).reshape([1, 2]);
        let b = Tensor::from_slice(&[1.0, 0.0]).reshape([2, 1]);
        ([a], [b])
    }

    #[test]
    fn the_value_is_the_mean_of_the_norms() {
        let (a, b) = matrices();
        assert_eq!(value(&a, &b).unwrap(), Tensor::from(1.5));
    }

    #[test]
    fn the_gradient_is_added_and_an_orthonormal_matrix_has_none() {
        let (a, b) = matrices();
        let (mut grad_a, mut grad_b) = ([a[0].ones_like()], [b[0].ones_like()]);
        let factor = Tensor::from(0.5);
        let _ = add_gradient_(&a, &b, &mut grad_a, &mut grad_b, &factor).unwrap();
        // 0.5 * 2 * 3 * A / (2 * 3)
        assert_eq!(grad_a[0], Tensor::from_slice(&[2.0, 1.0]).reshape([1, 2]));
        assert_eq!(grad_b[0], b[0].ones_like());
    }

    #[test]
    fn no_matrices_are_refused() {
        assert!(value(&[], &[]).unwrap_err().to_string().starts_with("a is empty"));
    }

    /// `tensor` with gaps between its elements: left to torch, for it is not contiguous.
    fn spread(tensor: &Tensor) -> Tensor {
        let [rows, columns] = tensor.size()[..] else { panic!("a matrix") };
        let mut view = Tensor::zeros([rows, 2 * columns], (tensor.kind(), tensor.device()));
        view = view.slice(1, 0, None, 2);
        view.copy_(tensor);
        view
    }

    #[test]
    fn loops_on_slices_do_what_torch_does() {
        let factor = Tensor::from(0.3);
        for (kind, tolerance) in [(Kind::Float, 1e-5), (Kind::Double, 1e-12)] {
            for rank in [1, 2, 7, 8, 33, 64, 65] {
                for (input, out) in [(1, 3), (16, 24), (100, 33), (768, 64)] {
                    let random = |size| Tensor::randn(size, (kind, Device::Cpu));
                    let (a, b) = (random([rank, input]), random([out, rank]));
                    let (grad_a, grad_b) = (random([rank, input]), random([out, rank]));
                    let (mut plain_a, mut plain_b) = ([grad_a.copy()], [grad_b.copy()]);
                    let (mut torch_a, mut torch_b) = ([spread(&grad_a)], [spread(&grad_b)]);
                    let (a, b) = ([a], [b]);
                    let value = add_gradient_(&a, &b, &mut plain_a, &mut plain_b, &factor).unwrap();
                    let wanted =
                        add_gradient_(&a, &b, &mut torch_a, &mut torch_b, &factor).unwrap();
                    let close = |x: &Tensor, y: &Tensor| x.allclose(y, tolerance, tolerance, false);
                    assert!(close(&value, &wanted), "{kind:?} {rank} {input} {out}");
                    assert!(close(&plain_a[0], &torch_a[0]), "A, {kind:?} {rank} {input}");
                    assert!(close(&plain_b[0], &torch_b[0]), "B, {kind:?} {rank} {out}");
                }
            }
        }
    }

    #[test]
    fn one_gradient_given_twice_takes_both() {
        let (a, b) = matrices();
        let a = [a[0].shallow_clone(), a[0].shallow_clone()];
        let b = [b[0].shallow_clone(), b[0].shallow_clone()];
        let grad = a[0].zeros_like();
        let mut grad_a = [grad.shallow_clone(), grad.shallow_clone()];
        let mut grad_b = [b[0].zeros_like(), b[0].zeros_like()];
        let _ = add_gradient_(&a, &b, &mut grad_a, &mut grad_b, &Tensor::from(1.0)).unwrap();
        // 2 * (2 * 3 * A / (4 * 3))
        assert_eq!(grad, Tensor::from_slice(&[2.0, 0.0]).reshape([1, 2]));
    }
}
