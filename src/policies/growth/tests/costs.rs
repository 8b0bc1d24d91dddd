//! The same where a component of one module costs more than one of another.

use super::*;

/// A model whose budget and costs are in a unit of their own.
#[derive(Debug, Clone)]
struct Priced {
    model: Model,
    costs: Vec<u64>,
}

impl Priced {
    fn new(model: Model, dearest: u64, seed: u64) -> Self {
        let mut random = Random(seed);
        let costs: Vec<u64> = model.ranks.iter().map(|_| 1 + random.below(dearest)).collect();
        let most = cost(&model.caps, &costs);
        let budget = if random.below(3) > 0 { random.below(most + 1) } else { most };
        Self { model: Model { budget, ..model }, costs }
    }

    fn plan(&self, wish: &Wish, steps: u64) -> Plan {
        let Model { ranks, caps, budget } = &self.model;
        super::super::plan(wish, steps, ranks, caps, &self.costs, *budget).unwrap()
    }

    fn choose(&self, schedule: &Schedule, scores: &[f64]) -> Vec<Growth> {
        let Model { ranks, caps, budget } = &self.model;
        super::super::choose(schedule, scores, ranks, caps, &self.costs, *budget).unwrap()
    }

    fn spent(&self) -> u64 {
        cost(&self.model.ranks, &self.costs)
    }

    /// Is there a component that the budget still pays for?
    fn one_fits(&self) -> bool {
        let Model { ranks, caps, budget } = &self.model;
        let left = budget.saturating_sub(self.spent());
        (0..ranks.len()).any(|k| ranks[k] < caps[k] && self.costs[k] <= left)
    }

    /// Lives through the events until `last`; `scores` gives those of an event.
    fn train(&mut self, plan: &Plan, last: u64, mut scores: impl FnMut(&Self) -> Vec<f64>) {
        let mut step = plan.schedule.next_event(1);
        while step <= last && self.one_fits() {
            let grown = self.choose(&plan.schedule, &scores(self));
            self.model.grow(&grown);
            step = plan.schedule.next_event(step + 1);
        }
    }
}

fn priced(most: u64, room: u64) -> impl Strategy<Value = Priced> {
    (models(most, room), magnitudes(40_000), any::<u64>())
        .prop_map(|(model, dearest, seed)| Priced::new(model, dearest, seed))
}

proptest! {
    #![proptest_config(config(1000))]

    #[test]
    fn automatic_growth_spends_the_budget_to_the_last_component_that_fits(
        mut priced in priced(1_000, 768), more in magnitudes(100_000), seed: u64,
    ) {
        let steps = 19 + more;
        let plan = priced.plan(&AUTOMATIC, steps);
        let mut random = Random(seed);
        priced.train(&plan, steps * 3 / 5, |priced| random.scores(priced.costs.len()));
        prop_assert!(!priced.one_fits());
    }

    #[test]
    fn automatic_growth_spends_it_even_if_only_the_cheapest_are_chosen(
        mut priced in priced(1_000, 768), more in magnitudes(100_000),
    ) {
        let steps = 19 + more;
        let plan = priced.plan(&AUTOMATIC, steps);
        let cheap = |priced: &Priced| priced.costs.iter().map(|&cost| 1.0 / cost as f64).collect();
        priced.train(&plan, steps * 3 / 5, cheap);
        prop_assert!(!priced.one_fits());
    }

    #[test]
    fn an_event_never_passes_the_budget_nor_a_cap(
        mut priced in priced(40, 6), top_h in 1u64..8, add_r in 1u64..4, seed: u64,
    ) {
        let schedule = Schedule { warmup: 0, interval: 1, top_h, add_r };
        let before = priced.spent();
        let grown = priced.choose(&schedule, &Random(seed).scores(priced.costs.len()));
        priced.model.grow(&grown);
        prop_assert!(priced.spent() <= before.max(priced.model.budget));
        prop_assert!((0..priced.costs.len()).all(|k| priced.model.ranks[k] <= priced.model.caps[k]));
        prop_assert!(grown.iter().all(|growth| growth.components > 0));
        let mut modules: Vec<usize> = grown.iter().map(|growth| growth.module).collect();
        modules.sort_unstable();
        modules.dedup();
        prop_assert_eq!(modules.len(), grown.len());
    }

    #[test]
    fn a_given_schedule_spends_what_it_promises_at_least(
        mut priced in priced(60, 12),
        steps in magnitudes(2_000),
        interval in 1u64..300,
        top_h in 1u64..80,
        add_r in 1u64..5,
        seed: u64,
    ) {
        let wish = Wish { warmup: None, interval: Some(interval), top_h: Some(top_h), add_r, ..AUTOMATIC };
        let plan = priced.plan(&wish, steps);
        let mut random = Random(seed);
        priced.train(&plan, steps, |priced| random.scores(priced.costs.len()));
        prop_assert!(priced.spent() >= plan.reached || !priced.one_fits());
        prop_assert!(priced.spent() <= plan.possible.max(plan.reached));
    }

    #[test]
    fn costs_of_one_change_nothing((model, schedule) in small(), seed: u64) {
        let scores = Random(seed).scores(model.ranks.len());
        let doubled = Model { budget: 2 * model.budget, ..model.clone() };
        let twice = Priced { costs: vec![2; model.ranks.len()], model: doubled };
        prop_assert_eq!(twice.choose(&schedule, &scores), model.choose(&schedule, &scores));
    }
}

fn chosen(scores: &[f64], costs: &[u64], budget: u64, top_h: u64) -> Vec<(usize, u64)> {
    let schedule = Schedule { warmup: 0, interval: 1, top_h, add_r: 1 };
    let (ranks, caps) = (vec![0; scores.len()], vec![9; scores.len()]);
    let model = Model { ranks, caps, budget };
    let grown = Priced { model, costs: costs.to_vec() }.choose(&schedule, scores);
    grown.iter().map(|growth| (growth.module, growth.components)).collect()
}

#[test]
fn the_score_for_the_cost_decides() {
    // 6 / 3, 5 / 1, 9 / 4.
    assert_eq!(chosen(&[6.0, 5.0, 9.0], &[3, 1, 4], 100, 2), [(1, 1), (2, 1)]);
}

#[test]
fn what_does_not_fit_yields_to_what_does_until_nothing_does() {
    // 10 pays for the best; of the 3 left module 2 is too dear, and module 1 takes two more events' worth.
    assert_eq!(chosen(&[70.0, 1.0, 8.0], &[7, 1, 4], 10, 2), [(0, 1), (1, 3)]);
}

#[test]
fn a_budget_below_every_cost_buys_nothing() {
    assert_eq!(chosen(&[1.0, 2.0], &[5, 7], 4, 2), []);
}

#[test]
fn a_plan_counts_on_the_cheapest() {
    // Of 39 the two modules of rank 1 cost 13: 26 are left, 9 components of 3, in 5 events of 2.
    let plan = super::super::plan(
        &Wish { interval: Some(1), warmup: Some(0), ..AUTOMATIC },
        9,
        &[1, 1],
        &[20, 20],
        &[3, 10],
        39,
    );
    let plan = plan.unwrap();
    assert_eq!((plan.schedule.top_h, plan.schedule.add_r), (2, 1));
    assert_eq!((plan.reached, plan.possible), (39, 39));
}

#[test]
fn a_plan_that_is_too_short_says_what_it_spends() {
    let wish = Wish { warmup: Some(0), interval: Some(50), top_h: Some(1), ..AUTOMATIC };
    let plan = super::super::plan(&wish, 100, &[1, 1], &[8, 8], &[3, 10], 100).unwrap();
    // 13 at the start, and two components of 3 at least, of 10 at most.
    assert_eq!((plan.reached, plan.possible), (19, 33));
}

#[test]
fn wrong_costs_are_refused_by_name() {
    let refused =
        |costs: &[u64]| complaint(super::super::plan(&AUTOMATIC, 9, &[1, 1], &[4, 4], costs, 4));
    assert!(refused(&[1]).contains("costs has 1 entries and ranks 2"));
    assert!(refused(&[1, 0]).contains("costs has a 0"));
}
