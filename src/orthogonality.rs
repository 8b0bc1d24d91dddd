//! The regulariser that keeps the components of a module orthonormal,
//! `R = mean over all A, B of ||A A^T - I||_F, ||B^T B - I||_F` (arXiv 2308.12043, eq. 4), and its
//! gradient in closed form: no autograd graph.

use tch::{Kind, Tensor};

use crate::checks;
use crate::errors::{Error, Result};

/// The value of R as a float64 scalar tensor, without gradients.
pub fn value(a: &[Tensor], b: &[Tensor]) -> Result<Tensor> {
    check("a", a)?;
    check("b", b)?;
    run(a, b, |_, _, _| Ok(()))
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
            checks::float(name, grad)?;
            checks::shape(name, grad, &parameter.size())?;
            checks::same_device(name, grad, "its parameter", parameter)?;
        }
    }
    let count = (a.len() + b.len()) as f64;
    run(a, b, |index, residual, norm| {
        let weight = factor.f_to_device(norm.device())?.f_mul_scalar(2.0 / count)?.f_div(norm)?;
        let weight = weight.f_nan_to_num(0.0, 0.0, 0.0)?.f_to_kind(residual.kind())?;
        let residual = residual.f_mul(&weight)?;
        let (gradient, grad) = if index < a.len() {
            (residual.f_mm(&a[index].f_to_kind(residual.kind())?)?, &mut grad_a[index])
        } else {
            let index = index - a.len();
            (b[index].f_to_kind(residual.kind())?.f_mm(&residual)?, &mut grad_b[index])
        };
        let _ = grad.f_add_(&gradient.f_to_kind(grad.kind())?)?;
        Ok(())
    })
}

fn check(name: &str, matrices: &[Tensor]) -> Result<()> {
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

/// Takes the residual `gram - I` and its norm of every A, then of every B; gives the norms' mean.
fn run(
    a: &[Tensor],
    b: &[Tensor],
    mut each: impl FnMut(usize, &Tensor, &Tensor) -> Result<()>,
) -> Result<Tensor> {
    let mut norms = Vec::with_capacity(a.len() + b.len());
    for (index, matrix) in a.iter().chain(b).enumerate() {
        let wide = if matrix.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        let matrix = matrix.f_to_kind(wide)?;
        let gram = if index < a.len() {
            matrix.f_mm(&matrix.f_tr()?)?
        } else {
            matrix.f_tr()?.f_mm(&matrix)?
        };
        let identity = Tensor::f_eye(gram.size()[0], (wide, gram.device()))?;
        let residual = gram.f_sub(&identity)?;
        let norm = residual.f_square()?.f_sum(wide)?.f_sqrt()?;
        each(index, &residual, &norm)?;
        norms.push(norm.f_to_kind(Kind::Double)?.f_to_device(a[0].device())?);
    }
    Ok(Tensor::f_stack(&norms, 0)?.f_mean(Kind::Double)?)
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
}
