//! What goes into a module: the sum of squares of each input feature over the tokens of the backward passes.
//!
//! Only tokens count that a gradient reaches, for others take no part in what is learned: padding, above all,
//! through which none comes back. So how far sequences are padded does not matter.

use tch::{Device, Kind, Tensor};

use crate::checks;
use crate::errors::{Error, Result};
use crate::kernels::energy;
use crate::kernels::plain::{as_slice, Plain};
use crate::kernels::simd::{Bf16, Element};

/// Adds the part of one backward pass to `total`, without a host synchronisation on another device.
///
/// `total` (in + 1), float64, holds the sum of `x_tj^2` over the tokens t that count for each feature j, and
/// behind them the number of such tokens; `gy` (tokens, out) and `x` (tokens, in).
pub fn accumulate(total: &mut Tensor, gy: &Tensor, x: &Tensor) -> Result<()> {
    checks::kind("total", total, Kind::Double)?;
    let length = checks::vector("total", total)?;
    for (name, tensor) in [("gy", gy), ("x", x)] {
        checks::float(name, tensor)?;
        checks::same_device(name, tensor, "total", total)?;
    }
    let (tokens, features) = checks::matrix("x", x)?;
    let (_, out) = checks::matrix("gy", gy)?;
    checks::shape("gy", gy, &[tokens, out])?;
    if length != features + 1 {
        return Err(Error::Value(format!(
            "total has {length} numbers; for the {features} columns of x it must have {}",
            features + 1
        )));
    }
    match on_cpu(gy, x)? {
        Some(added) => {
            let _ = total.f_add_(&added)?;
        }
        None => add_with_torch(total, gy, x)?,
    }
    Ok(())
}

/// What is added, by the CPU's loops; None where they do not take the tensors.
fn on_cpu(gy: &Tensor, x: &Tensor) -> Result<Option<Tensor>> {
    if x.device() != Device::Cpu {
        return Ok(None);
    }
    let (gy, x) = (gy.f_contiguous()?, x.f_contiguous()?);
    let Some(tokens) = reached(&gy) else { return Ok(None) };
    let features = x.size()[1] as usize;
    let mut added = vec![0.0; features + 1];
    let sums = &mut added[..features];
    match x.kind() {
        Kind::Float => energy::add_squares(sums, as_slice::<f32>(&x), &tokens),
        Kind::BFloat16 => energy::add_squares(sums, as_slice::<Bf16>(&x), &tokens),
        Kind::Double => energy::add_wide_squares(sums, wide(&x), &tokens),
        _ => return Ok(None),
    }
    added[features] = tokens.len() as f64;
    Ok(Some(Tensor::from_slice(&added)))
}

/// The tokens that count; None where no loop reads gy.
fn reached(gy: &Tensor) -> Option<Vec<usize>> {
    let width = gy.size()[1] as usize;
    match gy.kind() {
        Kind::Float => Some(energy::reached(as_slice::<f32>(gy), width, |value| *value == 0.0)),
        Kind::BFloat16 => {
            Some(energy::reached(as_slice::<Bf16>(gy), width, |value| value.widen() == 0.0))
        }
        Kind::Double => Some(energy::reached(wide(gy), width, |value| *value == 0.0)),
        _ => None,
    }
}

fn wide(tensor: &Tensor) -> &[f64] {
    Plain::of(tensor).map_or(&[], |plain| plain.elements())
}

fn add_with_torch(total: &mut Tensor, gy: &Tensor, x: &Tensor) -> Result<()> {
    let features = x.size()[1];
    let counts = gy.f_ne(0.0)?.f_any_dim(1, false)?.f_to_kind(Kind::Double)?;
    let kind = if x.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    // Not by a product with the counts: 0 times what is not finite is NaN.
    let left_out = counts.f_eq(0.0)?.f_unsqueeze(1)?;
    let squares = x.f_to_kind(kind)?.f_square()?.f_masked_fill(&left_out, 0.0)?;
    let sums = squares.f_sum_dim_intlist([0i64].as_slice(), false, Kind::Double)?;
    let _ = total.f_narrow(0, 0, features)?.f_add_(&sums)?;
    let _ = total.f_narrow(0, features, 1)?.f_add_(&counts.f_sum(Kind::Double)?)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn total(features: i64) -> Tensor {
        Tensor::zeros([features + 1], (Kind::Double, Device::Cpu))
    }

    fn numbers(tensor: &Tensor) -> Vec<f64> {
        Vec::try_from(tensor).unwrap()
    }

    #[test]
    fn tokens_that_no_gradient_reaches_do_not_count() {
        let x = Tensor::from_slice(&[1.0, 2.0, f64::INFINITY, 7.0, -3.0, 0.5]).reshape([3, 2]);
        let gy = Tensor::from_slice(&[0.0, 1.0, 0.0, 0.0, -1e-300, 0.0]).reshape([3, 2]);
        for kind in [Kind::Double, Kind::Float, Kind::BFloat16, Kind::Half] {
            // 1e-300 is 0 in the others.
            let want = if kind == Kind::Double { [10.0, 4.25, 2.0] } else { [1.0, 4.0, 1.0] };
            let mut found = total(2);
            accumulate(&mut found, &gy.to_kind(kind), &x.to_kind(kind)).unwrap();
            assert_eq!(numbers(&found), want, "{kind:?}");
            let mut by_torch = total(2);
            add_with_torch(&mut by_torch, &gy.to_kind(kind), &x.to_kind(kind)).unwrap();
            assert_eq!(numbers(&by_torch), want, "{kind:?}");
        }
    }

    #[test]
    fn passes_add_up_whatever_the_layout() {
        let (x, gy) = (
            Tensor::randn([40, 70], (Kind::Float, Device::Cpu)),
            Tensor::randn([40, 3], (Kind::Float, Device::Cpu)),
        );
        let (mut whole, mut parts) = (total(70), total(70));
        accumulate(&mut whole, &gy, &x).unwrap();
        for (first, n) in [(0, 23), (23, 0), (23, 17)] {
            let part = x.narrow(0, first, n).tr().contiguous().tr();
            accumulate(&mut parts, &gy.narrow(0, first, n), &part).unwrap();
        }
        assert!(f64::try_from((&whole - &parts).abs().max()).unwrap() < 1e-4);
        assert_eq!(parts.double_value(&[70]), 40.0);
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let (x, gy) = (
            Tensor::zeros([3, 2], (Kind::Float, Device::Cpu)),
            Tensor::zeros([2, 5], (Kind::Float, Device::Cpu)),
        );
        let told = |total: &mut Tensor, gy: &Tensor, x: &Tensor| {
            accumulate(total, gy, x).unwrap_err().to_string()
        };
        assert!(told(&mut total(2), &gy, &x).starts_with("gy has shape [2, 5]"));
        assert!(told(&mut total(3), &x, &x).starts_with("total has 4 numbers"));
        assert!(told(&mut total(2).to_kind(Kind::Float), &x, &x).starts_with("total has dtype"));
    }
}
