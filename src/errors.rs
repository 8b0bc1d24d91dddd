//! What can go wrong in the core, and how it reaches Python: one exception class a cause, the first
//! line of the message only (libtorch appends its C++ stack), and never a panic.

use std::panic::{catch_unwind, AssertUnwindSafe};

use pyo3::exceptions::{PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use tch::TchError;

/// An error of the core.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An argument has a value that cannot be right; the message names it and the way out.
    #[error("{0}")]
    Value(String),
    /// A tensor has a dtype that the operation does not take.
    #[error("{0}")]
    Dtype(String),
    /// libtorch refused an operation.
    #[error("{}", first_line(&.0.to_string()))]
    Torch(#[from] TchError),
    /// A kernel for CUDA cannot be compiled or launched.
    #[error("CUDA: {0}")]
    Cuda(String),
    /// A defect of this library: a panic that was caught before it reached Python.
    #[error("internal error of increlora_rs, please report it: {0}")]
    Panic(String),
}

/// Result of the core.
pub type Result<T> = std::result::Result<T, Error>;

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

fn first_line(message: &str) -> &str {
    message.lines().next().unwrap_or_default()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn torch_errors_keep_their_first_line_only() {
        let error = Error::from(TchError::Torch("sizes do not match\nframe #0: c10".to_owned()));
        assert_eq!(error.to_string(), "Internal torch error: sizes do not match");
    }

    #[test]
    fn panics_give_their_message() {
        let panic = catch_unwind(|| panic!("rank {}", 3)).unwrap_err();
        assert_eq!(panic_message(panic.as_ref()), "rank 3");
    }
}
