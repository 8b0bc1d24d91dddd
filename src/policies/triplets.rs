//! The budget of AdaLoRA (arXiv 2303.10512) and which of its triplets it pays for: how many may be live falls
//! along a cubic from all of them to a target.
//!
//! Steps count from 1 here; the paper's code counts from 0, and its step t is our step t + 1. `T` is the number of
//! steps.

use crate::errors::{Error, Result};

pub mod scores;

/// Mask events that a schedule has where their interval is left open: the authors' scripts have 64 to 1500.
const EVENTS: u64 = 200;
/// Part of the steps before the first mask event, in hundredths, where that is left open.
const WARM_UP: u64 = 15;

/// What is asked of a schedule; `None`: it follows from the number of steps.
#[derive(Debug, Default, Clone, Copy)]
pub struct Wish {
    /// Steps at the start without a mask event.
    pub tinit: Option<u64>,
    /// Steps at the end, in which what is masked stays so.
    pub tfinal: Option<u64>,
    /// Steps between mask events.
    pub interval: Option<u64>,
}

/// When triplets are masked, and how many stay live.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Schedule {
    /// Steps of the training.
    pub total: u64,
    /// Steps at the start without a mask event.
    pub tinit: u64,
    /// Steps at the end, in which what is masked stays so.
    pub tfinal: u64,
    /// Steps between mask events.
    pub interval: u64,
    /// All triplets.
    pub first: u64,
    /// Triplets that are live at the end.
    pub target: u64,
}

impl Schedule {
    /// The schedule of a training of `total` steps from `first` triplets to `target`.
    ///
    /// Left open, `tinit` is 15 % of the steps, at most half of those before `tfinal`; `tfinal` half of those
    /// after `tinit`; and the interval makes some 200 events of the rest.
    pub fn new(wish: &Wish, total: u64, first: u64, target: u64) -> Result<Self> {
        if target > first {
            return Err(Error::Value(format!(
                "target is {target}, but there are {first} triplets, and none is added; give at most so many"
            )));
        }
        let before = total.saturating_sub(wish.tfinal.unwrap_or(0));
        let tinit =
            wish.tinit.unwrap_or_else(|| (total.saturating_mul(WARM_UP) / 100).min(before / 2));
        let tfinal = wish.tfinal.unwrap_or_else(|| total.saturating_sub(tinit) / 2);
        let phase = total.saturating_sub(tinit).saturating_sub(tfinal);
        if phase == 0 {
            return Err(Error::Value(format!(
                "tinit={tinit} and tfinal={tfinal} leave none of the {total} steps of the training for the \
                 ranks to fall in; lower one of them, or take more steps"
            )));
        }
        let interval = wish.interval.unwrap_or_else(|| (phase / EVENTS).max(1));
        if interval == 0 {
            return Err(Error::Value("deltaT is 0; give 1 or more".into()));
        }
        Ok(Self { total, tinit, tfinal, interval, first, target })
    }

    /// The step of the last mask event: the paper's `T - tfinal`, and never after the last step, so that what
    /// a training ends with is within the budget.
    pub fn last(&self) -> u64 {
        (self.total - self.tfinal + 1).min(self.total)
    }

    /// How many triplets may be live after `step`.
    ///
    /// With the paper's t, all until `tinit`, then
    /// `target + (first - target) (1 - (t - tinit) / (T - tfinal - tinit))^3`, rounded down.
    pub fn budget(&self, step: u64) -> u64 {
        let t = step.saturating_sub(1);
        if step >= self.last() {
            return self.target;
        }
        if t <= self.tinit {
            return self.first;
        }
        let phase = self.total - self.tfinal - self.tinit;
        let left = 1.0 - (t - self.tinit) as f64 / phase as f64;
        // In the order of the published code, of which every bit counts where this is all but an integer.
        ((self.first - self.target) as f64 * left.powf(3.0) + self.target as f64) as u64
    }

    /// Are triplets chosen anew after `step`?
    pub fn is_event(&self, step: u64) -> bool {
        let due = step > self.tinit + 1 && (step - 1).is_multiple_of(self.interval);
        self.prunes() && (step == self.last() || (due && step < self.last()))
    }

    /// Does a mask event need what `step` tells? The published code takes nothing in from `T - tfinal` on.
    pub fn observes(&self, step: u64) -> bool {
        self.prunes() && step <= self.total - self.tfinal
    }

    /// Is what was chosen last masked again after `step`?
    pub fn holds(&self, step: u64) -> bool {
        self.prunes() && step > self.last()
    }

    fn prunes(&self) -> bool {
        self.target < self.first
    }
}

/// Which triplets are live: the `budget` of highest score, of equals the first.
pub fn live(scores: &[f64], budget: usize) -> Vec<bool> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_unstable_by(|&i, &j| scores[j].total_cmp(&scores[i]).then(i.cmp(&j)));
    let mut live = vec![false; scores.len()];
    for &i in order.iter().take(budget) {
        live[i] = true;
    }
    live
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(tinit: u64, tfinal: u64, interval: u64) -> Wish {
        Wish { tinit: Some(tinit), tfinal: Some(tfinal), interval: Some(interval) }
    }

    fn schedule(wish: Wish, total: u64) -> Schedule {
        Schedule::new(&wish, total, 30, 10).unwrap()
    }

    fn message(wish: Wish, total: u64) -> String {
        Schedule::new(&wish, total, 30, 10).unwrap_err().to_string()
    }

    #[test]
    fn the_budget_falls_along_the_cubic() {
        let schedule = schedule(given(2, 3, 1), 13);
        let budgets: Vec<u64> = (1..=13).map(|step| schedule.budget(step)).collect();
        // 10 + 20 (1 - k / 8)^3 for k = 1 to 8.
        assert_eq!(budgets, [30, 30, 30, 23, 18, 14, 12, 11, 10, 10, 10, 10, 10]);
    }

    #[test]
    fn the_budget_never_rises_and_ends_at_the_target() {
        for total in 1..60 {
            for tinit in 0..total {
                for tfinal in 0..total - tinit {
                    let schedule = schedule(given(tinit, tfinal, 1), total);
                    let budgets: Vec<u64> = (1..=total).map(|step| schedule.budget(step)).collect();
                    assert!(budgets.windows(2).all(|pair| pair[0] >= pair[1]));
                    assert!(budgets.iter().all(|budget| (10..=30).contains(budget)));
                    assert_eq!(budgets[total as usize - 1], 10);
                    assert!(schedule.is_event(schedule.last()) && schedule.last() <= total);
                    assert!((1..=tinit.min(total - 1)).all(|step| !schedule.is_event(step)));
                }
            }
        }
    }

    #[test]
    fn events_are_at_the_interval_of_the_papers_steps_and_at_the_end() {
        let schedule = schedule(given(3, 4, 3), 20);
        let events: Vec<u64> = (1..=20).filter(|&step| schedule.is_event(step)).collect();
        // t = 6, 9, 12, 15 and T - tfinal = 16.
        assert_eq!(events, [7, 10, 13, 16, 17]);
        assert!((1..=20).all(|step| schedule.holds(step) == (step > 17)));
        assert!((1..=20).all(|step| schedule.observes(step) == (step < 17)));
    }

    #[test]
    fn without_final_steps_the_last_one_is_an_event() {
        let schedule = schedule(given(0, 0, 100), 30);
        let events: Vec<u64> = (1..=30).filter(|&step| schedule.is_event(step)).collect();
        assert_eq!(events, [30]);
        assert!(schedule.observes(30) && schedule.holds(31));
        assert_eq!(schedule.budget(30), 10);
    }

    #[test]
    fn a_target_of_all_masks_nothing() {
        let schedule = Schedule::new(&given(0, 2, 1), 10, 10, 10).unwrap();
        assert!((1..=10).all(|step| !schedule.is_event(step) && !schedule.observes(step)));
        assert!((1..=10).all(|step| schedule.budget(step) == 10 && !schedule.holds(step)));
    }

    #[test]
    fn what_is_left_open_follows_from_the_steps() {
        let parts = |schedule: Schedule| (schedule.tinit, schedule.tfinal, schedule.interval);
        assert_eq!(parts(schedule(Wish::default(), 1000)), (150, 425, 2));
        assert_eq!(parts(schedule(Wish { tinit: Some(80), ..Wish::default() }, 100)), (80, 10, 1));
        assert_eq!(parts(schedule(Wish { tfinal: Some(90), ..Wish::default() }, 100)), (5, 90, 1));
        for total in 1..1000 {
            schedule(Wish::default(), total);
        }
    }

    #[test]
    fn a_schedule_without_room_is_refused() {
        assert_eq!(
            message(given(60, 40, 1), 100),
            "tinit=60 and tfinal=40 leave none of the 100 steps of the training for the ranks to fall in; \
             lower one of them, or take more steps"
        );
        assert!(message(Wish { tinit: Some(100), ..Wish::default() }, 100).contains("tinit=100"));
        assert!(message(Wish { tfinal: Some(100), ..Wish::default() }, 100).contains("tfinal=100"));
        assert!(message(Wish::default(), 0).contains("of the 0 steps"));
        assert!(message(given(0, 0, 0), 10).contains("deltaT is 0"));
        let more = Schedule::new(&Wish::default(), 10, 4, 5).unwrap_err().to_string();
        assert!(more.starts_with("target is 5, but there are 4 triplets"));
    }

    #[test]
    fn the_highest_scores_are_live() {
        assert_eq!(live(&[0.5, 2.0, 1.0, 0.1], 2), [false, true, true, false]);
        assert_eq!(live(&[0.5, 2.0], 0), [false, false]);
        assert_eq!(live(&[0.5, 2.0], 5), [true, true]);
    }

    #[test]
    fn of_equals_as_many_stay_as_the_budget_pays_for() {
        assert_eq!(live(&[1.0, 0.0, 0.0, 0.0, 3.0], 3), [true, true, false, false, true]);
        assert_eq!(live(&[0.0; 4], 3), [true, true, true, false]);
    }
}
