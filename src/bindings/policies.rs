//! The policies' arithmetic as Python functions.

use numpy::PyReadonlyArray1;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3_tch::PyTensor;

use super::{detached, raw};
use crate::kernels::cuda;
use crate::policies::sparsify::{self, Group};
use crate::policies::{gate, orthogonality, smoothing};

mod moves;
mod schedule;
mod step;
mod triplets;

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

/// Moves gates towards 0, in place.
#[pyfunction]
#[pyo3(signature = (gates, xi, *, official))]
fn shrink_gates_(py: Python<'_>, gates: Vec<PyTensor>, xi: f64, official: bool) -> PyResult<()> {
    let mut gates = raw(gates);
    detached(py, move || gate::shrink_(&mut gates, xi, official))
}

/// Adds the gradient of the gates' L1 term, in place.
#[pyfunction]
#[pyo3(signature = (gates, gradients, weight, *, grad_scale=None))]
fn add_l1_(
    py: Python<'_>,
    gates: Vec<PyTensor>,
    gradients: Vec<Option<PyTensor>>,
    weight: f64,
    grad_scale: Option<PyTensor>,
) -> PyResult<()> {
    let gates = raw(gates);
    let mut gradients: Vec<_> =
        gradients.into_iter().map(|gradient| gradient.map(|gradient| gradient.0)).collect();
    let scale = grad_scale.map(|scale| scale.0);
    detached(py, move || gate::add_l1_(&gates, &mut gradients, weight, scale.as_ref()))
}

/// Takes a step's sums of squares into the running norms, in place.
#[pyfunction]
fn average_energy_(
    py: Python<'_>,
    norms: PyTensor,
    total: PyTensor,
    features: Vec<i64>,
    beta: f64,
) -> PyResult<()> {
    let (mut norms, mut total) = (norms.0, total.0);
    detached(py, move || sparsify::average_(&mut norms, &mut total, &features, beta))
}

/// Sets the entries of A that matter least to 0, in place.
#[pyfunction]
#[pyo3(signature = (a, norms, share, *, by_row))]
fn prune_(
    py: Python<'_>,
    a: Vec<PyTensor>,
    norms: PyTensor,
    share: f64,
    by_row: bool,
) -> PyResult<()> {
    let (mut a, norms) = (raw(a), norms.0);
    let group = if by_row { Group::Row } else { Group::Matrix };
    detached(py, move || sparsify::prune_(&mut a, &norms, share, group))
}

/// A copy of a contiguous vector.
fn vector<T: numpy::Element + Copy>(
    name: &str,
    array: &PyReadonlyArray1<'_, T>,
) -> PyResult<Vec<T>> {
    let slice = array
        .as_slice()
        .map_err(|error| PyTypeError::new_err(format!("{name} is not contiguous: {error}")))?;
    Ok(slice.to_vec())
}

/// Adds everything to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(smooth_, module)?)?;
    module.add_function(wrap_pyfunction!(orthogonality_value, module)?)?;
    module.add_function(wrap_pyfunction!(add_orthogonality_gradient_, module)?)?;
    module.add_function(wrap_pyfunction!(shrink_gates_, module)?)?;
    module.add_function(wrap_pyfunction!(add_l1_, module)?)?;
    module.add_function(wrap_pyfunction!(average_energy_, module)?)?;
    module.add_function(wrap_pyfunction!(prune_, module)?)?;
    moves::register(module)?;
    schedule::register(module)?;
    step::register(module)?;
    triplets::register(module)
}
