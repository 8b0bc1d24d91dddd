//! The rooms as Python functions, a file a room: arguments in, the work without the GIL, tensors or numbers out.
//! An error is one exception class a cause, and a panic never reaches Python.
//! The docstrings of what a user may call are in `python/increlora_rs/_core.pyi`.

use std::panic::{catch_unwind, AssertUnwindSafe};

use pyo3::exceptions::{PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3_tch::PyTensor;
use tch::Tensor;

use crate::errors::{Error, Result};

mod autograd;
mod cuda;
mod gauges;
mod ops;
mod policies;

/// Found in the file of the extension by `__init__`, which must not load an extension that was built
/// for another torch.
#[used]
static BUILT_FOR: &str =
    concat!("increlora_rs built for torch ", env!("INCRELORA_TORCH_VERSION"), ";");

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        match error {
            Error::Value(_) => PyValueError::new_err(message),
            Error::Dtype(_) => PyTypeError::new_err(message),
            Error::Torch(_) | Error::Cuda(_) | Error::Panic(_) => PyRuntimeError::new_err(message),
        }
    }
}

/// Runs `work` without the GIL and without an autograd graph; a panic inside becomes an exception.
pub fn detached<T: Send>(py: Python<'_>, work: impl FnOnce() -> Result<T> + Send) -> PyResult<T> {
    py.allow_threads(|| {
        catch_unwind(AssertUnwindSafe(|| {
            let _no_grad = tch::no_grad_guard();
            work()
        }))
        .unwrap_or_else(|panic| Err(Error::Panic(panic_message(panic.as_ref()))))
    })
    .map_err(PyErr::from)
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    if let Some(text) = panic.downcast_ref::<&str>() {
        (*text).to_owned()
    } else if let Some(text) = panic.downcast_ref::<String>() {
        text.clone()
    } else {
        "panic without a message".to_owned()
    }
}

fn raw(tensors: Vec<PyTensor>) -> Vec<Tensor> {
    tensors.into_iter().map(|tensor| tensor.0).collect()
}

/// The error of an argument's conversion, with the argument's name.
fn named(py: Python<'_>, name: &str, error: &PyErr) -> PyErr {
    PyErr::from_type(error.get_type(py), format!("{name}: {}", error.value(py)))
}

/// Adds everything to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("BUILT_FOR", BUILT_FOR)?;
    module.add("DIRECT", autograd::look_at_torch(module.py())?)?;
    ops::register(module)?;
    gauges::register(module)?;
    policies::register(module)?;
    cuda::register(module)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panics_give_their_message() {
        let panic = catch_unwind(|| panic!("rank {}", 3)).unwrap_err();
        assert_eq!(panic_message(panic.as_ref()), "rank 3");
    }
}
