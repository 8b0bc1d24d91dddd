//! The window of the smoothing, and the learning rate of rows born during training.

use super::*;

#[test]
fn the_default_window_is_43_steps() {
    assert_eq!(window(0.85, 0.85), 43);
}

#[test]
fn the_window_follows_the_larger_beta() {
    assert_eq!([window(0.0, 0.0), window(0.5, 0.0), window(0.1, 0.9)], [1, 10, 66]);
}

fn close(value: f64, want: f64) {
    assert!((value - want).abs() <= 1e-12 * want.abs(), "{value} is not {want}");
}

fn linear(multiplier: f64, warmup: u64) -> LearningRate {
    LearningRate { multiplier, warmup, linear_until: Some(1_000) }
}

#[test]
fn a_young_row_climbs_under_a_linear_schedule() {
    // m(250) = 750 / 900, m_new(50) = 50 / 100.
    close(restart_ratio(&linear(750.0 / 900.0, 100), 200, 250), 0.6);
}

#[test]
fn a_grown_row_falls_to_the_common_end_under_a_linear_schedule() {
    // m(500) = 500 / 900, m_new(300) = 500 / 700.
    close(restart_ratio(&linear(500.0 / 900.0, 100), 200, 500), 9.0 / 7.0);
}

#[test]
fn the_peak_of_a_row_is_the_full_learning_rate() {
    close(restart_ratio(&linear(0.25, 100), 200, 300), 4.0);
}

#[test]
fn without_warm_up_a_row_starts_at_the_full_learning_rate() {
    close(restart_ratio(&linear(0.5, 0), 500, 500), 2.0);
}

#[test]
fn a_row_with_no_time_left_after_its_climb_stops() {
    close(restart_ratio(&linear(0.1, 100), 900, 1_000), 0.0);
}

#[test]
fn other_schedules_are_climbed_to_and_followed() {
    let lr = LearningRate { multiplier: 0.3, warmup: 100, linear_until: None };
    close(restart_ratio(&lr, 200, 225), 0.25);
    close(restart_ratio(&lr, 200, 300), 1.0);
}

#[test]
fn without_warm_up_other_schedules_are_followed_at_once() {
    let lr = LearningRate { multiplier: 0.3, warmup: 0, linear_until: None };
    close(restart_ratio(&lr, 200, 201), 1.0);
}

#[test]
fn a_multiplier_of_zero_stops_a_row() {
    close(restart_ratio(&linear(0.0, 100), 200, 250), 0.0);
}

#[test]
fn rows_from_the_start_follow_the_optimizer() {
    close(restart_ratio(&linear(0.0, 100), 0, 250), 1.0);
    close(adam_ratio((0.9, 0.999), 0, 250, 3), 1.0);
}

#[test]
fn adam_corrects_by_the_age_of_the_row() {
    // sqrt(1 - b2^j) / (1 - b1^j) * (1 - b1^t) / sqrt(1 - b2^t), in 40 decimal digits.
    close(adam_ratio((0.9, 0.999), 100, 101, 0), 1.019_998_077_787_752_8);
    close(adam_ratio((0.9, 0.999), 100, 110, 0), 0.474_524_132_631_276_2);
    close(adam_ratio((0.0, 0.999), 10, 12, 0), 0.409_269_505_061_321_3);
}

#[test]
fn steps_before_the_first_counted_one_are_the_parameters_alone() {
    close(adam_ratio((0.9, 0.999), 100, 110, 50), 0.398_297_724_032_499_2);
    close(adam_ratio((0.5, 0.75), 1, 3, 2), 0.978_281_728_406_358_2);
}

#[test]
fn a_row_without_a_step_of_its_own_is_not_corrected() {
    close(adam_ratio((0.9, 0.999), 100, 100, 0), 1.0);
}
