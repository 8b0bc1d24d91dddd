//! What components are worth, and which of them move, as Python functions.

use std::sync::{Mutex, PoisonError};

use numpy::PyReadonlyArray1;
use pyo3::prelude::*;
use pyo3_tch::PyTensor;

use super::vector;
use crate::bindings::{detached, raw};
use crate::policies::fluctuation::{self, Components as Effects, Sums};
use crate::policies::moves::{self, Bounds, Components, Modules};

/// Takes the first-order effects of one step in, in place.
#[pyfunction]
#[pyo3(signature = (values, gradients, mean, squares, steps, rate, *, grad_scale=None))]
#[allow(clippy::too_many_arguments)]
fn observe_fluctuation_(
    py: Python<'_>,
    values: Vec<PyTensor>,
    gradients: Vec<Option<PyTensor>>,
    mean: PyTensor,
    squares: PyTensor,
    steps: PyTensor,
    rate: f64,
    grad_scale: Option<PyTensor>,
) -> PyResult<()> {
    let values = raw(values);
    let gradients: Vec<_> =
        gradients.into_iter().map(|gradient| gradient.map(|gradient| gradient.0)).collect();
    let (mut mean, mut squares, mut steps) = (mean.0, squares.0, steps.0);
    let scale = grad_scale.map(|scale| scale.0);
    detached(py, move || {
        let sums = Sums { mean: &mut mean, squares: &mut squares, steps: &mut steps };
        fluctuation::observe_(&values, &gradients, sums, rate, scale.as_ref())
    })
}

/// E of all modules, and what it does in every step.
#[pyclass(name = "Fluctuation", module = "increlora_rs._core", frozen)]
struct PyFluctuation(Mutex<Effects>);

#[pymethods]
impl PyFluctuation {
    #[new]
    fn new(py: Python<'_>, values: Vec<PyTensor>) -> PyResult<Self> {
        let values = raw(values);
        Ok(Self(Mutex::new(detached(py, || Effects::new(values))?)))
    }

    #[pyo3(signature = (mean, squares, steps, rate, *, grad_scale=None))]
    fn observe_(
        &self,
        py: Python<'_>,
        mean: PyTensor,
        squares: PyTensor,
        steps: PyTensor,
        rate: f64,
        grad_scale: Option<PyTensor>,
    ) -> PyResult<()> {
        let (mut mean, mut squares, mut steps) = (mean.0, squares.0, steps.0);
        let scale = grad_scale.map(|scale| scale.0);
        detached(py, move || {
            let sums = Sums { mean: &mut mean, squares: &mut squares, steps: &mut steps };
            // Taken without the GIL only: who waits for it while holding the GIL would wait for ever.
            let effects = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            effects.observe_(sums, rate, scale.as_ref())
        })
    }
}

/// The components that leave, and what each module gains.
#[pyfunction]
#[pyo3(signature = (values, judged, ranks, caps, costs, *, budget, most, margin))]
#[allow(clippy::too_many_arguments)]
fn choose_moves(
    py: Python<'_>,
    values: PyReadonlyArray1<'_, f64>,
    judged: PyReadonlyArray1<'_, bool>,
    ranks: PyReadonlyArray1<'_, u64>,
    caps: PyReadonlyArray1<'_, u64>,
    costs: PyReadonlyArray1<'_, u64>,
    budget: u64,
    most: u64,
    margin: f64,
) -> PyResult<(Vec<usize>, Vec<u64>)> {
    let (values, judged) = (vector("values", &values)?, vector("judged", &judged)?);
    let (ranks, caps) = (vector("ranks", &ranks)?, vector("caps", &caps)?);
    let costs = vector("costs", &costs)?;
    detached(py, || {
        let modules = Modules { ranks: &ranks, caps: &caps, costs: &costs };
        let components = Components { values: &values, judged: &judged };
        let chosen = moves::choose(&modules, &components, &Bounds { budget, most, margin })?;
        Ok((chosen.removed, chosen.gained))
    })
}

/// Adds everything to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PyFluctuation>()?;
    module.add_function(wrap_pyfunction!(observe_fluctuation_, module)?)?;
    module.add_function(wrap_pyfunction!(choose_moves, module)?)
}
