//! Hand-worked schedules and choices, and what is refused.

use super::*;

fn chosen(top_h: u64, scores: &[f64], ranks: &[u64], cap: u64, budget: u64) -> Vec<(usize, u64)> {
    let schedule = Schedule { warmup: 0, interval: 1, top_h, add_r: 2 };
    choose(&schedule, scores, ranks, &vec![cap; ranks.len()], budget)
        .unwrap()
        .iter()
        .map(|growth| (growth.module, growth.components))
        .collect()
}

#[test]
fn equal_scores_go_to_the_first_modules() {
    assert_eq!(chosen(2, &[1.0, 3.0, 3.0, 3.0], &[1; 4], 9, 99), [(1, 2), (2, 2)]);
}

#[test]
fn zeros_of_either_sign_are_equal() {
    assert_eq!(chosen(2, &[-0.0, 0.0, 0.0], &[1; 3], 9, 99), [(0, 2), (1, 2)]);
}

#[test]
fn a_score_that_is_not_a_number_comes_last() {
    assert_eq!(chosen(2, &[f64::NAN, -1.0, -f64::NAN, 0.0], &[1; 4], 9, 99), [(3, 2), (1, 2)]);
}

#[test]
fn a_full_module_yields_to_the_next_best() {
    assert_eq!(chosen(1, &[5.0, 4.0], &[3, 1], 3, 99), [(1, 2)]);
}

#[test]
fn the_last_module_takes_what_the_budget_leaves() {
    assert_eq!(chosen(3, &[3.0, 2.0, 1.0], &[1; 3], 9, 6), [(0, 2), (1, 1)]);
}

#[test]
fn nothing_grows_past_a_total_over_the_budget() {
    assert_eq!(chosen(3, &[3.0, 2.0], &[4, 4], 9, 7), []);
}

#[test]
fn the_automatic_schedule_of_a_long_run() {
    // 72 modules from 1 to 2: 50 events in the steps 101 to 600, 10 apart; 72 / 50 is 2 a time.
    let plan = plan(&AUTOMATIC, 1_000, &[1; 72], &[768; 72], 144).unwrap();
    let schedule = Schedule { warmup: 100, interval: 10, top_h: 2, add_r: 1 };
    assert_eq!(plan, Plan { schedule, reached: 144, possible: 144, end: 600, last: 460 });
}

#[test]
fn a_single_step_reaches_any_budget() {
    let plan = plan(&AUTOMATIC, 1, &[1; 3], &[64; 3], 96).unwrap();
    let schedule = Schedule { warmup: 0, interval: 1, top_h: 3, add_r: 31 };
    assert_eq!(plan, Plan { schedule, reached: 96, possible: 96, end: 1, last: 1 });
}

/// Of 1000 steps and 72 modules from rank 1 to 2, with growth until a tenth of the steps.
fn early(wish: Wish) -> Plan {
    let wish = Wish { growth_end: 0.1, add_r: 1, ..wish };
    plan(&wish, 1_000, &[1; 72], &[768; 72], 144).unwrap()
}

#[test]
fn a_warm_up_past_the_end_moves_it() {
    let plan = early(Wish { warmup: Some(200), ..AUTOMATIC });
    let schedule = Schedule { warmup: 200, interval: 10, top_h: 15, add_r: 1 };
    assert_eq!((plan.schedule, plan.end, plan.last), (schedule, 250, 250));
    assert_eq!(early(Wish { warmup: Some(980), ..AUTOMATIC }).end, 1_000);
}

#[test]
fn an_interval_past_the_end_leaves_its_first_event() {
    let plan = early(Wish { interval: Some(300), ..AUTOMATIC });
    let schedule = Schedule { warmup: 50, interval: 300, top_h: 72, add_r: 1 };
    assert_eq!((plan.schedule, plan.end, plan.last), (schedule, 100, 300));
}

#[test]
fn a_top_h_that_is_too_low_for_the_end_is_told_by_the_last_event() {
    let plan = early(Wish { top_h: Some(3), ..AUTOMATIC });
    assert_eq!((plan.schedule.interval, plan.end, plan.last), (10, 100, 290));
}

#[test]
fn a_given_schedule_that_is_too_short_says_how_far_it_comes() {
    let wish = Wish { warmup: Some(50), interval: Some(20), top_h: Some(2), ..AUTOMATIC };
    let plan = plan(&wish, 100, &[1; 10], &[8; 10], 20).unwrap();
    assert_eq!(plan.reached, 10 + 3 * 2);
}

#[test]
fn a_given_schedule_without_events_reaches_what_there_is() {
    let wish = Wish { warmup: Some(100), ..AUTOMATIC };
    assert_eq!(plan(&wish, 100, &[1; 10], &[8; 10], 20).unwrap().reached, 10);
}

#[test]
fn a_budget_past_the_caps_is_not_promised() {
    assert_eq!(plan(&AUTOMATIC, 1_000, &[1; 10], &[2; 10], 30).unwrap().reached, 20);
}

#[test]
fn a_budget_below_the_first_ranks_is_left_alone() {
    assert_eq!(plan(&AUTOMATIC, 1_000, &[3; 10], &[8; 10], 20).unwrap().reached, 30);
}

#[test]
fn caps_may_be_endless() {
    let endless = plan(&AUTOMATIC, 1_000, &[1, 1], &[1 << 63, 1 << 63], 10).unwrap();
    assert_eq!(endless, plan(&AUTOMATIC, 1_000, &[1, 1], &[99, 99], 10).unwrap());
}

#[test]
fn a_zero_is_refused_by_name() {
    let refused = |wish: Wish, steps| complaint(plan(&wish, steps, &[1], &[4], 4));
    assert!(refused(AUTOMATIC, 0).starts_with("total_steps is 0"));
    assert!(refused(Wish { interval: Some(0), ..AUTOMATIC }, 9).starts_with("deltaT is 0"));
    assert!(refused(Wish { top_h: Some(0), ..AUTOMATIC }, 9).starts_with("top_h is 0"));
    assert!(refused(Wish { add_r: 0, ..AUTOMATIC }, 9).starts_with("add_r is 0"));
    for growth_end in [0.0, -0.1, 1.1, f64::NAN] {
        let told = refused(Wish { growth_end, ..AUTOMATIC }, 9);
        assert!(told.starts_with("growth_end is "), "{told}");
    }
}

#[test]
fn lengths_that_differ_are_refused_by_name() {
    let schedule = Schedule { warmup: 0, interval: 1, top_h: 1, add_r: 1 };
    assert!(complaint(plan(&AUTOMATIC, 9, &[1], &[4, 4], 4)).contains("caps 2"));
    let refused = complaint(choose(&schedule, &[0.0; 3], &[1; 2], &[4; 2], 4));
    assert!(refused.contains("scores has 3 entries"));
}

#[test]
fn a_rank_past_its_cap_is_refused() {
    let refused = complaint(plan(&AUTOMATIC, 9, &[1, 5], &[4, 4], 9));
    assert!(refused.contains("module 1 has rank 5"));
}
