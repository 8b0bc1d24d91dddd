//! AdaLoRA's schedule and scores as Python classes.

use std::sync::{Mutex, PoisonError};

use numpy::{PyArray1, PyReadonlyArray1};
use pyo3::prelude::*;
use pyo3_tch::PyTensor;

use super::vector;
use crate::bindings::{detached, raw};
use crate::policies::triplets::scores::Scores;
use crate::policies::triplets::{live, Schedule, Wish};

/// When triplets are masked, and how many stay live.
#[pyclass(name = "TripletSchedule", module = "increlora_rs._core", frozen, eq)]
#[derive(PartialEq)]
struct PySchedule(Schedule);

#[pymethods]
impl PySchedule {
    #[new]
    #[pyo3(signature = (total_steps, first, target, *, tinit=None, tfinal=None, deltaT=None))]
    #[allow(non_snake_case)]
    fn new(
        total_steps: u64,
        first: u64,
        target: u64,
        tinit: Option<u64>,
        tfinal: Option<u64>,
        deltaT: Option<u64>,
    ) -> PyResult<Self> {
        let wish = Wish { tinit, tfinal, interval: deltaT };
        Ok(Self(Schedule::new(&wish, total_steps, first, target)?))
    }

    #[getter]
    fn total_steps(&self) -> u64 {
        self.0.total
    }

    #[getter]
    fn first(&self) -> u64 {
        self.0.first
    }

    #[getter]
    fn target(&self) -> u64 {
        self.0.target
    }

    #[getter]
    fn tinit(&self) -> u64 {
        self.0.tinit
    }

    #[getter]
    fn tfinal(&self) -> u64 {
        self.0.tfinal
    }

    #[getter(deltaT)]
    fn delta_t(&self) -> u64 {
        self.0.interval
    }

    #[getter]
    fn last(&self) -> u64 {
        self.0.last()
    }

    fn budget(&self, step: u64) -> u64 {
        self.0.budget(step)
    }

    fn is_event(&self, step: u64) -> bool {
        self.0.is_event(step)
    }

    fn observes(&self, step: u64) -> bool {
        self.0.observes(step)
    }

    fn holds(&self, step: u64) -> bool {
        self.0.holds(step)
    }

    fn __repr__(&self) -> String {
        let Schedule { total, tinit, tfinal, interval, first, target } = self.0;
        format!(
            "TripletSchedule({total}, {first}, {target}, tinit={tinit}, tfinal={tfinal}, deltaT={interval})"
        )
    }
}

/// The sensitivities of the triplets of all modules.
#[pyclass(name = "TripletScores", module = "increlora_rs._core", frozen)]
struct PyScores(Mutex<Scores>);

#[pymethods]
impl PyScores {
    #[new]
    #[allow(clippy::too_many_arguments)]
    fn new(
        py: Python<'_>,
        a: Vec<PyTensor>,
        b: Vec<PyTensor>,
        e: Vec<PyTensor>,
        mean: PyTensor,
        uncertainty: PyTensor,
        beta1: f64,
        beta2: f64,
    ) -> PyResult<Self> {
        let (a, b, e, mean, uncertainty) = (raw(a), raw(b), raw(e), mean.0, uncertainty.0);
        let scores = detached(py, || Scores::new(a, b, e, mean, uncertainty, beta1, beta2))?;
        Ok(Self(Mutex::new(scores)))
    }

    fn observe_(&self, py: Python<'_>) -> PyResult<()> {
        // Taken without the GIL only: who waits for it while holding the GIL would wait for ever.
        detached(py, || self.0.lock().unwrap_or_else(PoisonError::into_inner).observe_())
    }

    fn values(&self, py: Python<'_>) -> PyResult<PyTensor> {
        detached(py, || {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).values().map(PyTensor)
        })
    }
}

/// Which triplets stay live.
#[pyfunction]
fn live_triplets<'py>(
    py: Python<'py>,
    scores: PyReadonlyArray1<'py, f64>,
    budget: usize,
) -> PyResult<Bound<'py, PyArray1<bool>>> {
    Ok(PyArray1::from_vec(py, live(&vector("scores", &scores)?, budget)))
}

/// Adds everything to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PySchedule>()?;
    module.add_class::<PyScores>()?;
    module.add_function(wrap_pyfunction!(live_triplets, module)?)
}
