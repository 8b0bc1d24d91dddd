//! The op of a square matrix as Python functions.

use pyo3::prelude::*;
use pyo3_tch::PyTensor;

use super::Onto;
use crate::bindings::detached;
use crate::kernels::cuda;
use crate::ops::dropout::Dropout;
use crate::ops::square::{self, Form, Given, Square};

type Angles = Option<(PyTensor, PyTensor)>;

fn square_of(m: PyTensor, form: i64, scale: f64, angles: Angles, fold: bool) -> PyResult<Square> {
    let angles = angles.map(|(cos, sin)| (cos.0, sin.0));
    Ok(Square { m: m.0, scale, form: Form::of(form, angles, fold)? })
}

/// Adds the update to y in place, or computes the whole linear layer; gives y, what the backward pass needs, and
/// the mask, where it has to be kept.
#[pyfunction]
#[pyo3(signature = (x, m, form, scale, *, out, angles=None, fold=true, y=None, weight=None, bias=None, p=0.0, seed=0, stream=0))]
#[allow(clippy::too_many_arguments)]
fn square_forward(
    py: Python<'_>,
    x: PyTensor,
    m: PyTensor,
    form: i64,
    scale: f64,
    out: i64,
    angles: Angles,
    fold: bool,
    y: Option<PyTensor>,
    weight: Option<PyTensor>,
    bias: Option<PyTensor>,
    p: f64,
    seed: u64,
    stream: usize,
) -> PyResult<(PyTensor, Option<PyTensor>, Option<PyTensor>)> {
    let queue = cuda::Stream(stream);
    let square = square_of(m, form, scale, angles, fold)?;
    let (x, onto) = (x.0, Onto::of(y, weight, bias));
    detached(py, move || {
        let mut dropout = Dropout::of(&x, p, seed, None, queue)?;
        let (y, kept) = onto
            .add(&x, out, |x, y, start| square::forward(&square, x, y, start, dropout.as_mut()))?;
        let mask = dropout.and_then(|dropout| dropout.mask);
        Ok((PyTensor(y), kept.map(PyTensor), mask.map(PyTensor)))
    })
}

/// Gradients for x and M, those that are asked for.
#[pyfunction]
#[pyo3(signature = (gy, x, kept, m, form, scale, *, features, angles=None, fold=true, mask=None, p=0.0, seed=0, needs=(true, true), weight=None, stream=0))]
#[allow(clippy::too_many_arguments)]
fn square_backward(
    py: Python<'_>,
    gy: PyTensor,
    x: Option<PyTensor>,
    kept: Option<PyTensor>,
    m: PyTensor,
    form: i64,
    scale: f64,
    features: i64,
    angles: Angles,
    fold: bool,
    mask: Option<PyTensor>,
    p: f64,
    seed: u64,
    needs: (bool, bool),
    weight: Option<PyTensor>,
    stream: usize,
) -> PyResult<(Option<PyTensor>, Option<PyTensor>)> {
    let square = square_of(m, form, scale, angles, fold)?;
    let (gy, x, kept) = (gy.0, x.map(|x| x.0), kept.map(|kept| kept.0));
    let (mask, weight) = (mask.map(|mask| mask.0), weight.map(|weight| weight.0));
    detached(py, move || {
        // What was kept, or x, has the dtype of the products.
        let like = kept.as_ref().or(x.as_ref()).unwrap_or(&gy);
        let dropout = Dropout::of(like, p, seed, mask, cuda::Stream(stream))?;
        let given = Given {
            features,
            kept: kept.as_ref(),
            x: x.as_ref(),
            kind: like.f_kind()?,
            dropout: dropout.as_ref(),
            weight: weight.as_ref(),
            needs,
        };
        let got = square::backward(&square, &gy, &given)?;
        Ok((got.x.map(PyTensor), got.m.map(PyTensor)))
    })
}

/// Adds everything to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(square_forward, module)?)?;
    module.add_function(wrap_pyfunction!(square_backward, module)?)
}
