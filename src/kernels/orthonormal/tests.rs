//! Every tile, by rows and by columns, against the formulas in float64.

use super::*;
use proptest::prelude::*;

const FACTOR: f64 = 0.5;

/// Numbers that look random, the same for the same seed.
fn numbers(count: usize, seed: usize) -> Vec<f64> {
    (0..count).map(|i| ((i * 7919 + seed * 104_729) % 2003) as f64 / 1001.0 - 1.0).collect()
}

/// Norm and `grad + FACTOR * gradient` by the formulas.
fn formulas(matrix: &[f64], r: usize, rows: bool, grad: &[f64]) -> (f64, Vec<f64>) {
    let n = matrix.len() / r;
    let at = |component: usize, i: usize| if rows { component * n + i } else { i * r + component };
    let mut residual = vec![0.0; r * r];
    for j in 0..r {
        for k in 0..r {
            let gram: f64 = (0..n).map(|i| matrix[at(j, i)] * matrix[at(k, i)]).sum();
            residual[j * r + k] = gram - f64::from(u8::from(j == k));
        }
    }
    let norm = residual.iter().map(|x| x * x).sum::<f64>().sqrt();
    let mut grad = grad.to_vec();
    for j in 0..r {
        for i in 0..n {
            let sum: f64 = (0..r).map(|k| residual[j * r + k] * matrix[at(k, i)]).sum();
            grad[at(j, i)] += FACTOR * 2.0 / norm * sum;
        }
    }
    (norm, grad)
}

/// The largest error of norm and gradient after `work`, over the largest gradient.
fn error<T: Real>(r: usize, n: usize, rows: bool, work: fn(&mut Job<'_, T>)) -> f64 {
    let (matrix, start) = (numbers(r * n, 1), numbers(r * n, 2));
    let (norm, wanted) = formulas(&matrix, r, rows, &start);
    let narrow = |values: &[f64]| values.iter().map(|&x| T::nearest(x)).collect::<Vec<T>>();
    let (matrix, mut grad) = (narrow(&matrix), narrow(&start));
    let grad_slice = Some(&mut grad[..]);
    let mut job = Job { matrix: &matrix, grad: grad_slice, components: r, rows, norm: 0.0 };
    work(&mut job);
    let norm_error = (job.norm / norm - 1.0).abs();
    let scale = wanted.iter().fold(0.0, |most: f64, x| most.max(x.abs()));
    let errors = grad.iter().zip(&wanted).map(|(x, y)| (x.wide() - y).abs() / scale);
    errors.fold(norm_error, f64::max)
}

fn portable<T: Real>(job: &mut Job<'_, T>) {
    one::<T, T::Portable>(job, &[], FACTOR, &mut Scratch::default());
}

fn dispatched<T: Real>(job: &mut Job<'_, T>) {
    run(std::slice::from_mut(job), FACTOR);
}

fn check(r: usize, n: usize, rows: bool) {
    for work in [portable::<f32>, dispatched::<f32>] {
        assert!(error(r, n, rows, work) < 3e-6, "float32, {r} by {n}, rows: {rows}");
    }
    for work in [portable::<f64>, dispatched::<f64>] {
        assert!(error(r, n, rows, work) < 1e-13, "float64, {r} by {n}, rows: {rows}");
    }
}

#[test]
fn every_tile_and_its_edges_follow_the_formulas() {
    for r in (1..=17).chain([31, 32, 33, 63, 64]) {
        for n in [1, 2, 3, 7, 8, 9, 15, 16, 17, 100, 768, 2500] {
            for rows in [true, false] {
                check(r, n, rows);
            }
        }
    }
}

#[test]
fn an_orthonormal_matrix_has_norm_zero_and_no_gradient() {
    let mut matrix = [0.0f32; 3 * 40];
    for i in 0..3 {
        matrix[i * 40 + 7 * i] = 1.0;
    }
    let mut grad = [2.0f32; 3 * 40];
    let mut jobs =
        [Job { matrix: &matrix, grad: Some(&mut grad), components: 3, rows: true, norm: 1.0 }];
    run(&mut jobs, 0.5);
    assert_eq!(jobs[0].norm, 0.0);
    assert_eq!(grad, [2.0; 3 * 40]);
}

#[test]
fn a_matrix_without_components_or_without_elements_does() {
    for (components, norm) in [(0, 0.0), (2, f64::sqrt(2.0))] {
        for rows in [true, false] {
            let matrix: &[f32] = &[];
            let mut grad = [];
            let mut jobs = [Job { matrix, grad: Some(&mut grad), components, rows, norm: 9.0 }];
            run(&mut jobs, 1.0);
            assert_eq!(jobs[0].norm, norm);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn any_size_follows_the_formulas(r in 1usize..=64, n in 1usize..200, rows: bool) {
        check(r, n, rows);
    }
}
