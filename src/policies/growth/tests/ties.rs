//! Scores that differ by rounding alone.

use super::*;

fn order(scores: &[f64]) -> Vec<usize> {
    best_first((0..scores.len()).collect(), scores)
}

/// Levels of `scores` that are far apart, each score off its own by less than the bound.
fn off(scores: &[f64], random: &mut Random) -> Vec<f64> {
    let mut noise = || (random.below(2_001) as f64 / 1_000.0 - 1.0) * 0.4 * NEAR;
    scores.iter().map(|score| score * (1.0 + noise())).collect()
}

#[test]
fn scores_within_the_bound_go_in_model_order() {
    assert_eq!(order(&[2.0, 3.0 - 0.9 * 3.0 * NEAR, 3.0]), [1, 2, 0]);
    assert_eq!(order(&[2.0, 3.0 - 1.1 * 3.0 * NEAR, 3.0]), [2, 1, 0]);
}

#[test]
fn a_chain_of_near_scores_ties_with_its_best_only_as_far_as_the_bound() {
    let step = |n: f64| 1.0 - 0.6 * n * NEAR;
    assert_eq!(order(&[step(3.0), step(2.0), step(1.0), step(0.0)]), [2, 3, 0, 1]);
}

#[test]
fn nothing_is_near_infinity_or_zero_but_itself() {
    let (most, least) = (f64::INFINITY, f64::MIN_POSITIVE);
    assert_eq!(order(&[0.0, least, 1.0, most, f64::MAX, most]), [3, 5, 4, 2, 1, 0]);
    assert_eq!(order(&[f64::NEG_INFINITY, -f64::MAX, f64::NAN]), [1, 0, 2]);
}

#[test]
fn the_bound_holds_below_zero_too() {
    assert_eq!(order(&[-1.0 - 0.9 * NEAR, -1.0, -1.0 - 1.2 * NEAR]), [0, 1, 2]);
    assert_eq!(order(&[-1.0 - 1.2 * NEAR, -1.0]), [1, 0]);
}

#[test]
fn scores_for_their_costs_are_compared() {
    let schedule = Schedule { warmup: 0, interval: 1, top_h: 1, add_r: 1 };
    let scores = [2.0, 3.0 * (1.0 + 0.5 * NEAR)];
    let grown = super::super::choose(&schedule, &scores, &[1, 1], &[9, 9], &[2, 3], 99).unwrap();
    assert_eq!(grown, [Growth { module: 0, components: 1 }]);
}

proptest! {
    #![proptest_config(config(1000))]

    #[test]
    fn any_two_scores_further_apart_than_the_bound_go_by_score(
        levels in prop::collection::vec(1u64..6, 1..40), seed: u64,
    ) {
        let mut random = Random(seed);
        let wide = |level: u64, random: &mut Random| level as f64 + random.below(40) as f64 * 0.3 * NEAR;
        let scores: Vec<f64> = levels.iter().map(|&level| wide(level, &mut random)).collect();
        let order = order(&scores);
        for (i, &first) in order.iter().enumerate() {
            for &later in &order[i + 1..] {
                prop_assert!(scores[later] * (1.0 - NEAR) <= scores[first] * (1.0 + 1e-12));
            }
        }
    }

    #[test]
    fn rounding_changes_no_choice((model, schedule) in small(), seed: u64) {
        let mut random = Random(seed);
        let scores = random.scores(model.ranks.len());
        let rounded = off(&scores, &mut random);
        prop_assert_eq!(model.choose(&schedule, &rounded), model.choose(&schedule, &scores));
    }

    #[test]
    fn every_open_module_is_in_the_order_once(
        scores in prop::collection::vec(prop_oneof![any::<f64>(), 0.0..1e-4], 0..60),
    ) {
        let mut found = order(&scores);
        found.sort_unstable();
        prop_assert_eq!(found, (0..scores.len()).collect::<Vec<_>>());
    }
}
