//! A linear layer with its low-rank update as one call that autograd's graph knows: no Python in its backward pass
//! but what a probe asks for.

use pyo3::prelude::*;
use pyo3_tch::PyTensor;
use tch::{Kind, Tensor};

use crate::bindings::autograd::{self, Backward, Borrowed};
use crate::bindings::detached;
use crate::errors::Result;
use crate::kernels::cuda;
use crate::ops::base::Base;
use crate::ops::dropout::Dropout;
use crate::ops::low_rank::{self, LowRank};

/// The CPU has no queue.
const NO_QUEUE: cuda::Stream = cuda::Stream(0);

/// `x W^T + bias + scale * B (E * (A drop(x)))`, (..., out), for what [`autograd::plain`] lets through, of shapes
/// and dtypes that fit, of a frozen base layer, and without a reserve unless it is to count; None for everything else,
/// with nothing done.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn direct_linear<'py>(
    x: &Bound<'py, PyAny>,
    weight: &Bound<'py, PyAny>,
    bias: &Bound<'py, PyAny>,
    a: &Bound<'py, PyAny>,
    b: &Bound<'py, PyAny>,
    e: &Bound<'py, PyAny>,
    with_reserve: bool,
    scale: f64,
    p: f64,
    probe: &Bound<'py, PyAny>,
    slot: i64,
) -> PyResult<Option<PyTensor>> {
    let py = x.py();
    let Some(tensors) = autograd::plain([x, weight, bias, a, b, e]) else { return Ok(None) };
    let [Some(x), Some(weight), bias, Some(a), Some(b), Some(e)] = tensors else {
        return Ok(None);
    };
    let frozen = !weight.learns() && bias.as_ref().is_none_or(|bias| !bias.learns());
    let whole = with_reserve || a.size().first() == e.size().first();
    if !frozen || !whole || !fits(&x, &weight, bias.as_deref(), [&a, &b, &e]) {
        return Ok(None);
    }
    let (mut y, t, seed) = detached(py, || {
        autograd::below_autograd(|| {
            let seed = if p > 0.0 { new_seed()? } else { 0 };
            let mut dropout = Dropout::of(&x, p, seed, None, NO_QUEUE)?;
            let low_rank = of(&a, &b, &e, scale);
            let base = Base { weight: &weight, bias: bias.as_deref() };
            let (y, t) = low_rank::linear_of_fitting(&low_rank, &x, &base, dropout.as_mut())?;
            Ok((y, t, seed))
        })
    })?;
    let inputs = [&x, &a, &b, &e];
    if autograd::records(&inputs) {
        let probe = (!probe.is_none()).then(|| probe.clone().unbind());
        let saved = [&*x, &t, &a, &b, &e, &weight].map(Some);
        let backward = LinearBackward { scale, p, seed, probe, slot };
        autograd::record(py, &mut y, &inputs.map(|input| &**input), &saved, backward)?;
    }
    Ok(Some(PyTensor(y)))
}

fn of(a: &Tensor, b: &Tensor, e: &Tensor, scale: f64) -> LowRank {
    let [a, b, e] = [a, b, e].map(Tensor::shallow_clone);
    LowRank { a, b, e, scale, queue: NO_QUEUE }
}

/// Seed of a dropout mask, from torch's generator, so that `manual_seed` and a checkpoint's replay hold.
fn new_seed() -> Result<u64> {
    let drawn = Tensor::f_randint(i64::MAX, [0i64; 0], (Kind::Int64, tch::Device::Cpu))?;
    Ok(drawn.f_int64_value(&[])? as u64)
}

fn fits(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, factors: [&Tensor; 3]) -> bool {
    let [a, b, e] = factors;
    let (&[out, features], &[rows, wide], &[tall, ranks], &[active, 1]) =
        (&weight.size()[..], &a.size()[..], &b.size()[..], &e.size()[..])
    else {
        return false;
    };
    x.size().last() == Some(&features)
        && (wide, tall, ranks) == (features, out, rows)
        && rows > 0
        && active <= rows
        && x.kind() == weight.kind()
        && (a.kind() == b.kind() && a.kind() == e.kind())
        && bias.is_none_or(|bias| bias.size() == [out] && bias.kind() == x.kind())
}

struct LinearBackward {
    scale: f64,
    p: f64,
    seed: u64,
    probe: Option<Py<PyAny>>,
    slot: i64,
}

impl Backward for LinearBackward {
    const INPUTS: usize = 4;

    fn backward(
        &self,
        gy: &Tensor,
        saved: &[Option<Borrowed<'_>>],
        needed: &[bool],
    ) -> PyResult<Vec<Option<Tensor>>> {
        let [Some(x), Some(t), Some(a), Some(b), Some(e), Some(weight), ..] = saved else {
            return Ok(Vec::new());
        };
        let flat = |tensor: &Tensor| -> Result<Tensor> {
            match tensor.size()[..] {
                [_, _] => Ok(tensor.shallow_clone()),
                ref size => Ok(tensor.f_reshape([-1, size.last().copied().unwrap_or(1)])?),
            }
        };
        let (flat_x, gy) = (flat(x)?, flat(gy)?);
        let mut total = self.observed(&flat_x, &gy)?;
        let found = autograd::below_autograd(|| -> Result<_> {
            let dropout = Dropout::of(&flat_x, self.p, self.seed, None, NO_QUEUE)?;
            let (low_rank, dropout) = (of(a, b, e, self.scale), dropout.as_ref());
            let target = total.as_mut().map(|total| (total, self.slot));
            let found = low_rank::backward_of_fitting(
                &low_rank,
                &flat_x,
                t,
                &gy,
                dropout,
                Some(weight),
                needed[0],
                target,
            )?;
            let x = match found.x {
                Some(flat) if x.dim() != 2 => Some(flat.f_view(x.size().as_slice())?),
                other => other,
            };
            Ok([x, Some(found.a), Some(found.b), Some(found.e)])
        })?;
        Ok(found.into())
    }
}

impl LinearBackward {
    /// Has the probe count the pass, and its gauge add it, where it is armed; gives where the importance goes, if
    /// that is what the gauge is for. x and gy are flat.
    fn observed(&self, x: &Tensor, gy: &Tensor) -> PyResult<Option<Tensor>> {
        let Some(probe) = &self.probe else { return Ok(None) };
        Python::with_gil(|py| {
            let probe = probe.bind(py);
            // The others are not counted.
            if self.slot == 0 {
                probe.call_method1("count_backward", (self.slot,))?;
            }
            if !probe.getattr("armed")?.is_truthy()? {
                return Ok(None);
            }
            let gauge = probe.getattr("gauge")?;
            if gauge.getattr("fused")?.is_truthy()? {
                return Ok(Some(gauge.getattr("total")?.extract::<PyTensor>()?.0));
            }
            // Before dropout: the gradient of the weight itself, and without the mask's noise.
            let [gy, x] = [gy, x].map(|tensor| PyTensor(tensor.shallow_clone()));
            gauge.call_method1("add", (self.slot, gy, x))?;
            Ok(None)
        })
    }
}

/// Adds everything to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(direct_linear, module)?)
}
