//! What the scheduler calls at every optimizer step, as Python classes that hold the parameters.

use std::sync::{Mutex, MutexGuard, PoisonError};

use pyo3::prelude::*;
use pyo3::types::PyTuple;
use pyo3_tch::PyTensor;

use crate::bindings::{detached, named, raw};
use crate::kernels::cuda;
use crate::policies::growth::LearningRate;
use crate::policies::restart::{self, Newborn};
use crate::policies::step::{Plan, Scale, Smoothing};

/// The object, also after a call that panicked. To be taken without the GIL only: who waits for it
/// while holding the GIL would wait for ever.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The smoothing and the regulariser of one step in one call.
#[pyclass(name = "StepPlan", module = "increlora_rs._core", frozen)]
struct PyPlan(Mutex<Plan>);

#[pymethods]
impl PyPlan {
    #[new]
    #[allow(clippy::too_many_arguments)]
    fn new(
        py: Python<'_>,
        a: Vec<PyTensor>,
        b: Vec<PyTensor>,
        importance: PyTensor,
        norm: PyTensor,
        mean: PyTensor,
        uncertainty: PyTensor,
        beta1: f64,
        beta2: f64,
    ) -> PyResult<Self> {
        let (a, b) = (raw(a), raw(b));
        let smoothing = Smoothing {
            importance: importance.0,
            norm: norm.0,
            mean: mean.0,
            uncertainty: uncertainty.0,
            beta1,
            beta2,
        };
        Ok(Self(Mutex::new(detached(py, || Plan::new(a, b, smoothing))?)))
    }

    #[allow(clippy::too_many_arguments)]
    #[pyo3(signature = (*, smooth, weight, loss_scale=None, grad_scale=None, found_inf=None, stream=0))]
    fn take_gradients_(
        &self,
        py: Python<'_>,
        smooth: bool,
        weight: f64,
        loss_scale: Option<f64>,
        grad_scale: Option<PyTensor>,
        found_inf: Option<PyTensor>,
        stream: usize,
    ) -> PyResult<()> {
        let scale = Scale {
            loss: loss_scale,
            gradients: grad_scale.map(|scale| scale.0),
            overflow: found_inf.map(|found| found.0),
        };
        detached(py, move || {
            locked(&self.0).take_gradients_(smooth, weight, &scale, cuda::Stream(stream))
        })
    }

    fn orthogonality(&self, py: Python<'_>) -> PyResult<PyTensor> {
        detached(py, || locked(&self.0).orthogonality().map(PyTensor))
    }
}

/// The rows born during training of the parameters of one optimizer group.
#[pyclass(name = "Newborns", module = "increlora_rs._core", frozen)]
struct PyNewborns(Mutex<Vec<Newborn>>);

#[pymethods]
impl PyNewborns {
    #[new]
    fn new(py: Python<'_>, parameters: Vec<Bound<'_, PyTuple>>) -> PyResult<Self> {
        let mut entries: Vec<(PyTensor, Vec<u64>, i64)> = Vec::with_capacity(parameters.len());
        for (index, entry) in parameters.into_iter().enumerate() {
            entries.push(entry.extract().map_err(|error| {
                named(py, &format!("parameters[{index}], (parameter, births, dim)"), &error)
            })?);
        }
        let newborns = detached(py, || {
            let entries = entries.into_iter();
            entries
                .filter_map(|(p, births, dim)| Newborn::new(p.0, &births, dim).transpose())
                .collect()
        })?;
        Ok(Self(Mutex::new(newborns)))
    }

    #[pyo3(signature = (stream=0))]
    fn keep(&self, py: Python<'_>, stream: usize) -> PyResult<()> {
        detached(py, || restart::keep(&mut locked(&self.0), cuda::Stream(stream)))
    }

    #[pyo3(signature = (step, *, multiplier=None, lr_warmup=0, linear_until=None, betas=None, adam_lead=0, decay=0.0, stream=0))]
    #[allow(clippy::too_many_arguments)]
    fn correct(
        &self,
        py: Python<'_>,
        step: u64,
        multiplier: Option<f64>,
        lr_warmup: u64,
        linear_until: Option<u64>,
        betas: Option<Bound<'_, PyAny>>,
        adam_lead: u64,
        decay: f64,
        stream: usize,
    ) -> PyResult<()> {
        let betas = extracted(py, betas)?;
        let learning_rate = multiplier.map(|multiplier| LearningRate {
            multiplier,
            warmup: lr_warmup,
            linear_until,
        });
        let step = restart::Step { learning_rate, betas, decay, step, lead: adam_lead };
        detached(py, move || restart::correct(&locked(&self.0), &step, cuda::Stream(stream)))
    }
}

fn extracted(py: Python<'_>, betas: Option<Bound<'_, PyAny>>) -> PyResult<Option<(f64, f64)>> {
    betas.map(|betas| betas.extract().map_err(|error| named(py, "betas", &error))).transpose()
}

/// Corrects the rows of newborn components after an optimizer step, of all parameters given.
///
/// Each entry of `parameters` is (parameter, its value before the step, births, dim).
#[pyfunction]
#[pyo3(signature = (parameters, step, *, multiplier=None, lr_warmup=0, linear_until=None, betas=None, adam_lead=0, decay=0.0, stream=0))]
#[allow(clippy::too_many_arguments)]
fn restart_(
    py: Python<'_>,
    parameters: Vec<Bound<'_, PyTuple>>,
    step: u64,
    multiplier: Option<f64>,
    lr_warmup: u64,
    linear_until: Option<u64>,
    betas: Option<Bound<'_, PyAny>>,
    adam_lead: u64,
    decay: f64,
    stream: usize,
) -> PyResult<()> {
    let mut entries: Vec<(PyTensor, PyTensor, Vec<u64>, i64)> =
        Vec::with_capacity(parameters.len());
    for (index, entry) in parameters.into_iter().enumerate() {
        entries.push(entry.extract().map_err(|error| {
            named(py, &format!("parameters[{index}], (parameter, old, births, dim)"), &error)
        })?);
    }
    let betas = extracted(py, betas)?;
    let learning_rate =
        multiplier.map(|multiplier| LearningRate { multiplier, warmup: lr_warmup, linear_until });
    let step = restart::Step { learning_rate, betas, decay, step, lead: adam_lead };
    detached(py, move || {
        let newborns = entries.into_iter().filter_map(|(parameter, old, births, dim)| {
            Newborn::with_old(parameter.0, &old.0, &births, dim).transpose()
        });
        let newborns = newborns.collect::<Result<Vec<_>, _>>()?;
        restart::correct(&newborns, &step, cuda::Stream(stream))
    })
}

/// Adds everything to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PyPlan>()?;
    module.add_class::<PyNewborns>()?;
    module.add_function(wrap_pyfunction!(restart_, module)?)
}
