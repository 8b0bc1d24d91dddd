//! The scores of many sketched matrices: of each the largest singular value that [`sketch::triples`] gives, at a
//! fraction of its cost, for only small matrices of inner products are decomposed.
//!
//! With G = Q X, the rows q_i of `q` orthonormal, `sigma^2` is the largest eigenvalue of `(Q'^T Q') (X' X'^T)`, the
//! primed ones less their projections. Squares lose digits where little is left of G: such a matrix, and one whose
//! factors are next to dependent, goes through [`sketch::triples`].

use std::collections::hash_map::{Entry, HashMap};

use tch::{Device, Kind, Tensor};

use super::sketch;
use crate::checks;
use crate::errors::Result;
use crate::kernels::plain::Plain;
use crate::kernels::rows::{add_sums, inner};

/// A row of a sketch of which less than this share of the longest is outside the span of those before it is in it.
const IN_SPAN: f64 = 1e-11;
/// The same of a factor's row, each counted alike: far below what counts as a direction.
const DEPENDENT: f64 = 1e-9;
/// The least share of the whole matrix that a sigma of squares may be.
const LEFT: f64 = 1e-3;

/// One module: its sketch, and the factors of what it can learn by itself.
pub struct Sketched {
    /// (k, out).
    pub left: Tensor,
    /// (l, in).
    pub right: Tensor,
    /// (l, out).
    pub psi: Tensor,
    /// (rows, in).
    pub a: Tensor,
    /// (out, rows).
    pub b: Tensor,
}

/// The scores, float64 (modules) on the CPU; NaN where a number that goes in is not finite.
pub fn scores(modules: &[Sketched]) -> Result<Tensor> {
    // Modules of one size share their psi.
    let mut psis: HashMap<usize, Tensor> = HashMap::new();
    let mut found = Vec::with_capacity(modules.len());
    for module in modules {
        check(module)?;
        let psi = match psis.entry(module.psi.data_ptr() as usize) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(free) => free.insert(plain(&module.psi)?),
        };
        found.push(match by_squares(module, psi)? {
            Some(sigma) => sigma,
            None => {
                let Sketched { left, right, psi, a, b } = module;
                sketch::triples(left, right, psi, a, b, 1)?.sigma.f_double_value(&[0])?
            }
        });
    }
    Ok(Tensor::from_slice(&found))
}

fn check(module: &Sketched) -> Result<()> {
    let Sketched { left, right, psi, a, b } = module;
    for (name, tensor) in [("left", left), ("right", right), ("psi", psi), ("a", a), ("b", b)] {
        checks::float(name, tensor)?;
        checks::matrix(name, tensor)?;
    }
    checks::shape("psi", psi, &[right.size()[0], left.size()[1]])?;
    checks::shape("a", a, &[a.size()[0], right.size()[1]])?;
    checks::shape("b", b, &[left.size()[1], b.size()[1]])
}

/// Float64, contiguous, on the CPU.
fn plain(tensor: &Tensor) -> Result<Tensor> {
    Ok(tensor.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?.f_contiguous()?)
}

fn elements(tensor: &Tensor) -> &[f64] {
    Plain::of(tensor).map_or(&[], |plain| plain.elements::<f64>())
}

/// The score; None where it takes [`sketch::triples`].
fn by_squares(module: &Sketched, psi: &Tensor) -> Result<Option<f64>> {
    let (left, right, a) = (plain(&module.left)?, plain(&module.right)?, plain(&module.a)?);
    let b = plain(&module.b.f_tr()?)?;
    let (out, features, l) =
        (left.size()[1] as usize, right.size()[1] as usize, right.size()[0] as usize);
    let Some((q, _)) = orthonormal(elements(&left), out, IN_SPAN) else { return Ok(None) };
    if q.is_empty() || features == 0 {
        let zero = elements(&right).iter().chain(elements(&a)).chain(elements(&b));
        return Ok(zero.copied().all(f64::is_finite).then_some(0.0));
    }
    let m = q.len() / out;
    // Psi Q, a row for each column of Q; its orthonormal rows o with Psi q_i = sum_j triangle[i, j] o_j.
    let mut sent = vec![0.0; m * l];
    inner(&q, elements(psi), out, &mut sent);
    let Some((o, triangle)) = orthonormal(&sent, l, IN_SPAN) else { return Ok(None) };
    if o.len() < m * l {
        return Ok(None);
    }
    // X = R^-1 Y with R the triangle transposed.
    let mut y = vec![0.0; m * features];
    add_sums(&o, elements(&right), features, &mut y);
    let mut squares = vec![0.0; m * m];
    inner(&y, &y, features, &mut squares);
    let whole: f64 = trace(&solved(&triangle, &squares, m), m);
    let Some(of_a) = projections(elements(&a), &y, features) else { return Ok(None) };
    let Some(of_b) = projections(elements(&b), &q, out) else { return Ok(None) };
    squares.iter_mut().zip(&of_a).for_each(|(square, part)| *square -= part);
    let root = root(solved(&triangle, &squares, m), m);
    let rest: Vec<f64> =
        of_b.iter().enumerate().map(|(at, part)| f64::from(at % (m + 1) == 0) - part).collect();
    // root^T rest root.
    let inside = product(&transposed(&root, m), &product(&rest, &root, m), m);
    let sigma = largest_eigenvalue(inside, m).max(0.0).sqrt();
    let whole = whole.sqrt();
    if whole == 0.0 {
        return Ok(Some(0.0));
    }
    // Of what is not finite neither holds.
    Ok((sigma > LEFT * whole && sigma.is_finite()).then_some(sigma))
}

/// An orthonormal basis of the span of rows of `n` numbers, and in it, as a lower triangle, those rows of which more than
/// the share `least` of the longest is outside the span of the rows before. None where a number is not finite.
fn orthonormal(rows: &[f64], n: usize, least: f64) -> Option<(Vec<f64>, Vec<f64>)> {
    let count = rows.len().checked_div(n).unwrap_or(0);
    let mut basis: Vec<f64> = Vec::with_capacity(rows.len());
    let mut parts = vec![];
    let length = |row: &[f64]| {
        let mut square = [0.0];
        inner(row, row, n, &mut square);
        square[0].sqrt()
    };
    let longest = (0..count).map(|i| length(&rows[i * n..][..n])).fold(0.0, |most: f64, length| {
        if length.is_finite() {
            most.max(length)
        } else {
            f64::NAN
        }
    });
    if count > 0 && !longest.is_finite() {
        return None;
    }
    for i in 0..count {
        let mut rest = rows[i * n..][..n].to_vec();
        let known = basis.len() / n;
        let mut share = vec![0.0; known];
        // Twice is enough.
        for _ in 0..2 {
            let mut more = vec![0.0; known];
            inner(&basis, &rest, n, &mut more);
            share.iter_mut().zip(&more).for_each(|(share, more)| *share += more);
            more.iter_mut().for_each(|more| *more = -*more);
            add_sums(&more, &basis, n, &mut rest);
        }
        let left = length(&rest);
        if left > least * longest {
            basis.extend(rest.iter().map(|value| value / left));
            share.push(left);
            parts.push(share);
        }
    }
    let m = basis.len() / n.max(1);
    let padded = parts
        .iter()
        .flat_map(|share| share.iter().copied().chain(std::iter::repeat_n(0.0, m - share.len())));
    Some((basis, padded.collect()))
}

/// Inner products of the projections of the rows of `y` on the span of `factors`, both of `n` numbers a row, as
/// [`sketch::triples`] counts its directions; None where a number is not finite.
fn projections(factors: &[f64], y: &[f64], n: usize) -> Option<Vec<f64>> {
    let m = y.len() / n;
    let mut rows = Vec::with_capacity(factors.len());
    for row in factors.chunks_exact(n) {
        let mut square = [0.0];
        inner(row, row, n, &mut square);
        if !square[0].is_finite() {
            return None;
        }
        // Each counts alike; those that are 0 have no direction.
        if square[0] > 0.0 {
            rows.extend(row.iter().map(|value| value / square[0].sqrt()));
        }
    }
    let (basis, lower) = orthonormal(&rows, n, DEPENDENT)?;
    let r = basis.len() / n;
    let (mut shared, mut found) = (vec![0.0; r * m], vec![0.0; m * m]);
    inner(&basis, y, n, &mut shared);
    let directions = directions(lower, r);
    let mut along = vec![0.0; directions.len() / r.max(1) * m];
    add_sums(&directions, &shared, m, &mut along);
    for row in along.chunks_exact(m) {
        for i in 0..m {
            for j in 0..m {
                found[i * m + j] += row[i] * row[j];
            }
        }
    }
    Some(found)
}

/// The right singular vectors of a matrix, as rows, but for those of negligible singular values: by rotations of its rows
/// until all are orthogonal, which keeps the digits of the small ones.
fn directions(mut rows: Vec<f64>, n: usize) -> Vec<f64> {
    let dot = |rows: &[f64], p: usize, q: usize| -> f64 {
        (0..n).map(|k| rows[p * n + k] * rows[q * n + k]).sum()
    };
    for _ in 0..SWEEPS {
        let mut rotated = false;
        for p in 0..n {
            for q in p + 1..n {
                let (x, y, at) = (dot(&rows, p, p), dot(&rows, q, q), dot(&rows, p, q));
                if at.abs() <= f64::EPSILON * (x * y).sqrt() {
                    continue;
                }
                rotated = true;
                let (cos, sin) = rotation(x, y, at);
                for k in 0..n {
                    let (x, y) = (rows[p * n + k], rows[q * n + k]);
                    rows[p * n + k] = cos * x - sin * y;
                    rows[q * n + k] = sin * x + cos * y;
                }
            }
        }
        if !rotated {
            break;
        }
    }
    let lengths: Vec<f64> = (0..n).map(|i| dot(&rows, i, i).sqrt()).collect();
    let longest = lengths.iter().copied().fold(0.0, f64::max);
    let kept = (0..n).filter(|&i| lengths[i] > sketch::NEGLIGIBLE * longest);
    kept.flat_map(|i| rows[i * n..][..n].iter().map(move |value| (i, value)))
        .map(|(i, value)| value / lengths[i])
        .collect()
}

/// Cosine and sine that make two rows orthogonal of which `x` and `y` are the squares, `at` the product.
fn rotation(x: f64, y: f64, at: f64) -> (f64, f64) {
    let theta = (y - x) / (2.0 * at);
    let t = theta.signum() / (theta.abs() + theta.mul_add(theta, 1.0).sqrt());
    let cos = 1.0 / t.mul_add(t, 1.0).sqrt();
    (cos, t * cos)
}

/// The inverse of a lower triangle.
fn inverse(lower: &[f64], n: usize) -> Vec<f64> {
    let mut found = vec![0.0; n * n];
    for j in 0..n {
        for i in j..n {
            let before: f64 = (j..i).map(|k| lower[i * n + k] * found[k * n + j]).sum();
            found[i * n + j] = (f64::from(i == j) - before) / lower[i * n + i];
        }
    }
    found
}

/// `R^-1 M R^-T` where `lower = R^T`.
fn solved(lower: &[f64], matrix: &[f64], n: usize) -> Vec<f64> {
    let inverse = inverse(lower, n);
    product(&product(&transposed(&inverse, n), matrix, n), &inverse, n)
}

fn product(x: &[f64], y: &[f64], n: usize) -> Vec<f64> {
    let mut found = vec![0.0; n * n];
    for i in 0..n {
        for k in 0..n {
            let factor = x[i * n + k];
            for j in 0..n {
                found[i * n + j] += factor * y[k * n + j];
            }
        }
    }
    found
}

fn transposed(matrix: &[f64], n: usize) -> Vec<f64> {
    (0..n * n).map(|at| matrix[at % n * n + at / n]).collect()
}

fn trace(matrix: &[f64], n: usize) -> f64 {
    (0..n).map(|i| matrix[i * n + i]).sum()
}

/// A lower triangle F with `F F^T` the matrix, which is positive but for its rounding.
fn root(mut matrix: Vec<f64>, n: usize) -> Vec<f64> {
    let negligible = f64::EPSILON * trace(&matrix, n).abs();
    let mut lower = vec![0.0; n * n];
    for j in 0..n {
        let pivot = matrix[j * n + j];
        if pivot <= negligible {
            continue;
        }
        for i in j..n {
            lower[i * n + j] = matrix[i * n + j] / pivot.sqrt();
        }
        for i in j..n {
            for k in j..n {
                matrix[i * n + k] -= lower[i * n + j] * lower[k * n + j];
            }
        }
    }
    lower
}

/// By Jacobi's rotations.
fn largest_eigenvalue(mut s: Vec<f64>, n: usize) -> f64 {
    for _ in 0..SWEEPS {
        let off: f64 = (0..n * n).filter(|at| at % n != at / n).map(|at| s[at] * s[at]).sum();
        let on: f64 = (0..n).map(|i| s[i * n + i] * s[i * n + i]).sum();
        let diagonal = off <= f64::EPSILON * f64::EPSILON * on;
        if diagonal || (off + on).is_nan() {
            break;
        }
        for p in 0..n {
            for q in p + 1..n {
                rotate(&mut s, n, p, q);
            }
        }
    }
    (0..n).map(|i| s[i * n + i]).fold(f64::NEG_INFINITY, f64::max)
}

/// More than any matrix takes.
const SWEEPS: usize = 30;

fn rotate(s: &mut [f64], n: usize, p: usize, q: usize) {
    let at = s[p * n + q];
    if at == 0.0 {
        return;
    }
    let (cos, sin) = rotation(s[p * n + p], s[q * n + q], at);
    for k in 0..n {
        let (x, y) = (s[k * n + p], s[k * n + q]);
        s[k * n + p] = cos * x - sin * y;
        s[k * n + q] = sin * x + cos * y;
    }
    for k in 0..n {
        let (x, y) = (s[p * n + k], s[q * n + k]);
        s[p * n + k] = cos * x - sin * y;
        s[q * n + k] = sin * x + cos * y;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(rows: i64, columns: i64) -> Tensor {
        Tensor::randn([rows, columns], (Kind::Double, Device::Cpu))
    }

    fn of(g: &Tensor, a: Tensor, b: Tensor, kind: Kind) -> Sketched {
        let (out, features) = g.size2().unwrap();
        let (omega, psi) = (random(8, features), random(33, out));
        let left = g.mm(&omega.tr()).tr().contiguous().to_kind(kind);
        Sketched { left, right: psi.mm(g).to_kind(kind), psi: psi.to_kind(kind), a, b }
    }

    fn distance(modules: &[Sketched]) -> f64 {
        let found = scores(modules).unwrap();
        let each = modules.iter().enumerate().map(|(i, module)| {
            let Sketched { left, right, psi, a, b } = module;
            let want = sketch::triples(left, right, psi, a, b, 1).unwrap().sigma;
            (found.double_value(&[i as i64]) - want.double_value(&[0])).abs()
                / want.double_value(&[0]).max(1e-30)
        });
        each.fold(0.0, f64::max)
    }

    #[test]
    fn scores_are_the_first_singular_values_of_the_triples() {
        tch::manual_seed(5);
        let full = |kind| of(&random(60, 40), random(4, 40), random(60, 4), kind);
        let low = |rank, rows| {
            let g = random(60, rank).mm(&random(rank, 41));
            of(&g, random(rows, 41), random(60, rows), Kind::Double)
        };
        let zeros = |rows, columns| Tensor::zeros([rows, columns], (Kind::Double, Device::Cpu));
        let modules = [
            full(Kind::Double),
            full(Kind::Float),
            low(1, 3),
            low(5, 0),
            of(&random(5, 6), random(2, 6), random(5, 2), Kind::Double),
            of(&random(60, 40), random(4, 40), zeros(60, 4), Kind::Double),
        ];
        assert!(distance(&modules) < 1e-9);
    }

    #[test]
    fn what_the_factors_can_learn_by_themselves_is_left_out() {
        tch::manual_seed(5);
        let (u, v) = (random(60, 2), random(2, 40));
        let g = u.mm(&v);
        let inside = of(&g, v.shallow_clone(), u.shallow_clone(), Kind::Double);
        // Twice the same row is one direction.
        let twice = Tensor::cat(&[v.narrow(0, 0, 1), v.narrow(0, 0, 1)], 0);
        let dependent = of(&g, twice, u.narrow(1, 0, 1), Kind::Double);
        let found = scores(&[inside, of(&(g * 0.0), v, u, Kind::Double)]).unwrap();
        assert_eq!(found, Tensor::from_slice(&[0.0, 0.0]));
        assert!(distance(&[dependent]) < 1e-9);
        // As those of B are after a first step of Adam's.
        let signs = |kind| (random(60, 1).sign() * random(1, 4).sign() * 1e-4).to_kind(kind);
        let alike = of(&random(60, 40), random(4, 40), signs(Kind::Float), Kind::Float);
        assert!(by_squares(&alike, &plain(&alike.psi).unwrap()).unwrap().is_some());
        assert!(distance(&[alike]) < 1e-6);
        // One direction of two is too short to count.
        let short = random(60, 1).matmul(&Tensor::ones([1, 2], (Kind::Double, Device::Cpu)));
        let short = short + random(60, 2) * 1e-6;
        assert!(distance(&[of(&random(60, 40), random(4, 40), short, Kind::Double)]) < 1e-6);
        // And after some more.
        let near = random(60, 1) * 1e3 + random(60, 4);
        let near = of(&random(60, 40), random(4, 40), near, Kind::Double);
        assert!(by_squares(&near, &plain(&near.psi).unwrap()).unwrap().is_some());
        assert!(distance(&[near]) < 1e-9);
    }

    #[test]
    fn numbers_that_are_not_finite_give_nan() {
        let none = || (random(0, 5), random(6, 0));
        for place in 0..4 {
            let mut module = of(&random(6, 5), random(1, 5), random(6, 1), Kind::Double);
            let Sketched { left, right, a, b, .. } = &mut module;
            let _ = [left, right, a, b][place].narrow(0, 0, 1).fill_(f64::INFINITY);
            assert!(scores(&[module]).unwrap().double_value(&[0]).is_nan());
        }
        let (a, b) = none();
        let module = of(&(random(6, 5) * f64::NAN), a, b, Kind::Double);
        assert!(scores(&[module]).unwrap().double_value(&[0]).is_nan());
    }
}
