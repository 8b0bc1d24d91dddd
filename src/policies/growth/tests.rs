//! What the allocation promises, as properties.

use super::*;
use proptest::prelude::*;

mod cases;
mod costs;
mod learning_rate;
mod ties;

const AUTOMATIC: Wish =
    Wish { warmup: None, interval: None, top_h: None, add_r: 1, growth_end: 0.6 };

/// As [`super::plan`], of a budget that is a total rank.
fn plan(wish: &Wish, steps: u64, ranks: &[u64], caps: &[u64], budget: u64) -> Result<Plan> {
    super::plan(wish, steps, ranks, caps, &vec![1; ranks.len()], budget)
}

/// As [`super::choose`], of a budget that is a total rank.
fn choose(
    schedule: &Schedule,
    scores: &[f64],
    ranks: &[u64],
    caps: &[u64],
    budget: u64,
) -> Result<Vec<Growth>> {
    super::choose(schedule, scores, ranks, caps, &vec![1; ranks.len()], budget)
}

/// The message of a refusal.
fn complaint<T: std::fmt::Debug>(result: Result<T>) -> String {
    result.unwrap_err().to_string()
}

/// Random numbers from a seed (splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// Scores of few values, so that many are equal, some not a number, some infinite.
    fn scores(&mut self, count: usize) -> Vec<f64> {
        let score = |n| match n {
            0 => f64::NAN,
            1 => f64::INFINITY,
            n => n as f64,
        };
        (0..count).map(|_| score(self.below(12))).collect()
    }
}

/// Modules and the total rank that they are to reach.
#[derive(Debug, Clone)]
struct Model {
    ranks: Vec<u64>,
    caps: Vec<u64>,
    budget: u64,
}

impl Model {
    fn new(modules: usize, room: u64, seed: u64) -> Self {
        let mut random = Random(seed);
        let ranks: Vec<u64> = (0..modules).map(|_| random.below(4)).collect();
        let caps: Vec<u64> = ranks.iter().map(|rank| rank + random.below(room + 1)).collect();
        let most: u64 = caps.iter().sum();
        // Two of three budgets ask for every component that there can be.
        let budget = if random.below(3) > 0 { most } else { random.below(most + 1) };
        Self { ranks, caps, budget }
    }

    fn total(&self) -> u64 {
        self.ranks.iter().sum()
    }

    /// The largest total rank that there can be at the end.
    fn goal(&self) -> u64 {
        self.budget.min(self.caps.iter().sum()).max(self.total())
    }

    fn plan(&self, wish: &Wish, steps: u64) -> Plan {
        plan(wish, steps, &self.ranks, &self.caps, self.budget).unwrap()
    }

    fn choose(&self, schedule: &Schedule, scores: &[f64]) -> Vec<Growth> {
        choose(schedule, scores, &self.ranks, &self.caps, self.budget).unwrap()
    }

    fn grow(&mut self, grown: &[Growth]) {
        grown.iter().for_each(|growth| self.ranks[growth.module] += growth.components);
    }

    /// Lives through the events until `last`; `scores` gives those of an event.
    fn train(&mut self, plan: &Plan, last: u64, mut scores: impl FnMut(&Self) -> Vec<f64>) {
        let mut step = plan.schedule.next_event(1);
        while step <= last && self.total() < self.goal() {
            let grown = self.choose(&plan.schedule, &scores(self));
            self.grow(&grown);
            step = plan.schedule.next_event(step + 1);
        }
    }

    /// The least total rank after `events` events over every choice of modules.
    fn least(&self, schedule: &Schedule, events: u64) -> u64 {
        let open: Vec<usize> =
            (0..self.ranks.len()).filter(|&k| self.ranks[k] < self.caps[k]).collect();
        if events == 0 || open.is_empty() {
            return self.total().min(self.goal());
        }
        let size = open.len().min(schedule.top_h as usize) as u32;
        (0u32..1 << open.len())
            .filter(|set| set.count_ones() == size)
            .map(|set| {
                let mut next = self.clone();
                for k in open.iter().enumerate().filter(|(i, _)| set >> i & 1 == 1) {
                    let k = *k.1;
                    next.ranks[k] = next.caps[k].min(next.ranks[k] + schedule.add_r);
                }
                next.least(schedule, events - 1).min(self.goal())
            })
            .min()
            .unwrap()
    }
}

/// Modules with room, best first, as the spec orders them.
fn order(model: &Model, scores: &[f64]) -> Vec<usize> {
    let better = |a: usize, b: usize| {
        let (a, b) = (scores[a], scores[b]);
        a > b || (b.is_nan() && !a.is_nan())
    };
    let mut open: Vec<usize> = Vec::new();
    for k in (0..scores.len()).filter(|&k| model.ranks[k] < model.caps[k]) {
        let place = open.iter().position(|&other| better(k, other)).unwrap_or(open.len());
        open.insert(place, k);
    }
    open
}

/// Scores by which the widest module waits while the others shrink alike, so that it is soon alone.
fn one_waits(model: &Model) -> Vec<f64> {
    let room = |k: usize| model.caps[k] - model.ranks[k];
    let widest = (0..model.caps.len()).max_by_key(|&k| model.caps[k]);
    let score = |k| if Some(k) == widest { -1.0 } else { room(k) as f64 };
    (0..model.caps.len()).map(score).collect()
}

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases,
        failure_persistence: None,
        max_global_rejects: 4 * cases,
        ..ProptestConfig::default()
    }
}

/// 1 to `most`, each order of magnitude as likely as another.
fn magnitudes(most: u64) -> impl Strategy<Value = u64> {
    (0.0..=(most as f64).ln()).prop_map(move |ln| (ln.exp().round() as u64).clamp(1, most))
}

fn models(most: u64, room: u64) -> impl Strategy<Value = Model> {
    (magnitudes(most), magnitudes(room), any::<u64>())
        .prop_map(|(modules, room, seed)| Model::new(modules as usize, room, seed))
}

fn small() -> impl Strategy<Value = (Model, Schedule)> {
    (models(40, 6), 1u64..8, 1u64..4).prop_map(|(model, top_h, add_r)| {
        (model, Schedule { warmup: 0, interval: 1, top_h, add_r })
    })
}

proptest! {
    #![proptest_config(config(1000))]

    #[test]
    fn automatic_growth_meets_the_budget_exactly(
        mut model in models(5_000, 768), steps in magnitudes(1_000_000), seed: u64,
    ) {
        let plan = model.plan(&AUTOMATIC, steps);
        let mut random = Random(seed);
        model.train(&plan, steps, |model| random.scores(model.ranks.len()));
        prop_assert_eq!(model.total(), model.goal());
    }

    #[test]
    fn automatic_growth_meets_the_budget_even_if_a_module_waits(
        mut model in models(5_000, 768), steps in magnitudes(1_000_000),
    ) {
        let plan = model.plan(&AUTOMATIC, steps);
        model.train(&plan, steps, one_waits);
        prop_assert_eq!(model.total(), model.goal());
    }

    #[test]
    fn automatic_growth_promises_the_budget(
        model in models(5_000, 768), steps in magnitudes(1_000_000),
    ) {
        prop_assert_eq!(model.plan(&AUTOMATIC, steps).reached, model.goal());
    }

    #[test]
    fn automatic_growth_is_over_in_time(
        mut model in models(500, 64),
        steps in magnitudes(100_000),
        growth_end in 0.01..=1.0,
        seed: u64,
    ) {
        let plan = model.plan(&Wish { growth_end, ..AUTOMATIC }, steps);
        let mut random = Random(seed);
        let end = ((steps as f64 * growth_end) as u64).max(1);
        model.train(&plan, end, |model| random.scores(model.ranks.len()));
        prop_assert_eq!(model.total(), model.goal());
    }

    #[test]
    fn automatic_warm_up_is_a_tenth_of_the_steps(
        model in models(500, 64), more in magnitudes(1_000_000),
    ) {
        prop_assert_eq!(model.plan(&AUTOMATIC, 1 + more).schedule.warmup, (1 + more) / 10);
        let early = Wish { growth_end: 0.1, ..AUTOMATIC };
        prop_assert_eq!(model.plan(&early, 20 * more).schedule.warmup, more);
    }

    #[test]
    fn automatic_events_are_ten_steps_apart_where_the_run_is_long_enough(
        model in models(500, 64), more in magnitudes(1_000_000),
    ) {
        prop_assert!(model.plan(&AUTOMATIC, 19 + more).schedule.interval >= 10);
    }

    #[test]
    fn open_values_make_up_for_the_given_ones(
        mut model in models(60, 12),
        steps in magnitudes(2_000),
        warmup in prop::option::of(0.0..1.0),
        interval in prop::option::of(1u64..300),
        add_r in 1u64..5,
    ) {
        let warmup = warmup.map(|share| (share * steps as f64) as u64);
        let wish = Wish { warmup, interval, top_h: None, add_r, ..AUTOMATIC };
        let plan = model.plan(&wish, steps);
        prop_assume!(plan.schedule.next_event(1) <= steps);
        model.train(&plan, steps, one_waits);
        prop_assert_eq!(model.total(), model.goal());
    }

    #[test]
    fn growth_is_over_at_the_last_event_that_is_foretold(
        mut model in models(60, 12),
        steps in magnitudes(2_000),
        warmup in prop::option::of(0.0..1.0),
        interval in prop::option::of(1u64..300),
        top_h in prop::option::of(1u64..80),
        growth_end in 0.01..=1.0,
        seed: u64,
    ) {
        let warmup = warmup.map(|share| (share * steps as f64) as u64);
        let wish = Wish { warmup, interval, top_h, growth_end, ..AUTOMATIC };
        let plan = model.plan(&wish, steps);
        prop_assume!(plan.reached == model.goal());
        let mut random = Random(seed);
        model.train(&plan, plan.last, |model| random.scores(model.ranks.len()));
        prop_assert_eq!(model.total(), model.goal());
        prop_assert!(plan.last == 0 || plan.schedule.is_event(plan.last));
        prop_assert!(plan.last <= steps && plan.end <= steps);
        if interval.is_none() && top_h.is_none() {
            prop_assert!(plan.last <= plan.end);
        }
    }

    #[test]
    fn given_values_are_kept(
        model in models(60, 12),
        steps in magnitudes(2_000),
        warmup in 0u64..2_000,
        interval in 1u64..300,
        top_h in 1u64..80,
        add_r in 1u64..5,
    ) {
        let wish =
            Wish { warmup: Some(warmup), interval: Some(interval), top_h: Some(top_h), add_r, ..AUTOMATIC };
        let given = Schedule { warmup, interval, top_h, add_r };
        prop_assert_eq!(model.plan(&wish, steps).schedule, given);
    }

    #[test]
    fn a_given_schedule_grows_to_what_it_promises_at_least(
        mut model in models(60, 12),
        steps in magnitudes(2_000),
        interval in 1u64..300,
        top_h in 1u64..80,
        add_r in 1u64..5,
        seed: u64,
    ) {
        let wish = Wish { warmup: None, interval: Some(interval), top_h: Some(top_h), add_r, ..AUTOMATIC };
        let plan = model.plan(&wish, steps);
        let mut random = Random(seed);
        model.train(&plan, steps, |model| random.scores(model.ranks.len()));
        prop_assert!(model.total() >= plan.reached);
    }

    #[test]
    fn nothing_grows_in_the_warm_up(model in models(60, 12), steps in magnitudes(1_000)) {
        let schedule = model.plan(&AUTOMATIC, steps).schedule;
        prop_assert!((1..=schedule.warmup).all(|step| !schedule.is_event(step)));
    }

    #[test]
    fn the_next_event_is_the_first_of_the_steps_that_are(
        warmup in 0u64..120, interval in 1u64..60, from in 1u64..300,
    ) {
        let schedule = Schedule { warmup, interval, top_h: 1, add_r: 1 };
        let first = (from..).find(|&step| schedule.is_event(step));
        prop_assert_eq!(Some(schedule.next_event(from)), first);
    }

    #[test]
    fn an_event_is_a_multiple_of_the_interval_past_the_warm_up(
        warmup in 0u64..120, interval in 1u64..60, step in 1u64..300,
    ) {
        let schedule = Schedule { warmup, interval, top_h: 1, add_r: 1 };
        let multiple = (1..=step).any(|n| n * interval == step);
        prop_assert_eq!(schedule.is_event(step), multiple && step > warmup);
    }

    #[test]
    fn events_are_counted_as_they_happen(
        warmup in 0u64..120, interval in 1u64..60, last in 0u64..300,
    ) {
        let schedule = Schedule { warmup, interval, top_h: 1, add_r: 1 };
        let count = (1..=last).filter(|&step| schedule.is_event(step)).count();
        prop_assert_eq!(schedule.events(last), count as u64);
    }

    #[test]
    fn growth_never_passes_the_budget((model, schedule) in small(), seed: u64) {
        let mut grown = model.clone();
        grown.grow(&model.choose(&schedule, &Random(seed).scores(model.ranks.len())));
        prop_assert!(grown.total() <= model.budget.max(model.total()));
    }

    #[test]
    fn growth_never_passes_a_cap((mut model, schedule) in small(), seed: u64) {
        model.grow(&model.choose(&schedule, &Random(seed).scores(model.ranks.len())));
        prop_assert!(model.ranks.iter().zip(&model.caps).all(|(rank, cap)| rank <= cap));
    }

    #[test]
    fn the_best_modules_with_room_grow_in_order((model, schedule) in small(), seed: u64) {
        let scores = Random(seed).scores(model.ranks.len());
        let grown: Vec<usize> =
            model.choose(&schedule, &scores).iter().map(|growth| growth.module).collect();
        prop_assert_eq!(&grown[..], &order(&model, &scores)[..grown.len()]);
    }

    #[test]
    fn exactly_top_h_modules_grow_while_the_budget_lasts(
        (model, schedule) in small(), seed: u64,
    ) {
        let scores = Random(seed).scores(model.ranks.len());
        let grown = model.choose(&schedule, &scores);
        let spent = model.total() + grown.iter().map(|growth| growth.components).sum::<u64>();
        let full = (schedule.top_h as usize).min(order(&model, &scores).len());
        prop_assert!(grown.len() == full || spent >= model.budget);
    }

    #[test]
    fn each_module_gains_add_r_or_what_its_cap_or_the_budget_leaves(
        (model, schedule) in small(), seed: u64,
    ) {
        let mut left = model.budget.saturating_sub(model.total());
        for Growth { module, components } in
            model.choose(&schedule, &Random(seed).scores(model.ranks.len()))
        {
            let room = model.caps[module] - model.ranks[module];
            prop_assert_eq!(components, schedule.add_r.min(room).min(left));
            left -= components;
        }
    }

    #[test]
    fn no_growth_is_empty((model, schedule) in small(), seed: u64) {
        let grown = model.choose(&schedule, &Random(seed).scores(model.ranks.len()));
        prop_assert!(grown.iter().all(|growth| growth.components > 0));
    }

    #[test]
    fn the_window_is_the_smallest(beta1 in 0.0..0.9999, beta2 in 0.0..0.9999) {
        let beta: f64 = f64::max(beta1, beta2);
        let mut weight = beta;
        let mut steps = 1;
        while weight >= 1e-3 {
            weight *= beta;
            steps += 1;
        }
        prop_assert_eq!(window(beta1, beta2), steps);
    }
}

fn four_modules() -> impl Iterator<Item = Model> {
    (0..256u64).map(|rooms| {
        let caps: Vec<u64> = (0..4).map(|k| 1 + (rooms >> (2 * k) & 3)).collect();
        Model { ranks: vec![1; 4], budget: caps.iter().sum(), caps }
    })
}

#[test]
fn no_choice_grows_less_than_promised() {
    for (top_h, add_r) in (1..4).flat_map(|top_h| (1..4).map(move |add_r| (top_h, add_r))) {
        let wish =
            Wish { warmup: Some(0), interval: Some(1), top_h: Some(top_h), add_r, ..AUTOMATIC };
        for (model, events) in four_modules().flat_map(|m| (1..5).map(move |n| (m.clone(), n))) {
            let plan = model.plan(&wish, events);
            let least = model.least(&plan.schedule, events);
            assert!(plan.reached <= least, "{model:?}, {events} events: {plan:?}, but {least}");
        }
    }
}

#[test]
fn an_open_top_h_makes_sure_of_the_budget_whatever_is_chosen() {
    let wish = Wish { warmup: Some(3), interval: Some(1), ..AUTOMATIC };
    for (model, events) in four_modules().flat_map(|m| (1..5).map(move |n| (m.clone(), n))) {
        let schedule = model.plan(&wish, 3 + events).schedule;
        let least = model.least(&schedule, events);
        assert_eq!(least, model.goal(), "{model:?}, {events} events of {schedule:?}");
    }
}
