//! The pruning of PRILoRA (arXiv 2401.11316): a running norm of what goes into each module, and the entries of A
//! that matter least by `|A_ij| v_j`, set to 0. They stay trained, and come back with the next step.

use tch::{Device, Kind, Tensor};

use crate::checks;
use crate::errors::{Error, Result};
use crate::kernels::plain::{Plain, Real};

/// Takes what the backward passes of a step added up into the running norms, in place; `total` becomes 0:
///
/// ```text
/// n_j <- root of (sum over the tokens of x_tj^2 / number of tokens)
/// v_j <- beta v_j + (1 - beta) n_j
/// ```
///
/// `total` holds, a module after the other, what [`crate::gauges::energy`] adds up, `norms` the v of all, both
/// float64; `features` are their sizes. A v whose n is not finite stays as it is, as of a module that no token was
/// counted for.
pub fn average_(norms: &mut Tensor, total: &mut Tensor, features: &[i64], beta: f64) -> Result<()> {
    checks::decay("beta", beta)?;
    check_norms(norms, features)?;
    checks::kind("total", total, Kind::Double)?;
    checks::same_device("total", total, "norms", norms)?;
    let length: i64 = features.iter().map(|features| features + 1).sum();
    checks::shape("total", total, &[length])?;
    if features.is_empty() {
        return Ok(());
    }
    let (mut sums, mut counts, mut first) = (Vec::new(), Vec::new(), 0);
    for &features in features {
        sums.push(total.f_narrow(0, first, features)?);
        counts.push(total.f_narrow(0, first + features, 1)?.f_expand([features], false)?);
        first += features + 1;
    }
    let counts = Tensor::f_cat(&counts, 0)?;
    let fresh = Tensor::f_cat(&sums, 0)?.f_div(&counts)?.f_sqrt()?;
    let moved = norms.f_mul_scalar(beta)?.f_add(&fresh.f_mul_scalar(1.0 - beta)?)?;
    norms.f_copy_(&moved.f_where_self(&fresh.f_isfinite()?, norms)?)?;
    let _ = total.f_zero_()?;
    Ok(())
}

/// What is pruned together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Group {
    /// Each row of A by itself: no component goes as a whole.
    Row,
    /// A whole.
    Matrix,
}

/// Sets, in each group of `n` entries of A, the `floor(share n)` of smallest `|A_ij| v_j` to 0, in place; of
/// equal ones the first.
///
/// `a` (rows, in) of each module in any floating-point dtype; `norms` as [`average_`] keeps them.
pub fn prune_(a: &mut [Tensor], norms: &Tensor, share: f64, group: Group) -> Result<()> {
    checks::probability("share", share)?;
    let mut features = Vec::with_capacity(a.len());
    for (k, a) in a.iter().enumerate() {
        let name = format!("a[{k}]");
        checks::float(&name, a)?;
        features.push(checks::matrix(&name, a)?.1);
    }
    check_norms(norms, &features)?;
    let on_cpu = a.iter().any(|a| Plain::of(a).is_some());
    let on_host: Vec<f64> =
        if on_cpu { Vec::try_from(norms.f_to_device(Device::Cpu)?)? } else { Vec::new() };
    let mut first = 0;
    for (a, features) in a.iter_mut().zip(features) {
        let end = first + features as usize;
        if let Some(plain) = Plain::of(a) {
            prune_slice(plain.elements_mut::<f32>(), &on_host[first..end], share, group);
            prune_slice(plain.elements_mut::<f64>(), &on_host[first..end], share, group);
        } else {
            prune_with_torch(a, &norms.f_narrow(0, first as i64, features)?, share, group)?;
        }
        first = end;
    }
    Ok(())
}

fn check_norms(norms: &Tensor, features: &[i64]) -> Result<()> {
    checks::kind("norms", norms, Kind::Double)?;
    let length = checks::vector("norms", norms)?;
    if features.iter().any(|&features| features < 0) || features.iter().sum::<i64>() != length {
        return Err(Error::Value(format!(
            "norms has {length} numbers, and the modules have {features:?} features; give one a feature"
        )));
    }
    Ok(())
}

/// How many of `count` entries go. A share such as 0.29 is a little less than its digits say.
fn pruned(share: f64, count: usize) -> usize {
    ((share * count as f64 + 1e-9).floor() as usize).min(count)
}

fn prune_slice<T: Real>(a: &mut [T], norms: &[f64], share: f64, group: Group) {
    let features = norms.len();
    if features == 0 || a.is_empty() {
        return;
    }
    let together = if group == Group::Row { features } else { a.len() };
    let count = pruned(share, together);
    if count == 0 {
        return;
    }
    let mut entries: Vec<(f64, usize)> = Vec::with_capacity(together);
    for group in a.chunks_exact_mut(together) {
        entries.clear();
        let scores = group.iter().zip(norms.iter().cycle());
        entries.extend(scores.enumerate().map(|(i, (a, v))| ((a.wide() * v).abs(), i)));
        let _ = entries.select_nth_unstable_by(count - 1, |one, two| {
            one.0.total_cmp(&two.0).then(one.1.cmp(&two.1))
        });
        for &(_, i) in &entries[..count] {
            group[i] = T::default();
        }
    }
}

fn prune_with_torch(a: &mut Tensor, norms: &Tensor, share: f64, group: Group) -> Result<()> {
    let norms = norms.f_to_device(a.device())?;
    let scores = a.f_to_kind(Kind::Double)?.f_mul(&norms)?.f_abs()?;
    let columns = if group == Group::Row { a.size()[1] } else { a.numel() as i64 };
    let count = pruned(share, columns.max(0) as usize) as i64;
    if count == 0 || a.numel() == 0 {
        return Ok(());
    }
    let scores = scores.f_reshape([-1, columns])?;
    let (_, order) = scores.f_sort_stable(true, 1, false)?;
    let keep = scores
        .f_ones_like()?
        .f_scatter_value(1, &order.f_narrow(1, 0, count)?, 0.0)?
        .f_reshape(a.size().as_slice())?;
    let _ = a.f_masked_fill_(&keep.f_eq(0.0)?, 0.0)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(tensor: &Tensor) -> Vec<f64> {
        Vec::try_from(tensor.reshape([-1]).to_kind(Kind::Double)).unwrap()
    }

    #[test]
    fn one_step_of_the_average() {
        let mut norms = Tensor::from_slice(&[4.0, 0.0, 1.0]);
        let mut total = Tensor::from_slice(&[8.0, 18.0, 2.0, 5.0, 0.0]);
        average_(&mut norms, &mut total, &[2, 1], 0.75).unwrap();
        // Roots of 4 and 9; of the second module nothing was counted.
        assert_eq!(numbers(&norms), [3.5, 0.75, 1.0]);
        assert_eq!(numbers(&total), [0.0; 5]);
    }

    #[test]
    fn so_many_go_as_the_digits_of_the_share_say() {
        let counts = [(0.29, 100), (0.5, 7), (0.0, 5), (1.0, 5), (0.1, 9)];
        assert_eq!(counts.map(|(share, n)| pruned(share, n)), [29, 3, 0, 5, 0]);
    }

    #[test]
    fn the_smallest_of_each_group_go_and_of_equal_ones_the_first() {
        let values = [1.0, -2.0, 3.0, 2.0, 0.5, -0.5, 0.5, 9.0];
        let norms = Tensor::from_slice(&[2.0, 1.0, 1.0, 0.0]);
        // Scores 2 2 3 0 and 1 .5 .5 0.
        let of_row = [0.0, -2.0, 3.0, 0.0, 0.5, 0.0, 0.5, 0.0];
        let matrix = [1.0, -2.0, 3.0, 0.0, 0.5, 0.0, 0.0, 0.0];
        for (group, want) in [(Group::Row, of_row), (Group::Matrix, matrix)] {
            for kind in [Kind::Float, Kind::Double, Kind::BFloat16, Kind::Half] {
                let mut a = [Tensor::from_slice(&values).reshape([2, 4]).to_kind(kind)];
                prune_(&mut a, &norms, 0.5, group).unwrap();
                assert_eq!(numbers(&a[0]), want, "{group:?} {kind:?}");
            }
            let strided = Tensor::from_slice(&values).reshape([2, 4]).tr().contiguous();
            prune_(&mut [strided.tr()], &norms, 0.5, group).unwrap();
            assert_eq!(numbers(&strided.tr()), want, "{group:?}");
        }
    }

    #[test]
    fn a_share_of_0_leaves_everything_and_of_1_nothing() {
        let norms = Tensor::from_slice(&[1.0, 1.0]);
        let mut a = [Tensor::from_slice(&[1.0, 2.0]).reshape([1, 2])];
        prune_(&mut a, &norms, 0.0, Group::Row).unwrap();
        assert_eq!(numbers(&a[0]), [1.0, 2.0]);
        prune_(&mut a, &norms, 1.0, Group::Row).unwrap();
        assert_eq!(numbers(&a[0]), [0.0, 0.0]);
    }

    #[test]
    fn what_is_not_a_number_stays() {
        let norms = Tensor::from_slice(&[1.0, 1.0]);
        for kind in [Kind::Double, Kind::BFloat16] {
            let mut a = [Tensor::from_slice(&[f64::NAN, 2.0]).reshape([1, 2]).to_kind(kind)];
            prune_(&mut a, &norms, 0.5, Group::Row).unwrap();
            let found = numbers(&a[0]);
            assert!(found[0].is_nan() && found[1] == 0.0, "{kind:?}");
        }
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let norms = Tensor::from_slice(&[1.0, 1.0]);
        let a = || [Tensor::from_slice(&[1.0, 2.0, 3.0]).reshape([1, 3])];
        let told = |result: Result<()>| result.unwrap_err().to_string();
        assert!(told(prune_(&mut a(), &norms, 0.5, Group::Row)).starts_with("norms has 2 numbers"));
        assert!(told(prune_(&mut a(), &norms, 1.5, Group::Row)).starts_with("share is 1.5"));
        let mut total = Tensor::from_slice(&[1.0, 1.0]);
        let mut held = norms.copy();
        assert!(told(average_(&mut held, &mut total, &[2], 0.9)).starts_with("total has shape [2]"));
        assert!(told(average_(&mut held, &mut total, &[2], 1.0)).starts_with("beta is 1"));
    }
}
