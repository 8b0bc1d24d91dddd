//! One step of the smoothing of the importances, all modules at once.

use tch::{Kind, Tensor};

use super::list::Kernels;
use super::operands::int;
use super::runtime::{Argument, Stream, Target};
use crate::checks;
use crate::errors::Result;

pub(super) const KERNELS: Kernels =
    Kernels { untyped: &["smooth"], ..Kernels::of(include_str!("smooth.cu")) };

// As smooth.cu has it.
const THREADS: u32 = 256;

/// [`crate::policies::smoothing::smooth_`] in one launch. False if not taken.
///
/// All four are contiguous float64 vectors of one length on one device.
#[allow(clippy::too_many_arguments)]
pub fn smooth_(
    importance: &Tensor,
    factor: &Tensor,
    mean: &mut Tensor,
    uncertainty: &mut Tensor,
    beta1: f64,
    beta2: f64,
    stream: Stream,
) -> Result<bool> {
    let Some(target) = Target::of(importance, stream) else { return Ok(false) };
    let length = checks::vector("importance", importance)?;
    let vectors = [
        ("importance", importance),
        ("factor", factor),
        ("mean", &*mean),
        ("uncertainty", &*uncertainty),
    ];
    for (name, vector) in vectors {
        checks::kind(name, vector, Kind::Double)?;
        checks::shape(name, vector, &[length])?;
        checks::same_device(name, vector, "importance", importance)?;
    }
    checks::decay("beta1", beta1)?;
    checks::decay("beta2", beta2)?;
    if length == 0 || vectors.iter().any(|(_, vector)| !vector.is_contiguous()) {
        return Ok(false);
    }
    let arguments = [
        Argument::of(importance),
        Argument::of(factor),
        Argument::of(mean),
        Argument::of(uncertainty),
        Argument::Int(int("modules", length)?),
        Argument::Double(beta1),
        Argument::Double(beta2),
    ];
    // SAFETY: the arguments of smooth.cu; contiguous, of the length given.
    unsafe { target.launch("smooth", (1, 1), THREADS, &arguments)? };
    Ok(true)
}
