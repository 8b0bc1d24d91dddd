//! How much a module matters: `I = sum |dW * G|` taken block by block, and its smoothing over the
//! optimizer steps, all modules at once (arXiv 2308.12043, eq. 6 to 9).

use tch::{Kind, Tensor};

use crate::checks;
use crate::errors::{Error, Result};

/// Bytes that the blocks of dW and of G may take together.
const SCRATCH: i64 = 8 << 20;
/// Rows of one block, at most: enough for the matrix product to run at full speed.
const BLOCK_ROWS: i64 = 512;

/// Adds `gain * sum_ij |(P A)_ij (gy^T x)_ij|` to `vector[slot]`, without a host synchronisation.
///
/// `p` (out, rows) and `a` (rows, in) make dW = P A; `gy` (tokens, out) and `x` (tokens, in), of one
/// dtype, make the gradient of dW. Neither matrix exists as a whole: both are built in blocks of rows.
pub fn accumulate(
    vector: &mut Tensor,
    slot: i64,
    p: &Tensor,
    a: &Tensor,
    gy: &Tensor,
    x: &Tensor,
    gain: f64,
) -> Result<()> {
    checks::kind("importance", vector, Kind::Double)?;
    checks::same_device("importance", vector, "x", x)?;
    let length = checks::vector("importance", vector)?;
    if slot < 0 || slot >= length {
        return Err(Error::Value(format!(
            "slot is {slot}; the importance vector has the slots 0 to {}",
            length - 1
        )));
    }
    let (out, _) = checks::matrix("P", p)?;
    let features = x.size()[1];
    // bfloat16 products and sums would lose the small entries; float32 is what dW is built in.
    let wide = if p.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let bytes_a_row = 2 * features.max(1) * wide.elt_size_in_bytes() as i64;
    let rows = (SCRATCH / bytes_a_row).clamp(1, BLOCK_ROWS);
    let (p, a) = (p.f_to_kind(wide)?, a.f_to_kind(wide)?);
    let mut target = vector.f_narrow(0, slot, 1)?;
    let mut first = 0;
    while first < out {
        let n = rows.min(out - first);
        let g = gy.f_narrow(1, first, n)?.f_tr()?.f_mm(x)?.f_to_kind(wide)?;
        let mut product = p.f_narrow(0, first, n)?.f_mm(&a)?;
        let _ = product.f_mul_(&g)?.f_abs_()?;
        let _ = target.f_add_(&product.f_sum(Kind::Double)?.f_mul_scalar(gain)?)?;
        first += n;
    }
    Ok(())
}

/// Smooths the importances of one optimizer step into `mean` and `uncertainty`, in place:
///
/// ```text
/// mean        <- beta1 mean + (1 - beta1) I
/// uncertainty <- beta2 uncertainty + (1 - beta2) |I - mean|      (the new mean)
/// ```
///
/// with `I = importance * factor`. All three are float64 vectors, one slot a module. A step in which
/// any importance is not finite changes nothing.
pub fn smooth_(
    importance: &Tensor,
    factor: &Tensor,
    mean: &mut Tensor,
    uncertainty: &mut Tensor,
    beta1: f64,
    beta2: f64,
) -> Result<()> {
    check(importance, factor, mean, uncertainty, beta1, beta2)?;
    let importance = importance.f_mul(factor)?;
    let finite = importance.f_isfinite()?.f_all()?;
    let new_mean = mean.f_mul_scalar(beta1)?.f_add(&importance.f_mul_scalar(1.0 - beta1)?)?;
    let deviation = importance.f_sub(&new_mean)?.f_abs()?.f_mul_scalar(1.0 - beta2)?;
    let new_uncertainty = uncertainty.f_mul_scalar(beta2)?.f_add(&deviation)?;
    mean.f_copy_(&new_mean.f_where_self(&finite, mean)?)?;
    uncertainty.f_copy_(&new_uncertainty.f_where_self(&finite, uncertainty)?)?;
    Ok(())
}

/// Fails unless the arguments of [`smooth_`] fit together.
pub fn check(
    importance: &Tensor,
    factor: &Tensor,
    mean: &Tensor,
    uncertainty: &Tensor,
    beta1: f64,
    beta2: f64,
) -> Result<()> {
    let size = [checks::vector("importance", importance)?];
    let vectors = [
        ("importance", importance),
        ("factor", factor),
        ("mean", mean),
        ("uncertainty", uncertainty),
    ];
    for (name, vector) in vectors {
        checks::kind(name, vector, Kind::Double)?;
        checks::shape(name, vector, &size)?;
        checks::same_device(name, vector, "importance", importance)?;
    }
    checks::decay("beta1", beta1)?;
    checks::decay("beta2", beta2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    fn random(rows: i64, columns: i64) -> Tensor {
        Tensor::randn([rows, columns], (Kind::Double, Device::Cpu))
    }

    #[test]
    fn blocks_give_the_sum_of_the_whole() {
        let (p, a, gy, x) = (random(1100, 2), random(2, 700), random(3, 1100), random(3, 700));
        let mut vector = Tensor::zeros([1], (Kind::Double, Device::Cpu));
        accumulate(&mut vector, 0, &p, &a, &gy, &x, 2.0).unwrap();
        let whole = 2.0 * (p.mm(&a) * gy.tr().mm(&x)).abs().sum(Kind::Double).double_value(&[]);
        assert!((vector.double_value(&[0]) / whole - 1.0).abs() < 1e-12);
    }

    #[test]
    fn a_slot_past_the_vector_is_refused() {
        let (p, a, gy, x) = (random(4, 1), random(1, 4), random(2, 4), random(2, 4));
        let mut vector = Tensor::zeros([2], (Kind::Double, Device::Cpu));
        let refused = accumulate(&mut vector, 2, &p, &a, &gy, &x, 1.0).unwrap_err().to_string();
        assert_eq!(refused, "slot is 2; the importance vector has the slots 0 to 1");
    }

    #[test]
    fn one_step_of_the_smoothing() {
        let (importance, factor) = (Tensor::from_slice(&[8.0]), Tensor::from_slice(&[0.5]));
        let (mut mean, mut uncertainty) = (Tensor::from_slice(&[2.0]), Tensor::from_slice(&[1.0]));
        smooth_(&importance, &factor, &mut mean, &mut uncertainty, 0.5, 0.75).unwrap();
        // 0.5 * 2 + 0.5 * 4, then 0.75 * 1 + 0.25 * |4 - 3|.
        assert_eq!((mean, uncertainty), (Tensor::from_slice(&[3.0]), Tensor::from_slice(&[1.0])));
    }
}
