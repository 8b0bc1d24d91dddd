//! Checks of tensor arguments that several rooms share: each names the argument, what it is, and what
//! would be right.

use tch::{Kind, Tensor};

use crate::errors::{Error, Result};

/// Fails unless `tensor` has the shape `want`.
pub fn shape(name: &str, tensor: &Tensor, want: &[i64]) -> Result<()> {
    if tensor.size() == want {
        return Ok(());
    }
    Err(Error::Value(format!("{name} has shape {:?}; it must be {want:?}", tensor.size())))
}

/// Fails unless `tensor` has two dimensions; gives them.
pub fn matrix(name: &str, tensor: &Tensor) -> Result<(i64, i64)> {
    match tensor.size()[..] {
        [rows, columns] => Ok((rows, columns)),
        ref other => Err(Error::Value(format!("{name} has shape {other:?}; it must be a matrix"))),
    }
}

/// Fails unless `tensor` holds real floating-point numbers.
pub fn float(name: &str, tensor: &Tensor) -> Result<()> {
    match tensor.kind() {
        Kind::Half | Kind::BFloat16 | Kind::Float | Kind::Double => Ok(()),
        other => Err(Error::Dtype(format!(
            "{name} has dtype {other:?}; it must be float16, bfloat16, float32 or float64"
        ))),
    }
}

/// Fails unless `tensor` has the dtype `want`.
pub fn kind(name: &str, tensor: &Tensor, want: Kind) -> Result<()> {
    if tensor.kind() == want {
        return Ok(());
    }
    Err(Error::Dtype(format!("{name} has dtype {:?}; it must be {want:?}", tensor.kind())))
}

/// Fails unless `tensor` lies where `like` does.
pub fn same_device(name: &str, tensor: &Tensor, like_name: &str, like: &Tensor) -> Result<()> {
    if tensor.device() == like.device() {
        return Ok(());
    }
    Err(Error::Value(format!(
        "{name} is on {:?} but {like_name} on {:?}; move them to one device",
        tensor.device(),
        like.device()
    )))
}

/// Fails unless `values` has `count` entries, one a module.
pub fn one_each<T>(name: &str, values: &[T], count: usize) -> Result<()> {
    if values.len() == count {
        return Ok(());
    }
    Err(Error::Value(format!(
        "{name} has {} entries; it must have {count}, one a module",
        values.len()
    )))
}
