//! What can go wrong in the core, a variant a cause. Of a message of libtorch the first line only: it appends its
//! C++ stack.

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

fn first_line(message: &str) -> &str {
    message.lines().next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn torch_errors_keep_their_first_line_only() {
        let error = Error::from(TchError::Torch("sizes do not match\nframe #0: c10".to_owned()));
        assert_eq!(error.to_string(), "Internal torch error: sizes do not match");
    }
}
