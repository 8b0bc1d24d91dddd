//! Criterion: the plain Rust parts of a growth event, by the number of modules.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion};
use increlora_rs::policies::growth::{
    adam_ratio, choose, plan, restart_ratio, window, LearningRate, Wish,
};

const MODULES: [usize; 4] = [10, 100, 500, 1000];
const BUDGET_A_MODULE: u64 = 8;
const STEPS: u64 = 10_000;

/// Scores in no order, the same at every run.
fn scores(modules: usize) -> Vec<f64> {
    let mut state = 1u64;
    let mut next = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 11) as f64 / (1u64 << 53) as f64
    };
    (0..modules).map(|_| next()).collect()
}

fn events(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("growth");
    let wish = Wish { warmup: None, interval: None, top_h: None, add_r: 1, growth_end: 0.6 };
    for modules in MODULES {
        let (ranks, caps, costs) = (vec![1; modules], vec![768; modules], vec![1; modules]);
        let budget = BUDGET_A_MODULE * modules as u64;
        group.bench_with_input(BenchmarkId::new("plan", modules), &modules, |bench, _| {
            bench.iter(|| plan(black_box(&wish), STEPS, &ranks, &caps, &costs, budget));
        });
        let Ok(planned) = plan(&wish, STEPS, &ranks, &caps, &costs, budget) else {
            continue;
        };
        let scores = scores(modules);
        group.bench_with_input(BenchmarkId::new("choose", modules), &modules, |bench, _| {
            let schedule = &planned.schedule;
            bench.iter(|| choose(schedule, black_box(&scores), &ranks, &caps, &costs, budget));
        });
    }
    group.finish();
}

fn scalars(criterion: &mut Criterion) {
    criterion.bench_function("window", |bench| bench.iter(|| window(black_box(0.85), 0.85)));
    let lr = LearningRate { multiplier: 0.5, warmup: 100, linear_until: Some(STEPS) };
    criterion.bench_function("restart_ratio", |bench| {
        bench.iter(|| restart_ratio(black_box(&lr), 500, 560));
    });
    criterion.bench_function("adam_ratio", |bench| {
        bench.iter(|| adam_ratio(black_box((0.9, 0.999)), 500, 560, 0));
    });
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    events(&mut criterion);
    scalars(&mut criterion);
    criterion.final_summary();
}
