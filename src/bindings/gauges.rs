//! The gauges as Python functions.

use pyo3::prelude::*;
use pyo3_tch::PyTensor;

use super::detached;
use crate::gauges::sketch_scores::{self, Sketched};
use crate::gauges::{energy, sketch};
use crate::kernels::cuda;
use crate::ops::low_rank::{self, LowRank};

/// `sum |dW * (gy^T x)|` as a float64 scalar tensor.
#[pyfunction(name = "importance")]
#[pyo3(signature = (gy, x, a, b, e, scale, stream=0))]
#[allow(clippy::too_many_arguments)]
fn module_importance(
    py: Python<'_>,
    gy: PyTensor,
    x: PyTensor,
    a: PyTensor,
    b: PyTensor,
    e: PyTensor,
    scale: f64,
    stream: usize,
) -> PyResult<PyTensor> {
    let queue = cuda::Stream(stream);
    let low_rank = LowRank { a: a.0, b: b.0, e: e.0, scale, queue };
    let (gy, x) = (gy.0, x.0);
    detached(py, move || low_rank::importance(&low_rank, &x, &gy).map(PyTensor))
}

/// Adds what goes into a module in one backward pass, squared, in place.
#[pyfunction]
fn add_energy_(py: Python<'_>, total: PyTensor, gy: PyTensor, x: PyTensor) -> PyResult<()> {
    let (mut total, gy, x) = (total.0, gy.0, x.0);
    detached(py, move || energy::accumulate(&mut total, &gy, &x))
}

/// Adds the gradient `gy^T x` of one backward pass to a sketch, in place.
#[pyfunction]
#[pyo3(signature = (left, right, omega, psi, gy, x, taken=None))]
#[allow(clippy::too_many_arguments)]
fn add_to_sketch_(
    py: Python<'_>,
    left: PyTensor,
    right: PyTensor,
    omega: PyTensor,
    psi: PyTensor,
    gy: PyTensor,
    x: PyTensor,
    taken: Option<(PyTensor, PyTensor)>,
) -> PyResult<bool> {
    let (mut left, mut right, omega, psi) = (left.0, right.0, omega.0, psi.0);
    let (gy, x) = (gy.0, x.0);
    let mut taken = taken.map(|(left, right)| (left.0, right.0));
    detached(py, move || {
        let taken = taken.as_mut().map(|(left, right)| [left, right]);
        sketch::accumulate(&mut left, &mut right, &omega, &psi, &gy, &x, taken)
    })
}

/// Takes the sketches of one optimizer step into their sum, in place.
#[pyfunction]
#[pyo3(signature = (step, sum, steps, *, scale=None, found_inf=None))]
fn take_sketches_(
    py: Python<'_>,
    step: PyTensor,
    sum: PyTensor,
    steps: PyTensor,
    scale: Option<PyTensor>,
    found_inf: Option<PyTensor>,
) -> PyResult<()> {
    let (mut step, mut sum, mut steps) = (step.0, sum.0, steps.0);
    let (scale, overflow) = (scale.map(|scale| scale.0), found_inf.map(|found| found.0));
    detached(py, move || {
        sketch::take_step_(&mut step, &mut sum, &mut steps, scale.as_ref(), overflow.as_ref())
    })
}

/// The leading singular triples of a sketched gradient outside the span of A and B.
#[pyfunction]
#[pyo3(signature = (left, right, psi, a, b, count=1))]
fn sketched_triples(
    py: Python<'_>,
    left: PyTensor,
    right: PyTensor,
    psi: PyTensor,
    a: PyTensor,
    b: PyTensor,
    count: i64,
) -> PyResult<(PyTensor, PyTensor, PyTensor)> {
    let (left, right, psi, a, b) = (left.0, right.0, psi.0, a.0, b.0);
    detached(py, move || {
        let found = sketch::triples(&left, &right, &psi, &a, &b, count)?;
        Ok((PyTensor(found.sigma), PyTensor(found.u), PyTensor(found.v)))
    })
}

/// The scores of many sketched gradients, float64: the first singular value of each outside the span of A and B.
#[pyfunction]
#[pyo3(name = "sketch_scores")]
fn scores_of_sketches(
    py: Python<'_>,
    sketches: Vec<(PyTensor, PyTensor)>,
    psis: Vec<PyTensor>,
    factors: Vec<(PyTensor, PyTensor)>,
) -> PyResult<PyTensor> {
    if sketches.len() != psis.len() || sketches.len() != factors.len() {
        return Err(pyo3::exceptions::PyValueError::new_err(format!(
            "sketches, psis and factors are {}, {} and {}; give one of each for a module",
            sketches.len(),
            psis.len(),
            factors.len()
        )));
    }
    let of_all = sketches.into_iter().zip(psis).zip(factors);
    let modules: Vec<_> = of_all
        .map(|(((left, right), psi), (a, b))| Sketched {
            left: left.0,
            right: right.0,
            psi: psi.0,
            a: a.0,
            b: b.0,
        })
        .collect();
    detached(py, move || sketch_scores::scores(&modules).map(PyTensor))
}

/// Adds everything to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(module_importance, module)?)?;
    module.add_function(wrap_pyfunction!(add_energy_, module)?)?;
    module.add_function(wrap_pyfunction!(add_to_sketch_, module)?)?;
    module.add_function(wrap_pyfunction!(take_sketches_, module)?)?;
    module.add_function(wrap_pyfunction!(scores_of_sketches, module)?)?;
    module.add_function(wrap_pyfunction!(sketched_triples, module)?)
}
