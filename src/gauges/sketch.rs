//! A linear sketch of a module's gradient `G = gy^T x` (out, in), summed over backward passes: `G Omega`
//! and `Psi G` with fixed random Omega and Psi, each by two thin products, so that G never exists; and
//! the leading part of G read back from the two (single-pass reconstruction).
//!
//! All four matrices are held with the long side in rows of memory: `omega` is (k, in), `psi` (l, out),
//! `left` is `(G Omega)^T` (k, out) and `right` is `Psi G` (l, in).

use tch::{Device, Kind, Tensor};

use crate::checks;
use crate::errors::{Error, Result};
use crate::kernels::plain::{self, Plain};
use crate::kernels::take;

/// Bytes that the copies of a block of tokens may take, where their dtype is not the sketch's: on the CPU
/// about what its caches hold, elsewhere enough for few blocks, since each takes launches.
const SCRATCH: i64 = 8 << 20;
const SCRATCH_OF_DEVICE: i64 = 256 << 20;
/// Tokens of such a block, at least.
const LEAST_TOKENS: i64 = 16;
/// Directions of a factor shorter than this share of its longest count as none.
pub(super) const NEGLIGIBLE: f64 = 1e-5;
/// Singular values below this share of the sketched matrix's norm are what rounding left.
const ROUNDING: f64 = 1e-6;
/// Entries of a vector nearer to its largest than this share of it count as large as that.
const NEAR: f64 = 1e-5;

/// Adds the part of the tokens of one backward pass to a sketch, without a host synchronisation.
///
/// `gy` (tokens, out) and `x` (tokens, in) may have another dtype than the sketch: they are copied to it
/// block by block. What the sketch holds before has no part in the products, nor has where it lies in
/// memory or how gy and x are strided: a BLAS rounds otherwise where it adds to a full matrix.
///
/// `taken`: sums, of left and right, that take in what the sketch holds of a step before, and in whose place comes what
/// is added. Gives whether what the sketch holds is finite, which would make a GPU be waited for and is not looked at
/// there.
pub fn accumulate(
    left: &mut Tensor,
    right: &mut Tensor,
    omega: &Tensor,
    psi: &Tensor,
    gy: &Tensor,
    x: &Tensor,
    taken: Option<[&mut Tensor; 2]>,
) -> Result<bool> {
    let kind = check(left, right, omega, psi)?;
    for (name, tensor) in [("gy", gy), ("x", x)] {
        checks::float(name, tensor)?;
        checks::same_device(name, tensor, "left", left)?;
    }
    let (tokens, features) = checks::matrix("x", x)?;
    let out = psi.size()[1];
    checks::shape("x", x, &[tokens, omega.size()[1]])?;
    checks::shape("gy", gy, &[tokens, out])?;
    let copied = gy.kind() != kind || x.kind() != kind;
    let bytes = (features + out).max(1) * kind.elt_size_in_bytes() as i64;
    let scratch = if x.device() == Device::Cpu { SCRATCH } else { SCRATCH_OF_DEVICE };
    let most = if copied { (scratch / bytes).max(LEAST_TOKENS) } else { tokens.max(1) };
    let mut added: Option<(Tensor, Tensor)> = None;
    let mut first = 0;
    while first < tokens {
        let n = most.min(tokens - first);
        let gy = gy.f_narrow(0, first, n)?.f_to_kind(kind)?.f_contiguous()?;
        let x = x.f_narrow(0, first, n)?.f_to_kind(kind)?.f_contiguous()?;
        let seen = x.f_mm(&omega.f_tr()?)?;
        let sent = gy.f_mm(&psi.f_tr()?)?;
        match &mut added {
            Some((to_left, to_right)) => {
                let _ = to_left.f_addmm_(&seen.f_tr()?, &gy)?;
                let _ = to_right.f_addmm_(&sent.f_tr()?, &x)?;
            }
            None => added = Some((seen.f_tr()?.f_mm(&gy)?, sent.f_tr()?.f_mm(&x)?)),
        }
        first += n;
    }
    let added = match added {
        Some((to_left, to_right)) => [Some(to_left), Some(to_right)],
        None => [None, None],
    };
    let mut sums = taken.into_iter().flatten();
    for (held, added) in [&mut *left, &mut *right].into_iter().zip(added) {
        let was_taken = match sums.next() {
            Some(sum) => {
                checks::kind("the sum", sum, kind)?;
                let _ = sum.f_add_(held)?;
                true
            }
            None => false,
        };
        match added {
            Some(added) if was_taken => held.f_copy_(&added)?,
            Some(added) => drop(held.f_add_(&added)?),
            None if was_taken => drop(held.f_zero_()?),
            None => {}
        }
    }
    Ok(left.device() != Device::Cpu || (is_finite(left)? && is_finite(right)?))
}

fn is_finite(matrix: &Tensor) -> Result<bool> {
    match Plain::of(matrix) {
        Some(plain) if plain.kind == Kind::Float => Ok(take::is_finite::<f32>(&plain)),
        Some(plain) => Ok(take::is_finite::<f64>(&plain)),
        None => Ok(bool::try_from(matrix.f_isfinite()?.f_all()?)?),
    }
}

/// Fails unless the four matrices fit together; gives their dtype.
fn check(left: &Tensor, right: &Tensor, omega: &Tensor, psi: &Tensor) -> Result<Kind> {
    checks::float("left", left)?;
    let kind = left.kind();
    let all = [("left", left), ("right", right), ("omega", omega), ("psi", psi)];
    for (name, tensor) in all {
        checks::matrix(name, tensor)?;
        checks::kind(name, tensor, kind)?;
        checks::same_device(name, tensor, "left", left)?;
    }
    let (columns, features) = omega.size2()?;
    let (rows, out) = psi.size2()?;
    checks::shape("left", left, &[columns, out])?;
    checks::shape("right", right, &[rows, features])?;
    Ok(kind)
}

/// Takes the sketches of one optimizer step into their sum, without a host synchronisation.
///
/// `sum += step / scale` and `steps += 1`, unless a number of `step` is not finite or `overflow` is above
/// 0; `step` becomes 0. `step` and `sum` hold the sketches of all modules in one vector; `steps` holds one
/// float64 number.
pub fn take_step_(
    step: &mut Tensor,
    sum: &mut Tensor,
    steps: &mut Tensor,
    scale: Option<&Tensor>,
    overflow: Option<&Tensor>,
) -> Result<()> {
    checks::float("step", step)?;
    let length = checks::vector("step", step)?;
    checks::kind("sum", sum, step.kind())?;
    checks::shape("sum", sum, &[length])?;
    checks::kind("steps", steps, Kind::Double)?;
    checks::one_number("steps", steps)?;
    for (name, tensor) in [("sum", &*sum), ("steps", &*steps)] {
        checks::same_device(name, tensor, "step", step)?;
    }
    let device = step.device();
    let number = |name: &str, tensor: &Tensor| -> Result<Tensor> {
        checks::one_number(name, tensor)?;
        Ok(tensor.f_reshape([0_i64; 0])?.f_to_kind(Kind::Double)?.f_to_device(device)?)
    };
    if overflow.is_none() && scale.is_none() && take_plain(step, sum, steps)? {
        return Ok(());
    }
    // NaN and infinities show in the largest absolute value.
    let mut good = match length {
        0 => Tensor::f_ones([0_i64; 0], (Kind::Bool, device))?,
        _ => step.f_norm_scalaropt_dim(f64::INFINITY, [0i64].as_slice(), false)?.f_isfinite()?,
    };
    if let Some(scale) = scale {
        let _ = step.f_div_(&number("scale", scale)?.f_to_kind(step.kind())?)?;
    }
    if let Some(overflow) = overflow {
        good = good.f_logical_and(&number("found_inf", overflow)?.f_le(0.0)?)?;
    }
    let _ = step.f_masked_fill_(&good.f_logical_not()?, 0.0)?;
    let _ = sum.f_add_(step)?;
    let _ = steps.f_add_(&good.f_to_kind(Kind::Double)?.f_reshape(steps.size().as_slice())?)?;
    let _ = step.f_zero_()?;
    Ok(())
}

/// [`take_step_`] in two passes over memory, where nothing scales it; false, with nothing done, where its vectors
/// are no plain ones.
fn take_plain(step: &mut Tensor, sum: &Tensor, steps: &mut Tensor) -> Result<bool> {
    let rows = [&*step, sum].map(|vector| vector.f_view([1, -1]));
    let [Ok(step_row), Ok(sum_row)] = &rows else { return Ok(false) };
    let (Some(from), Some(to)) = (Plain::of(step_row), Plain::of(sum_row)) else {
        return Ok(false);
    };
    if from.columns == 0 || !plain::disjoint(std::iter::empty(), [from, to].into_iter()) {
        return Ok(false);
    }
    let narrow = from.kind == Kind::Float;
    let finite = if narrow { take::is_finite::<f32>(&from) } else { take::is_finite::<f64>(&from) };
    match (finite, narrow) {
        (true, true) => take::take::<f32>(&from, &to),
        (true, false) => take::take::<f64>(&from, &to),
        (false, _) => drop(step.f_zero_()?),
    }
    if finite {
        let _ = steps.f_add_scalar_(1.0)?;
    }
    Ok(true)
}

/// The leading singular triples of a sketched matrix.
#[derive(Debug)]
pub struct Triples {
    /// Singular values, descending, (n).
    pub sigma: Tensor,
    /// Left vectors as columns, (out, n).
    pub u: Tensor,
    /// Right vectors as rows, (n, in).
    pub v: Tensor,
}

/// The `count` leading singular triples of the sketched G outside the span of `b` (out, rows) and of `a`
/// (rows, in): of `(1 - P_B) G (1 - P_A)` with the projections on B's columns and on A's rows.
///
/// Float64 on the CPU; 0 for those past the sketch's rank, NaN where a number that goes in is not finite.
/// Exact for a G whose rank is at most that of the sketch, k. Of a pair of vectors and its negative, the one
/// is given in which the first of the largest entries of `v` is positive: left to itself, an SVD signs them
/// by its rounding. Where singular values are equal their vectors are any that span the same.
pub fn triples(
    left: &Tensor,
    right: &Tensor,
    psi: &Tensor,
    a: &Tensor,
    b: &Tensor,
    count: i64,
) -> Result<Triples> {
    let all = [("left", left), ("right", right), ("psi", psi), ("a", a), ("b", b)];
    for (name, tensor) in all {
        checks::float(name, tensor)?;
        checks::matrix(name, tensor)?;
    }
    let (columns, out) = left.size2()?;
    let (rows, features) = right.size2()?;
    checks::shape("psi", psi, &[rows, out])?;
    checks::shape("a", a, &[a.size()[0], features])?;
    checks::shape("b", b, &[out, b.size()[1]])?;
    if rows < columns {
        return Err(Error::Value(format!(
            "right has {rows} rows and left {columns}; give right as many as left or more"
        )));
    }
    if count < 0 {
        return Err(Error::Value(format!("count is {count}; give 0 or more")));
    }
    let [left, right, psi, a, b] = [left, right, psi, a, b].map(wide);
    let (left, right, psi, a, b) = (left?, right?, psi?, a?, b?);
    let options = (Kind::Double, Device::Cpu);
    let mut found = Triples {
        sigma: Tensor::f_zeros([count], options)?,
        u: Tensor::f_zeros([out, count], options)?,
        v: Tensor::f_zeros([count, features], options)?,
    };
    for tensor in [&left, &right, &a, &b] {
        if !bool::try_from(tensor.f_isfinite()?.f_all()?)? {
            let _ = found.sigma.f_fill_(f64::NAN)?;
            return Ok(found);
        }
    }
    if left.numel() == 0 || right.numel() == 0 {
        return Ok(found);
    }
    // G = Q X with the range of G Omega; Psi G = (Psi Q) X gives X.
    let (q, _) = Tensor::f_linalg_qr(&left.f_tr()?, "reduced")?;
    let (basis, triangle) = Tensor::f_linalg_qr(&psi.f_mm(&q)?, "reduced")?;
    let x = triangle.f_linalg_solve_triangular(&basis.f_tr()?.f_mm(&right)?, true, true, false)?;
    let whole = x.f_norm()?;
    let q = outside(&q, &b)?;
    let x = outside(&x.f_tr()?, &a.f_tr()?)?;
    // Q X^T = Q' (R S^T) X'^T with small R and S.
    let (q, small_q) = Tensor::f_linalg_qr(&q, "reduced")?;
    let (x, small_x) = Tensor::f_linalg_qr(&x, "reduced")?;
    let (u, mut sigma, v) = small_q.f_mm(&small_x.f_tr()?)?.f_svd(true, true)?;
    let _ = sigma.f_masked_fill_(&sigma.f_le_tensor(&whole.f_mul_scalar(ROUNDING)?)?, 0.0)?;
    let n = count.min(sigma.size()[0]);
    found.sigma.f_narrow(0, 0, n)?.f_copy_(&sigma.f_narrow(0, 0, n)?)?;
    let u = q.f_mm(&u.f_narrow(1, 0, n)?)?;
    let v = v.f_narrow(1, 0, n)?.f_tr()?.f_mm(&x.f_tr()?)?;
    let signs = signs(&v)?;
    found.u.f_narrow(1, 0, n)?.f_copy_(&u.f_mul(&signs.f_tr()?)?)?;
    found.v.f_narrow(0, 0, n)?.f_copy_(&v.f_mul(&signs)?)?;
    Ok(found)
}

/// 1 or -1 for each row of `v`, (n, 1): the sign of the first of its largest entries.
fn signs(v: &Tensor) -> Result<Tensor> {
    let sizes = v.f_abs()?;
    let bound = sizes.f_amax([1i64].as_slice(), true)?.f_mul_scalar(1.0 - NEAR)?;
    let first = sizes.f_ge_tensor(&bound)?.f_to_kind(Kind::Uint8)?.f_argmax(1, true)?;
    let negative = v.f_gather(1, &first, false)?.f_lt(0.0)?.f_to_kind(v.kind())?;
    Ok(negative.f_mul_scalar(-2.0)?.f_add_scalar(1.0)?)
}

/// The columns of `q` less their projections on the columns of `b`, in which each column counts alike,
/// however long it is; those that are 0 have no direction.
fn outside(q: &Tensor, b: &Tensor) -> Result<Tensor> {
    let norms = b.f_norm_scalaropt_dim(2.0, [0i64].as_slice(), true)?;
    let one_where_none = norms.f_masked_fill(&norms.f_eq(0.0)?, 1.0)?;
    let (directions, lengths, _) = b.f_div(&one_where_none)?.f_svd(true, true)?;
    let longest = if lengths.numel() == 0 { 0.0 } else { lengths.f_double_value(&[0])? };
    let kept = lengths.f_gt(NEGLIGIBLE * longest)?.f_to_kind(Kind::Double)?;
    let basis = directions.f_mul(&kept)?;
    Ok(q.f_sub(&basis.f_mm(&basis.f_tr()?.f_mm(q)?)?)?)
}

fn wide(tensor: &Tensor) -> Result<Tensor> {
    Ok(tensor.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(rows: i64, columns: i64) -> Tensor {
        Tensor::randn([rows, columns], (Kind::Double, Device::Cpu))
    }

    fn distance(found: &Tensor, want: &Tensor) -> f64 {
        (found - want).abs().max().double_value(&[])
    }

    struct Sketch {
        left: Tensor,
        right: Tensor,
        omega: Tensor,
        psi: Tensor,
    }

    fn sketch(out: i64, features: i64, kind: Kind) -> Sketch {
        let zeros = |rows, columns| Tensor::zeros([rows, columns], (kind, Device::Cpu));
        Sketch {
            left: zeros(4, out),
            right: zeros(9, features),
            omega: random(4, features).to_kind(kind),
            psi: random(9, out).to_kind(kind),
        }
    }

    impl Sketch {
        fn copy(&self) -> Self {
            let Self { left, right, omega, psi } = self;
            let [left, right, omega, psi] = [left, right, omega, psi].map(Tensor::copy);
            Self { left, right, omega, psi }
        }

        fn add(&mut self, gy: &Tensor, x: &Tensor) {
            let Self { left, right, omega, psi } = self;
            accumulate(left, right, omega, psi, gy, x, None).unwrap();
        }

        fn triples(&self, a: &Tensor, b: &Tensor, count: i64) -> Triples {
            triples(&self.left, &self.right, &self.psi, a, b, count).unwrap()
        }
    }

    #[test]
    fn a_sketch_is_that_of_the_sum() {
        let mut sketch = sketch(13, 21, Kind::Double);
        let (gy, x) = (random(7, 13), random(7, 21));
        sketch.add(&gy.narrow(0, 0, 3), &x.narrow(0, 0, 3));
        sketch.add(&gy.narrow(0, 3, 4), &x.narrow(0, 3, 4));
        let g = gy.tr().mm(&x);
        assert!(distance(&sketch.left, &g.mm(&sketch.omega.tr()).tr()) < 1e-12);
        assert!(distance(&sketch.right, &sketch.psi.mm(&g)) < 1e-12);
    }

    #[test]
    fn narrow_dtypes_are_added_in_blocks_without_further_rounding() {
        let (tokens, out, features) = (300, 7000, 5000);
        assert!(SCRATCH / (4 * (out + features)) < tokens);
        let mut narrow = sketch(out, features, Kind::Float);
        let mut wide = narrow.copy();
        let [gy, x] =
            [random(tokens, out), random(tokens, features)].map(|t| t.to_kind(Kind::BFloat16));
        narrow.add(&gy, &x);
        wide.add(&gy.to_kind(Kind::Float), &x.to_kind(Kind::Float));
        let bound = 1e-5 * wide.left.norm().double_value(&[]);
        assert!(distance(&narrow.left, &wide.left) < bound);
        assert!(distance(&narrow.right, &wide.right) < 1e-5 * wide.right.norm().double_value(&[]));
    }

    #[test]
    fn triples_leave_out_the_span_of_both_factors() {
        // G has the singular vectors e_0, e_1, e_2; B spans the first column, A the second row.
        let mut sketch = sketch(6, 5, Kind::Double);
        let diagonal = |n: i64| Tensor::eye(n, (Kind::Double, Device::Cpu));
        let values = Tensor::from_slice(&[9.0, 5.0, 2.0]).reshape([3, 1]);
        sketch.add(&diagonal(6).narrow(0, 0, 3), &(diagonal(5).narrow(0, 0, 3) * values));
        let b = diagonal(6).narrow(1, 0, 1) * 3.0;
        let a = Tensor::cat(
            &[diagonal(5).narrow(0, 1, 1), Tensor::zeros([1, 5], (Kind::Double, Device::Cpu))],
            0,
        );
        let found = sketch.triples(&a, &b, 3);
        assert!(distance(&found.sigma, &Tensor::from_slice(&[2.0, 0.0, 0.0])) < 1e-12);
        let product = found.u.narrow(1, 0, 1).mm(&found.v.narrow(0, 0, 1));
        let want = diagonal(6).narrow(1, 2, 1).mm(&diagonal(5).narrow(0, 2, 1));
        assert!(distance(&product, &want) < 1e-12);
    }

    #[test]
    fn the_first_of_the_largest_entries_of_v_is_positive() {
        let v = Tensor::from_slice(&[0.1, -3.0, 3.0 + 1e-6, -1.0, 2.0, -0.5]).reshape([2, 3]);
        assert_eq!(signs(&v).unwrap(), Tensor::from_slice(&[-1.0, 1.0]).reshape([2, 1]));
        for sign in [1.0, -1.0] {
            let mut sketch = sketch(6, 5, Kind::Double);
            sketch.add(&(Tensor::ones([1, 6], (Kind::Double, Device::Cpu)) * sign), &random(1, 5));
            let none = |rows, columns| Tensor::zeros([rows, columns], (Kind::Double, Device::Cpu));
            let Triples { sigma, u, v } = sketch.triples(&none(0, 5), &none(6, 0), 1);
            let largest = v.abs().argmax(1, true);
            assert!(v.gather(1, &largest, false).double_value(&[0, 0]) > 0.0);
            let whole = (u * sigma).mm(&v).mm(&sketch.omega.tr());
            assert!(distance(&whole.tr(), &sketch.left) < 1e-10);
        }
    }

    #[test]
    fn what_the_sketch_holds_and_how_its_parts_are_strided_has_no_part_in_what_is_added() {
        let (gy, x) = (random(37, 13), random(37, 21));
        let mut once = sketch(13, 21, Kind::Double);
        let mut twice = once.copy();
        once.add(&gy, &x);
        twice.add(&gy, &x);
        twice.add(&gy.tr().contiguous().tr(), &x.tr().contiguous().tr());
        assert_eq!(twice.left, once.left * 2.0);
        assert_eq!(twice.right, once.right * 2.0);
    }

    #[test]
    fn what_was_taken_makes_room_for_what_is_added() {
        let mut held = sketch(6, 5, Kind::Float);
        held.add(&random(3, 6), &random(3, 5));
        let (before, mut sum) = (held.copy(), held.copy());
        let mut alone = sketch(6, 5, Kind::Float);
        (alone.omega, alone.psi) = (held.omega.copy(), held.psi.copy());
        let (gy, x) = (random(3, 6), random(3, 5));
        alone.add(&gy, &x);
        let mut add = |gy: &Tensor| {
            let Sketch { left, right, omega, psi } = &mut held;
            let taken = Some([&mut sum.left, &mut sum.right]);
            accumulate(left, right, omega, psi, gy, &x, taken).unwrap()
        };
        assert!(add(&gy));
        assert!(!add(&(&gy * f64::NAN)));
        assert_eq!(sum.left, &before.left * 2.0 + &alone.left);
        assert_eq!(sum.right, &before.right * 2.0 + &alone.right);
    }

    #[test]
    fn numbers_that_are_not_finite_give_nan() {
        let mut sketch = sketch(6, 5, Kind::Double);
        sketch.add(&(random(2, 6) * f64::INFINITY), &random(2, 5));
        let none = |rows, columns| Tensor::zeros([rows, columns], (Kind::Double, Device::Cpu));
        let found = sketch.triples(&none(0, 5), &none(6, 0), 1);
        assert!(found.sigma.double_value(&[0]).is_nan());
    }

    fn taken(step: [f32; 2], scale: Option<f32>, overflow: Option<f32>) -> (Tensor, Tensor) {
        let mut step = Tensor::from_slice(&step);
        let (mut sum, mut steps) =
            (Tensor::from_slice(&[1.0f32, 1.0]), Tensor::from_slice(&[1.0f64]));
        let [scale, overflow] = [scale, overflow].map(|v| v.map(|v| Tensor::from_slice(&[v])));
        take_step_(&mut step, &mut sum, &mut steps, scale.as_ref(), overflow.as_ref()).unwrap();
        assert_eq!(step, Tensor::from_slice(&[0.0f32, 0.0]));
        (sum, steps)
    }

    #[test]
    fn a_step_is_taken_in_without_its_scale() {
        let (sum, steps) = taken([4.0, 8.0], Some(4.0), Some(0.0));
        assert_eq!(sum, Tensor::from_slice(&[2.0f32, 3.0]));
        assert_eq!(steps, Tensor::from_slice(&[2.0f64]));
    }

    #[test]
    fn a_step_that_overflowed_leaves_the_sum_alone() {
        for (step, overflow) in
            [([1.0, 1.0], Some(1.0)), ([f32::NAN, 1.0], None), ([1.0, f32::INFINITY], None)]
        {
            let (sum, steps) = taken(step, None, overflow);
            assert_eq!(sum, Tensor::from_slice(&[1.0f32, 1.0]));
            assert_eq!(steps, Tensor::from_slice(&[1.0f64]));
        }
    }
}
