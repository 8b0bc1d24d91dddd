//! What components are worth, and which of them move, as Python functions.

use std::sync::{Mutex, PoisonError};

use numpy::PyReadonlyArray1;
use pyo3::prelude::*;
use pyo3_tch::PyTensor;

use super::vector;
use crate::bindings::{detached, raw};
use crate::kernels::fluctuation::Rates;
use crate::policies::fluctuation::{Components as Effects, Means};
use crate::policies::moves::{self, Bounds, Components, Modules};

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

    #[pyo3(signature = (mean, squares, steps, *, mean_rate, square_rate))]
    fn observe_(
        &self,
        py: Python<'_>,
        mean: PyTensor,
        squares: PyTensor,
        steps: PyTensor,
        mean_rate: f64,
        square_rate: f64,
    ) -> PyResult<()> {
        let (mut mean, mut squares, mut steps) = (mean.0, squares.0, steps.0);
        let rates = Rates { mean: mean_rate, squares: square_rate };
        detached(py, move || {
            let means = Means { mean: &mut mean, squares: &mut squares, steps: &mut steps };
            // Taken without the GIL only: who waits for it while holding the GIL would wait for ever.
            let effects = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            effects.observe_(means, rates)
        })
    }
}

/// The components that leave, and what each module gains.
#[pyfunction]
#[pyo3(signature = (values, judged, grown, ranks, caps, costs, *, budget, most, margin))]
#[allow(clippy::too_many_arguments)]
fn choose_moves(
    py: Python<'_>,
    values: PyReadonlyArray1<'_, f64>,
    judged: PyReadonlyArray1<'_, bool>,
    grown: PyReadonlyArray1<'_, bool>,
    ranks: PyReadonlyArray1<'_, u64>,
    caps: PyReadonlyArray1<'_, u64>,
    costs: PyReadonlyArray1<'_, u64>,
    budget: u64,
    most: u64,
    margin: f64,
) -> PyResult<(Vec<usize>, Vec<u64>)> {
    let (values, judged) = (vector("values", &values)?, vector("judged", &judged)?);
    let grown = vector("grown", &grown)?;
    let (ranks, caps) = (vector("ranks", &ranks)?, vector("caps", &caps)?);
    let costs = vector("costs", &costs)?;
    detached(py, || {
        let modules = Modules { ranks: &ranks, caps: &caps, costs: &costs };
        let components = Components { values: &values, judged: &judged, grown: &grown };
        let chosen = moves::choose(&modules, &components, &Bounds { budget, most, margin })?;
        Ok((chosen.removed, chosen.gained))
    })
}

/// Adds everything to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PyFluctuation>()?;
    module.add_function(wrap_pyfunction!(choose_moves, module)?)
}
