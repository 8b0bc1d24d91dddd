//! The policies' arithmetic as Python functions.

use pyo3::prelude::*;
use pyo3_tch::PyTensor;

use super::{detached, raw};
use crate::kernels::cuda;
use crate::policies::{orthogonality, smoothing};

mod schedule;
mod step;

/// One step of the smoothing, in place.
#[pyfunction]
#[pyo3(signature = (importance, factor, mean, uncertainty, beta1, beta2, stream=0))]
#[allow(clippy::too_many_arguments)]
fn smooth_(
    py: Python<'_>,
    importance: PyTensor,
    factor: PyTensor,
    mean: PyTensor,
    uncertainty: PyTensor,
    beta1: f64,
    beta2: f64,
    stream: usize,
) -> PyResult<()> {
    let queue = cuda::Stream(stream);
    let (importance, factor, mut mean, mut uncertainty) =
        (importance.0, factor.0, mean.0, uncertainty.0);
    detached(py, move || {
        smoothing::smooth_(&importance, &factor, &mut mean, &mut uncertainty, beta1, beta2, queue)
    })
}

/// Value of the orthogonality regulariser.
#[pyfunction(name = "orthogonality")]
fn orthogonality_value(py: Python<'_>, a: Vec<PyTensor>, b: Vec<PyTensor>) -> PyResult<PyTensor> {
    let (a, b) = (raw(a), raw(b));
    detached(py, move || orthogonality::value(&a, &b).map(PyTensor))
}

/// Adds the gradient of the regulariser, times `factor`, in place; gives its value.
#[pyfunction]
fn add_orthogonality_gradient_(
    py: Python<'_>,
    a: Vec<PyTensor>,
    b: Vec<PyTensor>,
    grad_a: Vec<PyTensor>,
    grad_b: Vec<PyTensor>,
    factor: PyTensor,
) -> PyResult<PyTensor> {
    let (a, b, mut grad_a, mut grad_b) = (raw(a), raw(b), raw(grad_a), raw(grad_b));
    let factor = factor.0;
    detached(py, move || {
        let value = orthogonality::add_gradient_(&a, &b, &mut grad_a, &mut grad_b, &factor)?;
        Ok(PyTensor(value))
    })
}

/// Adds everything to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(smooth_, module)?)?;
    module.add_function(wrap_pyfunction!(orthogonality_value, module)?)?;
    module.add_function(wrap_pyfunction!(add_orthogonality_gradient_, module)?)?;
    schedule::register(module)?;
    step::register(module)
}
