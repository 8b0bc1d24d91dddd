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

/// Fails unless `tensor` has one dimension; gives its length.
pub fn vector(name: &str, tensor: &Tensor) -> Result<i64> {
    match tensor.size()[..] {
        [length] => Ok(length),
        ref other => Err(Error::Value(format!("{name} has shape {other:?}; it must be a vector"))),
    }
}

/// Fails unless `tensor` holds one floating-point number, in whatever shape.
pub fn one_number(name: &str, tensor: &Tensor) -> Result<()> {
    float(name, tensor)?;
    if tensor.numel() == 1 {
        return Ok(());
    }
    Err(Error::Value(format!("{name} has shape {:?}; it must hold one number", tensor.size())))
}

/// Fails unless `value` is finite.
pub fn finite(name: &str, value: f64) -> Result<()> {
    if value.is_finite() {
        return Ok(());
    }
    Err(Error::Value(format!("{name} is {value}; it must be finite")))
}

/// Fails unless `value` is finite and at least 0.
pub fn not_negative(name: &str, value: f64) -> Result<()> {
    if value.is_finite() && value >= 0.0 {
        return Ok(());
    }
    Err(Error::Value(format!("{name} is {value}; it must be finite and at least 0")))
}

/// Fails unless `beta` is the decay of an average: at least 0 and below 1.
pub fn decay(name: &str, beta: f64) -> Result<()> {
    if (0.0..1.0).contains(&beta) {
        return Ok(());
    }
    Err(Error::Value(format!("{name} is {beta}; it must be at least 0 and below 1")))
}

/// Fails unless `p` is a dropout probability.
pub fn probability(name: &str, p: f64) -> Result<()> {
    if (0.0..=1.0).contains(&p) {
        return Ok(());
    }
    Err(Error::Value(format!("{name} is {p}; a dropout probability lies between 0 and 1")))
}

/// Fails unless `tensor` has two dimensions; gives them.
pub fn matrix(name: &str, tensor: &Tensor) -> Result<(i64, i64)> {
    match tensor.size()[..] {
        [rows, columns] => Ok((rows, columns)),
        ref other => Err(Error::Value(format!("{name} has shape {other:?}; it must be a matrix"))),
    }
}

/// Fails unless `tensor` has three dimensions; gives them.
pub fn stack(name: &str, tensor: &Tensor) -> Result<(i64, i64, i64)> {
    match tensor.size()[..] {
        [count, rows, columns] => Ok((count, rows, columns)),
        ref other => Err(Error::Value(format!(
            "{name} has shape {other:?}; it must be a stack of matrices, of three dimensions"
        ))),
    }
}

/// Fails unless `tensor` holds real floating-point numbers.
pub fn float(name: &str, tensor: &Tensor) -> Result<()> {
    let found = match tensor.f_kind() {
        Ok(Kind::Half | Kind::BFloat16 | Kind::Float | Kind::Double) => return Ok(()),
        Ok(other) => format!("dtype {other:?}"),
        Err(_) => "a dtype unknown here".to_owned(),
    };
    Err(Error::Dtype(format!(
        "{name} has {found}; it must be float16, bfloat16, float32 or float64"
    )))
}

/// Fails unless `tensor` has the dtype `want`.
pub fn kind(name: &str, tensor: &Tensor, want: Kind) -> Result<()> {
    let found = match tensor.f_kind() {
        Ok(found) if found == want => return Ok(()),
        Ok(found) => format!("dtype {found:?}"),
        Err(_) => "a dtype unknown here".to_owned(),
    };
    Err(Error::Dtype(format!("{name} has {found}; it must be {want:?}")))
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
