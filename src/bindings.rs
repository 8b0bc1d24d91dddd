//! The rooms as Python functions: arguments in, the work without the GIL, tensors or numbers out.
//! The docstrings of what a user may call are in `python/increlora_rs/_core.pyi`.

use numpy::PyReadonlyArray1;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3_tch::PyTensor;
use tch::Tensor;

use crate::adapter::{self, Adapter, Dropout};
use crate::allocation::{self, Schedule, Wish};
use crate::errors::{detached, Error};
use crate::importance::{self, Input};
use crate::kernels::cuda;
use crate::kernels::dropout::{self, Stream};
use crate::orthogonality;

mod sketch;
mod step;

/// Found in the file of the extension by `__init__`, which must not load an extension that was built
/// for another torch.
#[used]
static BUILT_FOR: &str =
    concat!("increlora_rs built for torch ", env!("INCRELORA_TORCH_VERSION"), ";");

type Gradients = (Option<PyTensor>, PyTensor, PyTensor, PyTensor);

fn raw(tensors: Vec<PyTensor>) -> Vec<Tensor> {
    tensors.into_iter().map(|tensor| tensor.0).collect()
}

fn probability(p: f64) -> Result<(), Error> {
    if (0.0..=1.0).contains(&p) {
        return Ok(());
    }
    Err(Error::Value(format!("p is {p}; a dropout probability lies between 0 and 1")))
}

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
    let adapter = Adapter { a: a.0, b: b.0, e: e.0, scale, queue };
    let (mut y, x) = (y.0, x.0);
    detached(py, move || {
        probability(p)?;
        let mut dropout = (p > 0.0).then(|| Dropout::new(&x, p, seed, None, queue));
        let t = adapter::forward(&adapter, &x, &mut y, dropout.as_mut())?;
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
    let adapter = Adapter { a: a.0, b: b.0, e: e.0, scale, queue };
    let (x, weight, bias) = (x.0, weight.0, bias.map(|bias| bias.0));
    detached(py, move || {
        probability(p)?;
        let mut shape = x.size();
        let features = shape.pop().unwrap_or_default();
        shape.push(adapter.b.size().first().copied().unwrap_or_default());
        let y = Tensor::f_empty(&shape, (x.f_kind()?, x.device()))?;
        // Views of what is returned: autograd forbids to change a view made inside a function.
        let flat = x.f_reshape([-1, features.max(1)])?;
        let mut flat_y = y.f_view([flat.size()[0], shape[shape.len() - 1]])?;
        let mut dropout = (p > 0.0).then(|| Dropout::new(&flat, p, seed, None, queue));
        let bias = bias.as_ref();
        let t = adapter::linear(&adapter, &flat, &weight, bias, &mut flat_y, dropout.as_mut())?;
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
    let adapter = Adapter { a: a.0, b: b.0, e: e.0, scale, queue };
    let (gy, x, t) = (gy.0, x.0, t.0);
    let (mask, weight) = (mask.map(|mask| mask.0), weight.map(|weight| weight.0));
    let mut vector = importance.map(|vector| vector.0);
    detached(py, move || {
        probability(p)?;
        let dropout = (p > 0.0).then(|| Dropout::new(&x, p, seed, mask, queue));
        let target = vector.as_mut().map(|vector| (vector, slot));
        let (dropout, weight) = (dropout.as_ref(), weight.as_ref());
        let gradients = adapter::backward(&adapter, &x, &t, &gy, dropout, weight, needs_x, target)?;
        let adapter::Gradients { x, a, b, e } = gradients;
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
    detached(py, || {
        probability(p)?;
        dropout::draw(elements, &Stream::new(p, seed, offset)).map(PyTensor)
    })
}

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
    let adapter = Adapter { a: a.0, b: b.0, e: e.0, scale, queue };
    let (gy, x) = (gy.0, x.0);
    detached(py, move || {
        adapter.check(&x)?;
        crate::checks::float("gy", &gy)?;
        crate::checks::same_device("gy", &gy, "x", &x)?;
        crate::checks::shape("gy", &gy, &[x.size()[0], adapter.b.size()[0]])?;
        let mut vector = Tensor::f_zeros([1], (tch::Kind::Double, x.device()))?;
        let gy = gy.f_to_kind(x.kind())?;
        let p = adapter.scaled_b()?;
        let target = (&mut vector, 0);
        importance::accumulate(target, &p, &adapter.a, &gy, Input::Whole(&x), 1.0, queue)?;
        Ok(PyTensor(vector.f_squeeze()?))
    })
}

/// One step of the smoothing, in place.
#[pyfunction]
#[pyo3(signature = (importance, factor, mean, uncertainty, beta1, beta2, stream=0))]
#[allow(clippy::too_many_arguments)]
fn smooth_(
    py: Python<'_>,
    importance: PyTensor,
    factor: PyTensor,
    mean: PyTensor,
    uncertainty: PyTensor,
    beta1: f64,
    beta2: f64,
    stream: usize,
) -> PyResult<()> {
    let queue = cuda::Stream(stream);
    let (importance, factor, mut mean, mut uncertainty) =
        (importance.0, factor.0, mean.0, uncertainty.0);
    detached(py, move || {
        importance::smooth_(&importance, &factor, &mut mean, &mut uncertainty, beta1, beta2, queue)
    })
}

/// Value of the orthogonality regulariser.
#[pyfunction(name = "orthogonality")]
fn orthogonality_value(py: Python<'_>, a: Vec<PyTensor>, b: Vec<PyTensor>) -> PyResult<PyTensor> {
    let (a, b) = (raw(a), raw(b));
    detached(py, move || orthogonality::value(&a, &b).map(PyTensor))
}

/// Adds the gradient of the regulariser, times `factor`, in place; gives its value.
#[pyfunction]
fn add_orthogonality_gradient_(
    py: Python<'_>,
    a: Vec<PyTensor>,
    b: Vec<PyTensor>,
    grad_a: Vec<PyTensor>,
    grad_b: Vec<PyTensor>,
    factor: PyTensor,
) -> PyResult<PyTensor> {
    let (a, b, mut grad_a, mut grad_b) = (raw(a), raw(b), raw(grad_a), raw(grad_b));
    let factor = factor.0;
    detached(py, move || {
        let value = orthogonality::add_gradient_(&a, &b, &mut grad_a, &mut grad_b, &factor)?;
        Ok(PyTensor(value))
    })
}

/// When and how much the ranks grow.
#[pyclass(name = "Schedule", module = "increlora_rs._core", frozen, eq)]
#[derive(PartialEq)]
struct PySchedule {
    plan: allocation::Plan,
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
            allocation::plan(&wish, total_steps, &ranks, &caps, &each, budget)
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
            let grown = allocation::choose(schedule, &scores, &ranks, &caps, &costs, budget)?;
            Ok(grown.into_iter().map(|growth| (growth.module, growth.components)).collect())
        })
    }

    fn __repr__(&self) -> String {
        let Schedule { warmup, interval, top_h, add_r } = self.plan.schedule;
        format!("Schedule(tinit={warmup}, deltaT={interval}, top_h={top_h}, add_r={add_r})")
    }
}

/// The error of an argument's conversion, with the argument's name.
fn named(py: Python<'_>, name: &str, error: &PyErr) -> PyErr {
    PyErr::from_type(error.get_type(py), format!("{name}: {}", error.value(py)))
}

fn vector<T: numpy::Element + Copy>(
    name: &str,
    array: &PyReadonlyArray1<'_, T>,
) -> PyResult<Vec<T>> {
    let slice = array
        .as_slice()
        .map_err(|error| PyTypeError::new_err(format!("{name} is not contiguous: {error}")))?;
    Ok(slice.to_vec())
}

/// Steps of the importance window.
#[pyfunction]
fn importance_window(beta1: f64, beta2: f64) -> PyResult<u64> {
    crate::checks::decay("beta1", beta1)?;
    crate::checks::decay("beta2", beta2)?;
    Ok(allocation::window(beta1, beta2))
}

/// Adds everything to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("RESERVE_E", adapter::RESERVE_E)?;
    module.add("BUILT_FOR", BUILT_FOR)?;
    module.add_class::<PySchedule>()?;
    module.add_function(wrap_pyfunction!(adapter_forward, module)?)?;
    module.add_function(wrap_pyfunction!(adapter_backward, module)?)?;
    module.add_function(wrap_pyfunction!(linear_forward, module)?)?;
    module.add_function(wrap_pyfunction!(dropout_mask, module)?)?;
    module.add_function(wrap_pyfunction!(module_importance, module)?)?;
    module.add_function(wrap_pyfunction!(smooth_, module)?)?;
    module.add_function(wrap_pyfunction!(orthogonality_value, module)?)?;
    module.add_function(wrap_pyfunction!(add_orthogonality_gradient_, module)?)?;
    module.add_function(wrap_pyfunction!(importance_window, module)?)?;
    sketch::register(module)?;
    step::register(module)?;
    crate::kernels::cuda::bindings::register(module)
}
