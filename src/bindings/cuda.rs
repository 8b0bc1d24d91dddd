//! The CUDA kernels as Python functions. The layer and the scheduler do not need these: they are for tests,
//! and for who wants to know why kernels are not used.

use pyo3::prelude::*;
use pyo3::types::PyBytes;
use pyo3_tch::PyTensor;

use super::{detached, raw};
use crate::kernels::cuda::{self, Parameters, Stream};
use crate::kernels::dropout;
use crate::ops::low_rank::RESERVE_E;

/// The compiler's log of all kernels for an architecture.
#[pyfunction]
fn cuda_compile(py: Python<'_>, architecture: &str) -> PyResult<String> {
    detached(py, || Ok(cuda::compile::compile(architecture)?.log))
}

/// The device code for an architecture, by way of the cache.
#[pyfunction]
fn cuda_cubin<'py>(py: Python<'py>, architecture: &str) -> PyResult<Bound<'py, PyBytes>> {
    let cubin = detached(py, || cuda::compile::cubin(architecture))?;
    Ok(PyBytes::new(py, &cubin))
}

/// The names of all kernels.
#[pyfunction]
fn cuda_kernels() -> Vec<String> {
    cuda::kernels()
}

/// Loads the kernels of a device; the reason where that fails.
#[pyfunction]
fn cuda_prepare(py: Python<'_>, index: usize) -> PyResult<Option<String>> {
    detached(py, || Ok(cuda::prepare(index).err()))
}

/// Why kernels were asked for and could not be had.
#[pyfunction]
fn cuda_unavailable() -> Option<String> {
    cuda::unavailable()
}

/// Makes kernels for CPU tensors run through the function at an address.
#[pyfunction]
fn cuda_emulate(launch: usize) {
    // SAFETY: the promise of the caller, as the docstring says.
    unsafe { cuda::emulate(launch) }
}

#[pyfunction]
#[pyo3(signature = (x, p, seed, offset=0, stream=0))]
fn cuda_draw_mask(
    py: Python<'_>,
    x: PyTensor,
    p: f64,
    seed: u64,
    offset: u64,
    stream: usize,
) -> PyResult<Option<PyTensor>> {
    let x = x.0;
    let draw = dropout::Stream::new(p, seed, offset);
    detached(py, move || Ok(cuda::draw_mask(&x, &draw, Stream(stream))?.map(PyTensor)))
}

#[pyfunction]
#[pyo3(signature = (x, mask, stream=0))]
fn cuda_apply_mask(
    py: Python<'_>,
    x: PyTensor,
    mask: PyTensor,
    stream: usize,
) -> PyResult<Option<PyTensor>> {
    let (x, mask) = (x.0, mask.0);
    detached(py, move || Ok(cuda::apply_mask(&x, &mask, Stream(stream))?.map(PyTensor)))
}

#[pyfunction]
#[pyo3(signature = (x, a, gain, p, seed, offset=0, stream=0))]
#[allow(clippy::too_many_arguments)]
fn cuda_down(
    py: Python<'_>,
    x: PyTensor,
    a: PyTensor,
    gain: f64,
    p: f64,
    seed: u64,
    offset: u64,
    stream: usize,
) -> PyResult<Option<(PyTensor, PyTensor)>> {
    let (x, a) = (x.0, a.0);
    let draw = dropout::Stream::new(p, seed, offset);
    detached(py, move || {
        let taken = cuda::down(&x, &a, gain, &draw, Stream(stream))?;
        Ok(taken.map(|(t, mask)| (PyTensor(t), PyTensor(mask))))
    })
}

#[pyfunction]
#[pyo3(signature = (gx, accumulate, u, a, mask, gain, stream=0))]
#[allow(clippy::too_many_arguments)]
fn cuda_add_grad_x(
    py: Python<'_>,
    gx: PyTensor,
    accumulate: bool,
    u: PyTensor,
    a: PyTensor,
    mask: Option<PyTensor>,
    gain: f64,
    stream: usize,
) -> PyResult<bool> {
    let (mut gx, u, a, mask) = (gx.0, u.0, a.0, mask.map(|mask| mask.0));
    detached(py, move || {
        cuda::add_grad_x(&mut gx, accumulate, &u, &a, mask.as_ref(), gain, Stream(stream))
    })
}

/// The dtype comes by a tensor that has it.
#[pyfunction]
#[pyo3(signature = (a, b, e, scale, like, stream=0))]
fn cuda_factors(
    py: Python<'_>,
    a: PyTensor,
    b: PyTensor,
    e: PyTensor,
    scale: f64,
    like: PyTensor,
    stream: usize,
) -> PyResult<Option<(PyTensor, PyTensor)>> {
    let (a, b, e, like) = (a.0, b.0, e.0, like.0);
    detached(py, move || {
        let parameters = Parameters { a: &a, b: &b, e: &e, scale, reserve_e: RESERVE_E };
        let taken = cuda::scaled(parameters, like.f_kind()?, Stream(stream))?;
        Ok(taken.map(|(a, p)| (PyTensor(a), PyTensor(p))))
    })
}

#[pyfunction]
#[pyo3(signature = (a, b, e, scale, right, left, gain, stream=0))]
#[allow(clippy::too_many_arguments)]
fn cuda_gradients(
    py: Python<'_>,
    a: PyTensor,
    b: PyTensor,
    e: PyTensor,
    scale: f64,
    right: PyTensor,
    left: PyTensor,
    gain: f64,
    stream: usize,
) -> PyResult<Option<(PyTensor, PyTensor, PyTensor)>> {
    let (a, b, e, right, left) = (a.0, b.0, e.0, right.0, left.0);
    detached(py, move || {
        let parameters = Parameters { a: &a, b: &b, e: &e, scale, reserve_e: RESERVE_E };
        let taken = cuda::gradients(parameters, &right, &left, gain, Stream(stream))?;
        Ok(taken.map(|[a, b, e]| (PyTensor(a), PyTensor(b), PyTensor(e))))
    })
}

#[pyfunction]
#[pyo3(signature = (vector, slot, p, a, gy, x, gain, stream=0))]
#[allow(clippy::too_many_arguments)]
fn cuda_importance_(
    py: Python<'_>,
    vector: PyTensor,
    slot: i64,
    p: PyTensor,
    a: PyTensor,
    gy: PyTensor,
    x: PyTensor,
    gain: f64,
    stream: usize,
) -> PyResult<bool> {
    let (mut vector, p, a, gy, x) = (vector.0, p.0, a.0, gy.0, x.0);
    detached(py, move || cuda::accumulate(&mut vector, slot, &p, &a, &gy, &x, gain, Stream(stream)))
}

#[pyfunction]
#[pyo3(signature = (importance, factor, mean, uncertainty, beta1, beta2, stream=0))]
#[allow(clippy::too_many_arguments)]
fn cuda_smooth_(
    py: Python<'_>,
    importance: PyTensor,
    factor: PyTensor,
    mean: PyTensor,
    uncertainty: PyTensor,
    beta1: f64,
    beta2: f64,
    stream: usize,
) -> PyResult<bool> {
    let (importance, factor, mut mean, mut uncertainty) =
        (importance.0, factor.0, mean.0, uncertainty.0);
    let stream = Stream(stream);
    detached(py, move || {
        cuda::smooth_(&importance, &factor, &mut mean, &mut uncertainty, beta1, beta2, stream)
    })
}

#[pyfunction]
#[pyo3(signature = (a, b, grad_a, grad_b, factor, stream=0))]
fn cuda_add_orthogonality_gradient_(
    py: Python<'_>,
    a: Vec<PyTensor>,
    b: Vec<PyTensor>,
    grad_a: Vec<PyTensor>,
    grad_b: Vec<PyTensor>,
    factor: PyTensor,
    stream: usize,
) -> PyResult<Option<PyTensor>> {
    let (a, b, mut grad_a, mut grad_b) = (raw(a), raw(b), raw(grad_a), raw(grad_b));
    let factor = factor.0;
    detached(py, move || {
        let stream = Stream(stream);
        let value =
            cuda::add_orthogonality_gradient_(&a, &b, &mut grad_a, &mut grad_b, &factor, stream)?;
        Ok(value.map(PyTensor))
    })
}

/// Adds everything to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(cuda_compile, module)?)?;
    module.add_function(wrap_pyfunction!(cuda_cubin, module)?)?;
    module.add_function(wrap_pyfunction!(cuda_kernels, module)?)?;
    module.add_function(wrap_pyfunction!(cuda_prepare, module)?)?;
    module.add_function(wrap_pyfunction!(cuda_unavailable, module)?)?;
    module.add_function(wrap_pyfunction!(cuda_emulate, module)?)?;
    module.add_function(wrap_pyfunction!(cuda_draw_mask, module)?)?;
    module.add_function(wrap_pyfunction!(cuda_apply_mask, module)?)?;
    module.add_function(wrap_pyfunction!(cuda_down, module)?)?;
    module.add_function(wrap_pyfunction!(cuda_add_grad_x, module)?)?;
    module.add_function(wrap_pyfunction!(cuda_factors, module)?)?;
    module.add_function(wrap_pyfunction!(cuda_gradients, module)?)?;
    module.add_function(wrap_pyfunction!(cuda_importance_, module)?)?;
    module.add_function(wrap_pyfunction!(cuda_smooth_, module)?)?;
    module.add_function(wrap_pyfunction!(cuda_add_orthogonality_gradient_, module)?)?;
    Ok(())
}
