//! The block-diagonal op as Python functions.

use pyo3::prelude::*;
use pyo3_tch::PyTensor;

use super::Onto;
use crate::bindings::detached;
use crate::kernels::cuda;
use crate::ops::block_diagonal::{self, BlockDiagonal};
use crate::ops::dropout::Dropout;

/// Adds the update to y in place, or computes the whole linear layer; gives y, t and the mask, where it has to
/// be kept.
#[pyfunction]
#[pyo3(signature = (x, a, b, scale, *, y=None, weight=None, bias=None, p=0.0, seed=0, stream=0))]
#[allow(clippy::too_many_arguments)]
fn block_diagonal_forward(
    py: Python<'_>,
    x: PyTensor,
    a: PyTensor,
    b: PyTensor,
    scale: f64,
    y: Option<PyTensor>,
    weight: Option<PyTensor>,
    bias: Option<PyTensor>,
    p: f64,
    seed: u64,
    stream: usize,
) -> PyResult<(PyTensor, PyTensor, Option<PyTensor>)> {
    let queue = cuda::Stream(stream);
    let update = BlockDiagonal { a: a.0, b: b.0, scale };
    let (x, onto) = (x.0, Onto::of(y, weight, bias));
    detached(py, move || {
        let mut dropout = Dropout::of(&x, p, seed, None, queue)?;
        let (y, t) = onto.add(&x, update.out()?, |x, y, start| {
            block_diagonal::forward(&update, x, y, start, dropout.as_mut())
        })?;
        let mask = dropout.and_then(|dropout| dropout.mask);
        Ok((PyTensor(y), PyTensor(t), mask.map(PyTensor)))
    })
}

/// Gradients for x (if asked for), A and B.
#[pyfunction]
#[pyo3(signature = (gy, x, t, a, b, scale, *, mask=None, p=0.0, seed=0, needs_x=true, weight=None, stream=0))]
#[allow(clippy::too_many_arguments)]
fn block_diagonal_backward(
    py: Python<'_>,
    gy: PyTensor,
    x: PyTensor,
    t: PyTensor,
    a: PyTensor,
    b: PyTensor,
    scale: f64,
    mask: Option<PyTensor>,
    p: f64,
    seed: u64,
    needs_x: bool,
    weight: Option<PyTensor>,
    stream: usize,
) -> PyResult<(Option<PyTensor>, PyTensor, PyTensor)> {
    let update = BlockDiagonal { a: a.0, b: b.0, scale };
    let (gy, x, t) = (gy.0, x.0, t.0);
    let (mask, weight) = (mask.map(|mask| mask.0), weight.map(|weight| weight.0));
    detached(py, move || {
        let dropout = Dropout::of(&x, p, seed, mask, cuda::Stream(stream))?;
        let (dropout, weight) = (dropout.as_ref(), weight.as_ref());
        let got = block_diagonal::backward(&update, &x, &t, &gy, dropout, weight, needs_x)?;
        Ok((got.x.map(PyTensor), PyTensor(got.a), PyTensor(got.b)))
    })
}

/// Adds everything to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(block_diagonal_forward, module)?)?;
    module.add_function(wrap_pyfunction!(block_diagonal_backward, module)?)
}
