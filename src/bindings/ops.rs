//! The ops as Python functions.

use pyo3::prelude::*;
use pyo3_tch::PyTensor;
use tch::Tensor;

use super::detached;
use crate::checks;
use crate::errors::{Error, Result};
use crate::kernels::cuda;
use crate::ops::base::{Base, Start};
use crate::ops::dropout::{self, Dropout};
use crate::ops::low_rank::{self, LowRank};

mod block_diagonal;
mod linear;
mod square;

type Gradients = (Option<PyTensor>, PyTensor, PyTensor, PyTensor);

/// Adds `s B (E * (A drop(x)))` to y in place; gives t and the mask, where it has to be kept.
#[pyfunction]
#[pyo3(signature = (y, x, a, b, e, scale, p=0.0, seed=0, stream=0))]
#[allow(clippy::too_many_arguments)]
fn adapter_forward(
    py: Python<'_>,
    y: PyTensor,
    x: PyTensor,
    a: PyTensor,
    b: PyTensor,
    e: PyTensor,
    scale: f64,
    p: f64,
    seed: u64,
    stream: usize,
) -> PyResult<(PyTensor, Option<PyTensor>)> {
    let queue = cuda::Stream(stream);
    let low_rank = LowRank { a: a.0, b: b.0, e: e.0, scale, queue };
    let (mut y, x) = (y.0, x.0);
    detached(py, move || {
        let mut dropout = Dropout::of(&x, p, seed, None, queue)?;
        let t = low_rank::forward(&low_rank, &x, &mut y, dropout.as_mut())?;
        Ok((PyTensor(t), dropout.and_then(|dropout| dropout.mask).map(PyTensor)))
    })
}

/// A whole linear layer with its update, x (..., in); gives y (..., out), t and the mask, where it has
/// to be kept.
#[pyfunction]
#[pyo3(signature = (x, weight, bias, a, b, e, scale, p=0.0, seed=0, stream=0))]
#[allow(clippy::too_many_arguments)]
fn linear_forward(
    py: Python<'_>,
    x: PyTensor,
    weight: PyTensor,
    bias: Option<PyTensor>,
    a: PyTensor,
    b: PyTensor,
    e: PyTensor,
    scale: f64,
    p: f64,
    seed: u64,
    stream: usize,
) -> PyResult<(PyTensor, PyTensor, Option<PyTensor>)> {
    let queue = cuda::Stream(stream);
    let low_rank = LowRank { a: a.0, b: b.0, e: e.0, scale, queue };
    let (x, weight, bias) = (x.0, weight.0, bias.map(|bias| bias.0));
    detached(py, move || {
        let mut dropout = Dropout::of(&x, p, seed, None, queue)?;
        let base = Base { weight: &weight, bias: bias.as_ref() };
        let (y, t) = low_rank::linear(&low_rank, &x, &base, dropout.as_mut())?;
        let mask = dropout.and_then(|dropout| dropout.mask);
        Ok((PyTensor(y), PyTensor(t), mask.map(PyTensor)))
    })
}

/// Gradients for x (if asked for), A, B, E; adds the importance to its slot if one is given.
#[pyfunction]
#[pyo3(signature = (gy, x, t, a, b, e, scale, mask=None, p=0.0, needs_x=true, importance=None, slot=0, seed=0, weight=None, stream=0))]
#[allow(clippy::too_many_arguments)]
fn adapter_backward(
    py: Python<'_>,
    gy: PyTensor,
    x: PyTensor,
    t: PyTensor,
    a: PyTensor,
    b: PyTensor,
    e: PyTensor,
    scale: f64,
    mask: Option<PyTensor>,
    p: f64,
    needs_x: bool,
    importance: Option<PyTensor>,
    slot: i64,
    seed: u64,
    weight: Option<PyTensor>,
    stream: usize,
) -> PyResult<Gradients> {
    let queue = cuda::Stream(stream);
    let low_rank = LowRank { a: a.0, b: b.0, e: e.0, scale, queue };
    let (gy, x, t) = (gy.0, x.0, t.0);
    let (mask, weight) = (mask.map(|mask| mask.0), weight.map(|weight| weight.0));
    let mut vector = importance.map(|vector| vector.0);
    detached(py, move || {
        let dropout = Dropout::of(&x, p, seed, mask, queue)?;
        let target = vector.as_mut().map(|vector| (vector, slot));
        let (dropout, weight) = (dropout.as_ref(), weight.as_ref());
        let gradients =
            low_rank::backward(&low_rank, &x, &t, &gy, dropout, weight, needs_x, target)?;
        let low_rank::Gradients { x, a, b, e } = gradients;
        Ok((x.map(PyTensor), PyTensor(a), PyTensor(b), PyTensor(e)))
    })
}

/// Packed dropout mask of a tensor of so many elements, as the CPU draws it.
#[pyfunction]
#[pyo3(signature = (elements, p, seed, offset=0))]
fn dropout_mask(
    py: Python<'_>,
    elements: usize,
    p: f64,
    seed: u64,
    offset: u64,
) -> PyResult<PyTensor> {
    detached(py, || dropout::mask(elements, p, seed, offset).map(PyTensor))
}

/// What an update is added to: a y that is there, or what the base layer makes of x.
struct Onto {
    y: Option<Tensor>,
    weight: Option<Tensor>,
    bias: Option<Tensor>,
}

impl Onto {
    fn of(y: Option<PyTensor>, weight: Option<PyTensor>, bias: Option<PyTensor>) -> Self {
        let [y, weight, bias] = [y, weight, bias].map(|tensor| tensor.map(|tensor| tensor.0));
        Self { y, weight, bias }
    }

    /// y of `out` features with what `add` adds to it, given flat x and y and what y holds.
    fn add<T>(
        self,
        x: &Tensor,
        out: i64,
        add: impl FnOnce(&Tensor, &mut Tensor, Start<'_>) -> Result<T>,
    ) -> Result<(Tensor, T)> {
        match (self.y, &self.weight) {
            (Some(mut y), None) => {
                let (tokens, _) = checks::matrix("x", x)?;
                checks::shape("y", &y, &[tokens, out])?;
                let kept = add(x, &mut y, Start::Add)?;
                Ok((y, kept))
            }
            (None, Some(weight)) => {
                Base { weight, bias: self.bias.as_ref() }.with_update(x, out, add)
            }
            _ => Err(Error::Value("give y or weight, one of the two".into())),
        }
    }
}

/// Adds everything to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("RESERVE_E", low_rank::RESERVE_E)?;
    module.add_function(wrap_pyfunction!(adapter_forward, module)?)?;
    module.add_function(wrap_pyfunction!(adapter_backward, module)?)?;
    module.add_function(wrap_pyfunction!(linear_forward, module)?)?;
    module.add_function(wrap_pyfunction!(dropout_mask, module)?)?;
    block_diagonal::register(module)?;
    linear::register(module)?;
    square::register(module)
}
