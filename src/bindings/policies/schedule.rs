//! The schedule of growth as a Python class.

use numpy::PyReadonlyArray1;
use pyo3::prelude::*;

use super::vector;
use crate::bindings::detached;
use crate::checks;
use crate::policies::growth::{self, Schedule, Wish};

/// When and how much the ranks grow.
#[pyclass(name = "Schedule", module = "increlora_rs._core", frozen, eq)]
#[derive(PartialEq)]
struct PySchedule {
    plan: growth::Plan,
    /// Of a component of each module; `None`: 1.
    costs: Option<Vec<u64>>,
}

/// Costs of components of so many modules.
fn costs_of(costs: Option<&Vec<u64>>, modules: usize) -> Vec<u64> {
    costs.cloned().unwrap_or_else(|| vec![1; modules])
}

#[pymethods]
impl PySchedule {
    #[new]
    #[pyo3(signature = (total_steps, ranks, caps, budget, *, tinit=None, deltaT=None, top_h=None, add_r=1, growth_end=0.1, costs=None))]
    #[allow(non_snake_case, clippy::too_many_arguments)]
    fn new(
        py: Python<'_>,
        total_steps: u64,
        ranks: PyReadonlyArray1<'_, u64>,
        caps: PyReadonlyArray1<'_, u64>,
        budget: u64,
        tinit: Option<u64>,
        deltaT: Option<u64>,
        top_h: Option<u64>,
        add_r: u64,
        growth_end: f64,
        costs: Option<PyReadonlyArray1<'_, u64>>,
    ) -> PyResult<Self> {
        let wish = Wish { warmup: tinit, interval: deltaT, top_h, add_r, growth_end };
        let (ranks, caps) = (vector("ranks", &ranks)?, vector("caps", &caps)?);
        let costs = costs.map(|costs| vector("costs", &costs)).transpose()?;
        let plan = detached(py, || {
            let each = costs_of(costs.as_ref(), ranks.len());
            growth::plan(&wish, total_steps, &ranks, &caps, &each, budget)
        })?;
        Ok(Self { plan, costs })
    }

    #[getter]
    fn tinit(&self) -> u64 {
        self.plan.schedule.warmup
    }

    #[getter(deltaT)]
    fn delta_t(&self) -> u64 {
        self.plan.schedule.interval
    }

    #[getter]
    fn top_h(&self) -> u64 {
        self.plan.schedule.top_h
    }

    #[getter]
    fn add_r(&self) -> u64 {
        self.plan.schedule.add_r
    }

    #[getter]
    fn reached(&self) -> u64 {
        self.plan.reached
    }

    #[getter]
    fn possible(&self) -> u64 {
        self.plan.possible
    }

    #[getter]
    fn end(&self) -> u64 {
        self.plan.end
    }

    #[getter]
    fn last(&self) -> u64 {
        self.plan.last
    }

    fn is_event(&self, step: u64) -> bool {
        self.plan.schedule.is_event(step)
    }

    fn next_event(&self, step: u64) -> u64 {
        self.plan.schedule.next_event(step)
    }

    fn choose(
        &self,
        py: Python<'_>,
        scores: PyReadonlyArray1<'_, f64>,
        ranks: PyReadonlyArray1<'_, u64>,
        caps: PyReadonlyArray1<'_, u64>,
        budget: u64,
    ) -> PyResult<Vec<(usize, u64)>> {
        let (scores, ranks) = (vector("scores", &scores)?, vector("ranks", &ranks)?);
        let caps = vector("caps", &caps)?;
        detached(py, || {
            let costs = costs_of(self.costs.as_ref(), ranks.len());
            let schedule = &self.plan.schedule;
            let grown = growth::choose(schedule, &scores, &ranks, &caps, &costs, budget)?;
            Ok(grown.into_iter().map(|growth| (growth.module, growth.components)).collect())
        })
    }

    fn __repr__(&self) -> String {
        let Schedule { warmup, interval, top_h, add_r } = self.plan.schedule;
        format!("Schedule(tinit={warmup}, deltaT={interval}, top_h={top_h}, add_r={add_r})")
    }
}

/// Steps of the importance window.
#[pyfunction]
fn importance_window(beta1: f64, beta2: f64) -> PyResult<u64> {
    checks::decay("beta1", beta1)?;
    checks::decay("beta2", beta2)?;
    Ok(growth::window(beta1, beta2))
}

/// Adds everything to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PySchedule>()?;
    module.add_function(wrap_pyfunction!(importance_window, module)?)
}
