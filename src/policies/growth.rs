//! When ranks grow, by how much, and where: the schedule, the budget, the choice of modules and the
//! learning-rate multipliers of newborn rows. Plain arithmetic on f64, no tensors.

use crate::errors::{Error, Result};

/// Growth events in an automatic schedule, at most.
const MAX_EVENTS: u64 = 50;
/// Steps between two growth events in an automatic schedule, at least.
const MIN_INTERVAL: u64 = 10;
/// Values nearer to each other than this share of the larger are tied. Far above what the order of float32
/// sums leaves between two ways of computing a score, far below what a score knows of a module.
pub const NEAR: f64 = 1e-5;

/// When and how much the ranks grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Schedule {
    /// Optimizer steps before the first growth (`tinit`).
    pub warmup: u64,
    /// Steps between growth events (`deltaT`); an event happens where the step is a multiple of it.
    pub interval: u64,
    /// Modules that grow at one event.
    pub top_h: u64,
    /// Components that each of them gains.
    pub add_r: u64,
}

impl Schedule {
    /// Is `step` (the first is 1) a step at which ranks grow?
    pub fn is_event(&self, step: u64) -> bool {
        step > self.warmup && step.is_multiple_of(self.interval)
    }

    /// The first event at or after `step`.
    pub fn next_event(&self, step: u64) -> u64 {
        let first = self.warmup / self.interval + 1;
        first.max(step.div_ceil(self.interval)).saturating_mul(self.interval)
    }

    /// The step of event number `n`, the first being 1; 0 for none.
    pub fn event(&self, n: u64) -> u64 {
        match n {
            0 => 0,
            n => (self.warmup / self.interval + n).saturating_mul(self.interval),
        }
    }

    /// Number of events in the steps 1 to `last`.
    pub fn events(&self, last: u64) -> u64 {
        (last / self.interval).saturating_sub(self.warmup / self.interval)
    }
}

/// The values of a schedule that the user fixed; `None` is left to [`plan`].
#[derive(Debug, Clone, Copy)]
pub struct Wish {
    /// See [`Schedule::warmup`].
    pub warmup: Option<u64>,
    /// See [`Schedule::interval`].
    pub interval: Option<u64>,
    /// See [`Schedule::top_h`].
    pub top_h: Option<u64>,
    /// See [`Schedule::add_r`]: the least to add; raised only where `top_h` is free and all modules
    /// together cannot reach the budget.
    pub add_r: u64,
    /// Share of the steps, above 0 and at most 1, by which growth is over. From a `warmup` at or after it on,
    /// growth takes as many steps as it would have taken.
    pub growth_end: f64,
}

/// A schedule and how much of the budget it is sure to spend, whatever modules are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// The schedule.
    pub schedule: Schedule,
    /// What the components are sure to cost by the last step, whatever modules are chosen. The budget
    /// itself stands for all that no further component fits into.
    pub reached: u64,
    /// Cost that no choice of modules passes.
    pub possible: u64,
    /// The step that `growth_end` means.
    pub end: u64,
    /// The step of the last growth, at the latest: after `end` where what is given leaves no other way.
    pub last: u64,
}

/// Makes a schedule for `total_steps` optimizer steps that spends `budget`.
///
/// `ranks` and `caps` hold each module's first rank and the largest it may have, `costs` what a component
/// of it takes of the budget: 1 everywhere where the budget is a total rank. What the user left
/// open is chosen so: warm-up 10 % of the steps, at most half of those until growth is over; events
/// spread evenly until then, at most 50 of them and at least 10 steps apart (closer only where none would
/// lie before the end, as in trainings of fewer than 100 steps); `top_h`, then `add_r`, just large enough
/// that the budget is spent even if only the cheapest modules are chosen.
pub fn plan(
    wish: &Wish,
    total_steps: u64,
    ranks: &[u64],
    caps: &[u64],
    costs: &[u64],
    budget: u64,
) -> Result<Plan> {
    check_modules(ranks, caps, costs)?;
    at_least_one("total_steps", Some(total_steps))?;
    at_least_one("deltaT", wish.interval)?;
    at_least_one("top_h", wish.top_h)?;
    at_least_one("add_r", Some(wish.add_r))?;
    if !(wish.growth_end > 0.0 && wish.growth_end <= 1.0) {
        return Err(Error::Value(format!(
            "growth_end is {}; give a share of the steps, above 0 and at most 1",
            wish.growth_end
        )));
    }
    let start = cost(ranks, costs);
    let unspent = budget.min(cost(caps, costs)).saturating_sub(start);
    // So many components spend it if they are the cheapest; fewer do if they are dearer.
    let open = || (0..ranks.len()).filter(|&k| ranks[k] < caps[k]).map(|k| costs[k]);
    let (cheapest, dearest) = (open().min().unwrap_or(1), open().max().unwrap_or(1));
    let room = (0..ranks.len()).fold(0u64, |sum, k| sum.saturating_add(caps[k] - ranks[k]));
    let need = unspent.div_ceil(cheapest).min(room);

    let mut end = ((total_steps as f64 * wish.growth_end) as u64).clamp(1, total_steps);
    let own_warmup = (total_steps / 10).min(end / 2);
    let warmup = wish.warmup.unwrap_or(own_warmup);
    if warmup >= end {
        end = warmup.saturating_add(end - own_warmup).min(total_steps);
    }
    let interval = wish.interval.unwrap_or_else(|| {
        let wanted = match wish.top_h {
            Some(top_h) => need.div_ceil(top_h.saturating_mul(wish.add_r)),
            None => need.min(MAX_EVENTS),
        };
        let span = end.saturating_sub(warmup);
        fit_interval((span / wanted.max(1)).max(MIN_INTERVAL), warmup, end)
    });
    let mut schedule = Schedule { warmup, interval, top_h: 1, add_r: wish.add_r };
    let all_events = schedule.events(total_steps);
    // Where no multiple of a given interval lies before the end, the first one after it has to do.
    let events = schedule.events(end).max(all_events.min(1));
    match wish.top_h {
        Some(top_h) => schedule.top_h = top_h,
        None => raise_until_reached(&mut schedule, events, need, ranks, caps),
    }
    let gained = worst_case(&schedule, all_events, need, ranks, caps);
    let reached = match gained == need {
        true => start + unspent,
        false => start + unspent.min(gained.saturating_mul(cheapest)),
    };
    let an_event = schedule.top_h.min(ranks.len() as u64).saturating_mul(schedule.add_r);
    let most = all_events.saturating_mul(an_event).saturating_mul(dearest);
    let possible = start + unspent.min(most);
    let needed =
        least(all_events, |events| worst_case(&schedule, events, need, ranks, caps) >= gained);
    let last = schedule.event(needed);
    Ok(Plan { schedule, reached, possible, end, last })
}

/// The least number up to `most` for which `holds`, which holds for all above it and for `most`.
fn least(most: u64, holds: impl Fn(u64) -> bool) -> u64 {
    let (mut below, mut found) = (0, most);
    while below < found {
        let middle = below + (found - below) / 2;
        match holds(middle) {
            true => found = middle,
            false => below = middle + 1,
        }
    }
    found
}

/// What components cost together.
fn cost(ranks: &[u64], costs: &[u64]) -> u64 {
    let each = ranks.iter().zip(costs).map(|(rank, cost)| rank.saturating_mul(*cost));
    each.fold(0, u64::saturating_add)
}

fn at_least_one(name: &str, value: Option<u64>) -> Result<()> {
    if value == Some(0) {
        return Err(Error::Value(format!("{name} is 0; give 1 or more")));
    }
    Ok(())
}

fn check_modules(ranks: &[u64], caps: &[u64], costs: &[u64]) -> Result<()> {
    if costs.len() != ranks.len() {
        return Err(Error::Value(format!(
            "costs has {} entries and ranks {}; give one of each a module",
            costs.len(),
            ranks.len()
        )));
    }
    if costs.contains(&0) {
        return Err(Error::Value("costs has a 0; give 1 or more for each module".into()));
    }
    if ranks.len() != caps.len() {
        return Err(Error::Value(format!(
            "ranks has {} entries and caps {}; give one of each a module",
            ranks.len(),
            caps.len()
        )));
    }
    if let Some(k) = (0..ranks.len()).find(|&k| ranks[k] > caps[k]) {
        return Err(Error::Value(format!(
            "module {k} has rank {}, more than the {} it may have; lower init_r or raise max_r",
            ranks[k], caps[k]
        )));
    }
    Ok(())
}

/// The largest interval, at most `interval`, of which a multiple lies in (warmup, end].
fn fit_interval(interval: u64, warmup: u64, end: u64) -> u64 {
    if end <= warmup {
        return interval;
    }
    (1..=interval.min(end)).rev().find(|i| end / i > warmup / i).unwrap_or(1)
}

fn raise_until_reached(
    schedule: &mut Schedule,
    events: u64,
    need: u64,
    ranks: &[u64],
    caps: &[u64],
) {
    let modules = ranks.len() as u64;
    if events == 0 || need == 0 {
        return;
    }
    schedule.add_r = schedule.add_r.max(need.div_ceil(events.saturating_mul(modules)));
    schedule.top_h = need.div_ceil(events.saturating_mul(schedule.add_r)).min(modules);
    while worst_case(schedule, events, need, ranks, caps) < need {
        if schedule.top_h < modules {
            schedule.top_h = (schedule.top_h + schedule.top_h.div_ceil(8)).min(modules);
        } else {
            schedule.add_r += schedule.add_r.div_ceil(8);
        }
    }
}

/// A lower bound on the components that `events` events gain, up to `need`, whichever modules are chosen.
///
/// Exact where every module with room grows at each event. Else, while `need` is not met: at most
/// `finished` modules are full, and an event at which fewer than `top_h` have room grows each that is
/// open at the end, so there are fewer such events than the longest module has growths.
fn worst_case(schedule: &Schedule, events: u64, need: u64, ranks: &[u64], caps: &[u64]) -> u64 {
    let Schedule { top_h, add_r, .. } = *schedule;
    let mut room: Vec<u64> = caps
        .iter()
        .zip(ranks)
        .map(|(cap, rank)| (cap - rank).min(need))
        .filter(|&n| n > 0)
        .collect();
    if room.is_empty() || events == 0 {
        return 0;
    }
    room.sort_unstable();
    let modules = room.len() as u64;
    if top_h >= modules {
        let most = add_r.saturating_mul(events);
        return room.iter().fold(0u64, |sum, &n| sum.saturating_add(n.min(most))).min(need);
    }
    let mut filled = 0u64;
    let finished = room
        .iter()
        .take_while(|&&n| {
            filled = filled.saturating_add(n);
            filled < need
        })
        .count();
    let open = modules - finished as u64;
    let longest = room.last().map_or(0, |n| n.div_ceil(add_r));
    let short = if open >= top_h { 0 } else { events.min(longest - 1) };
    // The last growth of a module may be smaller than add_r.
    let mut missing: Vec<u64> = room.iter().map(|n| (add_r - n % add_r) % add_r).collect();
    missing.sort_unstable_by(|a, b| b.cmp(a));
    let lost = missing[..finished].iter().fold(0u64, |sum, &n| sum.saturating_add(n));
    let growths = top_h.saturating_mul(events - short).saturating_add(short.saturating_mul(open));
    growths.saturating_mul(add_r).saturating_sub(lost).min(need)
}

/// Growth of one module at one event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Growth {
    /// Index of the module in model order.
    pub module: usize,
    /// Components that it gains.
    pub components: u64,
}

/// Chooses who grows at an event: the `top_h` modules of highest score for their cost that have room,
/// each by `add_r`, never past a cap nor past `budget`.
///
/// Of the values within [`NEAR`] of the best that is left, the module that comes first in model order is
/// next, so that what rounding makes of equal modules decides nothing; any two values further apart go by
/// value. A score that is not a number counts as the lowest. Where the budget leaves less than the whole event, the event is the last: what is
/// left goes to the modules that it still pays for, best first, until it pays for none. With costs of 1 the
/// last module chosen gains fewer components, and those after it none.
pub fn choose(
    schedule: &Schedule,
    scores: &[f64],
    ranks: &[u64],
    caps: &[u64],
    costs: &[u64],
    budget: u64,
) -> Result<Vec<Growth>> {
    check_modules(ranks, caps, costs)?;
    if scores.len() != ranks.len() {
        return Err(Error::Value(format!(
            "scores has {} entries and ranks {}; give one of each a module",
            scores.len(),
            ranks.len()
        )));
    }
    let values: Vec<f64> = scores.iter().zip(costs).map(|(s, &cost)| s / cost as f64).collect();
    let order = best_first((0..ranks.len()).filter(|&k| ranks[k] < caps[k]).collect(), &values);
    let mut purse = Purse { left: budget.saturating_sub(cost(ranks, costs)), grown: Vec::new() };
    let top_h = usize::try_from(schedule.top_h).unwrap_or(usize::MAX);
    let mut last = false;
    for &module in order.iter().take(top_h) {
        let wanted = schedule.add_r.min(caps[module] - ranks[module]);
        last |= purse.buy(module, wanted, costs[module]) < wanted;
    }
    while last {
        let before = purse.left;
        for &module in &order {
            let room = caps[module] - ranks[module] - purse.gained(module);
            purse.buy(module, schedule.add_r.min(room), costs[module]);
        }
        last = purse.left < before;
    }
    Ok(purse.grown)
}

/// The modules `open` in the order in which [`choose`] takes them.
fn best_first(mut open: Vec<usize>, values: &[f64]) -> Vec<usize> {
    let value = |k: usize| if values[k].is_nan() { f64::NEG_INFINITY } else { values[k] + 0.0 };
    open.sort_by(|&a, &b| value(b).total_cmp(&value(a)));
    let mut rest = open.as_mut_slice();
    while let Some(&first) = rest.first() {
        let best = value(first);
        let tied = rest.partition_point(|&k| is_near(best, value(k)));
        let (group, after) = rest.split_at_mut(tied);
        group.sort_unstable();
        rest = after;
    }
    open
}

/// Is `value`, at most `best`, tied with it?
fn is_near(best: f64, value: f64) -> bool {
    value == best || (best.is_finite() && best - value <= NEAR * best.abs())
}

/// What is left of a budget during an event, and what it has bought.
struct Purse {
    left: u64,
    grown: Vec<Growth>,
}

impl Purse {
    /// Gives `module` up to `wanted` components at `cost`; how many it could pay for.
    fn buy(&mut self, module: usize, wanted: u64, cost: u64) -> u64 {
        let components = wanted.min(self.left / cost);
        self.left -= components * cost;
        match self.grown.iter_mut().find(|growth| growth.module == module) {
            Some(growth) => growth.components += components,
            None if components > 0 => self.grown.push(Growth { module, components }),
            None => {}
        }
        components
    }

    fn gained(&self, module: usize) -> u64 {
        self.grown
            .iter()
            .find(|growth| growth.module == module)
            .map_or(0, |growth| growth.components)
    }
}

/// The smallest n with `max(beta1, beta2)^n < 1e-3`: an importance older than that weighs nothing.
pub fn window(beta1: f64, beta2: f64) -> u64 {
    let beta = beta1.max(beta2);
    if beta <= 0.0 {
        return 1;
    }
    let mut steps = ((1e-3_f64).ln() / beta.ln()).floor().max(1.0) as u64;
    while beta.powf(steps as f64) >= 1e-3 {
        steps += 1;
    }
    steps
}

/// The learning-rate schedule as far as the restart warm-up needs it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LearningRate {
    /// The multiplier m(t) that the optimizer just used: learning rate over initial learning rate.
    pub multiplier: f64,
    /// Length of the linear warm-up in optimizer steps.
    pub warmup: u64,
    /// The step at which a linear decay reaches 0; `None` for every other schedule.
    pub linear_until: Option<u64>,
}

/// What a row born at step `birth` uses of the learning rate at step `step`, over what the
/// parameter as a whole used: `m_new / m`. 1 for rows that were there from the start.
pub fn restart_ratio(lr: &LearningRate, birth: u64, step: u64) -> f64 {
    if birth == 0 {
        return 1.0;
    }
    if lr.multiplier <= 0.0 {
        return 0.0;
    }
    let age = step.saturating_sub(birth);
    let climb = age as f64 / lr.warmup as f64;
    match lr.linear_until {
        Some(_) if age < lr.warmup => climb / lr.multiplier,
        Some(end) => {
            let left = end.saturating_sub(step) as f64;
            let whole = end.saturating_sub(birth + lr.warmup) as f64;
            if whole > 0.0 {
                left / whole / lr.multiplier
            } else {
                0.0
            }
        }
        None if age < lr.warmup => climb,
        None => 1.0,
    }
}

/// Adam corrects the bias of its moments by the step count of the whole parameter; a row whose
/// moments started at `birth` needs this factor on its update besides (exact up to Adam's eps).
/// `betas` are Adam's; the parameter's step count is `step + lead`.
pub fn adam_ratio(betas: (f64, f64), birth: u64, step: u64, lead: u64) -> f64 {
    let age = step.saturating_sub(birth);
    if birth == 0 || age == 0 {
        return 1.0;
    }
    let left = |beta: f64, steps: u64| 1.0 - beta.powf(steps as f64);
    let all = step + lead;
    let second = (left(betas.1, age) / left(betas.1, all)).sqrt();
    second * left(betas.0, all) / left(betas.0, age)
}

#[cfg(test)]
mod tests;
