//! Every loop, with every instruction set, against the same sums in float64.

use super::*;
use crate::kernels::simd::{Bf16, Isa, Portable};

fn random(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

struct Case {
    tokens: usize,
    columns: usize,
    out: usize,
    rows: usize,
    p: f64,
}

const CASES: [Case; 8] = [
    Case { tokens: 1, columns: 1, out: 1, rows: 1, p: 0.0 },
    Case { tokens: 3, columns: 5, out: 70, rows: 2, p: 0.3 },
    Case { tokens: 17, columns: 130, out: 33, rows: 3, p: 0.5 },
    Case { tokens: 33, columns: 64, out: 48, rows: 7, p: 0.0 },
    Case { tokens: 40, columns: 1100, out: 16, rows: 8, p: 0.1 },
    Case { tokens: 16, columns: 31, out: 1030, rows: 9, p: 0.1 },
    Case { tokens: 50, columns: 96, out: 80, rows: 16, p: 0.9 },
    Case { tokens: 19, columns: 40, out: 24, rows: 21, p: 1.0 },
];

fn kept(case: &Case, stream: &Stream) -> Vec<f64> {
    let elements = case.tokens * case.columns;
    let mut bytes = vec![0u8; elements.div_ceil(8)];
    // SAFETY: portable code runs everywhere.
    unsafe { stream.fill::<Portable>(&mut bytes, 0) };
    let kept = |i: usize| if case.p > 0.0 { f64::from(bytes[i / 8] >> (i % 8) & 1) } else { 1.0 };
    (0..elements).map(kept).collect()
}

fn product(n: usize, m: usize, k: usize, f: impl Fn(usize, usize, usize) -> f64) -> Vec<f64> {
    (0..n * m).map(|i| (0..k).map(|l| f(i / m, i % m, l)).sum()).collect()
}

fn close<E: Element>(got: &[E], want: &[f64], tolerance: f64, what: &str) {
    assert_eq!(got.len(), want.len());
    let largest = want.iter().fold(1e-3f64, |a, b| a.max(b.abs()));
    for (g, w) in got.iter().zip(want) {
        let error = (f64::from(g.widen()) - w).abs();
        assert!(error <= tolerance * largest, "{what}: {} for {w}", g.widen());
    }
}

fn check<E: Element>(case: &Case, isa: Isa, tolerance: f64) {
    let &Case { tokens, columns, out, rows, .. } = case;
    let round = |values: Vec<f32>| -> Vec<E> { values.into_iter().map(E::nearest).collect() };
    let x = round(random(tokens * columns, 1));
    let gy = round(random(tokens * out, 2));
    let (a, p) = (random(rows * columns, 3), random(rows * out, 4));
    let bias = random(out, 5);
    let y0 = round(random(tokens * out, 6));
    let stream = Stream::new(case.p, 11, 3);
    let dropout = (case.p > 0.0).then_some(&stream);
    let kept = kept(case, &stream);
    let wide = |v: &E| f64::from(v.widen());
    let dropped: Vec<f64> = x.iter().zip(&kept).map(|(x, k)| wide(x) * k).collect();
    let (fa, fp) = (Factor::new(&a, rows), Factor::new(&p, rows));
    let packed = [fa, fp].map(Panels::pack);
    let (in_a, in_p) = (Panels::of(&packed[0], fa), Panels::of(&packed[1], fp));

    let t64 = product(tokens, rows, columns, |n, r, i| {
        dropped[n * columns + i] * f64::from(a[r * columns + i])
    });
    let update =
        product(tokens, out, rows, |n, o, r| t64[n * rows + r] * f64::from(p[r * out + o]));
    for (start, first) in [
        (Start::Bias(Some(&bias)), (0..tokens * out).map(|i| f64::from(bias[i % out])).collect()),
        (Start::Bias(None), vec![0.0; tokens * out]),
        (Start::Add, y0.iter().map(wide).collect::<Vec<f64>>()),
    ] {
        let (mut t, mut y) = (vec![f32::NAN; tokens * rows], y0.clone());
        isa.run(&Forward {
            x: x.as_ptr().cast_mut(),
            a: in_a,
            p: in_p,
            start,
            dropout,
            t: Out(t.as_mut_ptr()),
            y: Out(y.as_mut_ptr()),
            all: tokens,
            tokens: 0..tokens,
        });
        close(&t, &t64, 1e-5, "t");
        let want: Vec<f64> = update.iter().zip(first).map(|(u, f)| u + f).collect();
        close(&y, &want, tolerance, "y");
    }

    let t = random(tokens * rows, 7);
    let mut gx = vec![E::nearest(f32::NAN); tokens * columns];
    let (mut q, mut sum_a) = (vec![0.0; packed[1].len()], vec![0.0; packed[0].len()]);
    isa.run(&Backward {
        x: x.as_ptr().cast_mut(),
        gy: gy.as_ptr().cast_mut(),
        t: t.as_ptr(),
        a: in_a,
        p: in_p,
        dropout,
        gx: Some(Out(gx.as_mut_ptr())),
        add: false,
        q: Out(q.as_mut_ptr()),
        sum_a: Out(sum_a.as_mut_ptr()),
        all: tokens,
        tokens: 0..tokens,
    });
    let (q, sum_a) = (Panels::unpack(fp, &q), Panels::unpack(fa, &sum_a));
    let u64s =
        product(tokens, rows, out, |n, r, o| wide(&gy[n * out + o]) * f64::from(p[r * out + o]));
    close(
        &q,
        &product(rows, out, tokens, |r, o, n| f64::from(t[n * rows + r]) * wide(&gy[n * out + o])),
        1e-5,
        "q",
    );
    close(
        &sum_a,
        &product(rows, columns, tokens, |r, i, n| u64s[n * rows + r] * dropped[n * columns + i]),
        1e-5,
        "dA",
    );
    let want: Vec<f64> = product(tokens, columns, rows, |n, i, r| {
        u64s[n * rows + r] * f64::from(a[r * columns + i])
    })
    .iter()
    .zip(&kept)
    .map(|(v, k)| v * k)
    .collect();
    close(&gx, &want, tolerance, "dx");
}

#[test]
fn all_instructions_give_the_sums_of_float64() {
    for isa in Isa::available() {
        for case in &CASES {
            check::<f32>(case, isa, 1e-5);
            check::<Bf16>(case, isa, 8e-3);
        }
    }
}

#[test]
fn threads_share_the_tokens() {
    // Enough work for several threads; one thread's result is the sum in another order.
    let (tokens, columns, out, rows) = (400, 300, 500, 8);
    let (x, gy) = (random(tokens * columns, 1), random(tokens * out, 2));
    let (a, p, t) = (random(rows * columns, 3), random(rows * out, 4), random(tokens * rows, 5));
    let (fa, fp) = (Factor::new(&a, rows), Factor::new(&p, rows));
    let stream = Stream::new(0.2, 1, 0);
    let run = || {
        let mut gx = vec![0.0f32; tokens * columns];
        let sums = backward(&x, &gy, &t, (fa, fp), Some(&stream), Some((&mut gx, false)));
        let (mut t, mut y) = (vec![0.0f32; tokens * rows], vec![0.0f32; tokens * out]);
        forward(&x, fa, fp, Start::Bias(None), Some(&stream), &mut t, &mut y);
        (gx, sums.q, sums.a, t, y)
    };
    let before = tch::get_num_threads();
    tch::set_num_threads(1);
    let one = run();
    tch::set_num_threads(3);
    let three = run();
    tch::set_num_threads(before);
    assert_eq!((&one.0, &one.3, &one.4), (&three.0, &three.3, &three.4));
    let wide = |v: &[f32]| v.iter().map(|&v| f64::from(v)).collect::<Vec<_>>();
    close(&three.1, &wide(&one.1), 1e-5, "q");
    close(&three.2, &wide(&one.2), 1e-5, "dA");
}
