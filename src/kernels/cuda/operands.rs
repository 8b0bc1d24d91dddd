//! Numbers and tensors as kernels want them.

use tch::Tensor;

use crate::checks;
use crate::errors::{Error, Result};

/// An `int` of a kernel.
pub fn int(name: &str, value: i64) -> Result<i32> {
    i32::try_from(value)
        .map_err(|_| Error::Value(format!("{name} is {value}; kernels take up to {}", i32::MAX)))
}

/// Can eight elements be read at once wherever a row's eighth element begins?
pub fn wide(tensor: &Tensor) -> bool {
    (tensor.data_ptr() as usize).is_multiple_of(16)
}

/// The tensor, contiguous and at a multiple of 16 bytes.
pub fn aligned(tensor: &Tensor) -> Result<Tensor> {
    let tensor = tensor.f_contiguous()?;
    if wide(&tensor) {
        return Ok(tensor);
    }
    let mut copy = tensor.f_empty_like()?;
    copy.f_copy_(&tensor)?;
    Ok(copy)
}

/// Fails unless `tensor` has the shape, and the dtype and device of `x`.
pub fn check_factor(name: &str, tensor: &Tensor, x: &Tensor, shape: &[i64]) -> Result<()> {
    checks::kind(name, tensor, x.kind())?;
    checks::same_device(name, tensor, "x", x)?;
    checks::shape(name, tensor, shape)
}
