use super::*;
use proptest::prelude::*;

fn chosen(
    ranks: &[u64],
    costs: &[u64],
    values: &[f64],
    judged: &[bool],
    budget: u64,
    most: u64,
    margin: f64,
) -> Moves {
    let caps = vec![100; ranks.len()];
    let modules = Modules { ranks, caps: &caps, costs };
    let components = Components { values, judged, grown: judged };
    choose(&modules, &components, &Bounds { budget, most, margin }).unwrap()
}

const JUDGED: [bool; 6] = [true; 6];

#[test]
fn the_least_worth_makes_room_for_the_module_worth_most() {
    // Module 2 is expected to be worth 9, then 9 / 2, then 3; the others have 1, 2, 4 and 4 to offer.
    let moves = chosen(&[2, 2, 2], &[1; 3], &[1.0, 4.0, 2.0, 4.0, 9.0, 9.0], &JUDGED, 6, 6, 1.0);
    assert_eq!(moves, Moves { removed: vec![0, 2], gained: vec![0, 0, 2] });
}

#[test]
fn no_more_moves_than_allowed() {
    let moves = chosen(&[2, 2, 2], &[1; 3], &[1.0, 4.0, 2.0, 4.0, 9.0, 9.0], &JUDGED, 6, 1, 1.0);
    assert_eq!(moves, Moves { removed: vec![0], gained: vec![0, 0, 1] });
}

#[test]
fn a_component_has_to_be_expected_to_be_worth_the_margin() {
    // 9 is 4.5 times the 2, and twice that is too much for the next, 9 / 2.
    let of = |margin| {
        chosen(&[2, 2, 2], &[1; 3], &[2.0, 4.0, 2.5, 4.0, 9.0, 9.0], &JUDGED, 6, 6, margin).removed
    };
    assert_eq!((of(5.0), of(4.0), of(1.0)), (vec![], vec![0], vec![0, 2]));
}

#[test]
fn worth_counts_for_its_cost() {
    // 6 for 3 is less than 3 for 1, and its room is enough for three.
    let moves = chosen(&[1, 1], &[3, 1], &[6.0, 3.0], &[true; 2], 4, 4, 1.0);
    assert_eq!(moves, Moves { removed: vec![0], gained: vec![0, 3] });
    // 12 for 3 is more, but what leaves for it is not enough room.
    let moves = chosen(&[1, 1], &[3, 1], &[12.0, 3.0], &[true; 2], 4, 4, 1.0);
    assert_eq!(moves, Moves { removed: vec![], gained: vec![0, 0] });
}

#[test]
fn a_newborn_neither_leaves_nor_speaks() {
    let moves = chosen(&[2, 1], &[1; 2], &[5.0, 0.0, 1.0], &[true, false, true], 3, 3, 1.0);
    assert_eq!(moves, Moves { removed: vec![2], gained: vec![1, 0] });
}

#[test]
fn one_that_still_learns_may_leave_but_does_not_speak() {
    let modules = Modules { ranks: &[2, 2], caps: &[9; 2], costs: &[1; 2] };
    let of = |grown: &[bool]| {
        let components = Components { values: &[8.0, 0.5, 2.0, 2.0], judged: &[true; 4], grown };
        choose(&modules, &components, &Bounds { budget: 4, most: 1, margin: 2.0 }).unwrap()
    };
    // By the 8 alone the first module has room for one of the other's, by its quartile 2.375 it has not.
    assert_eq!(of(&[true, false, true, true]), Moves { removed: vec![2], gained: vec![1, 0] });
    assert_eq!(of(&[true; 4]), Moves { removed: vec![], gained: vec![0, 0] });
    // Where none is grown all speak.
    assert_eq!(of(&[false, false, true, true]), of(&[true; 4]));
}

#[test]
fn what_is_over_the_budget_leaves() {
    let moves = chosen(&[2, 2], &[1; 2], &[1.0, 4.0, 3.0, 2.0], &[true; 4], 2, 0, 1.0);
    assert_eq!(moves, Moves { removed: vec![0, 3], gained: vec![0, 0] });
}

#[test]
fn room_is_given_away() {
    let moves = chosen(&[1, 1], &[1; 2], &[1.0, 8.0], &[true; 2], 4, 4, 1.0);
    // 8, then 4, for which there is room; then 8 / 3, for which the 1 leaves; then 2, and nothing is left.
    assert_eq!(moves, Moves { removed: vec![0], gained: vec![0, 3] });
}

#[test]
fn a_quartile_lies_between_its_neighbours() {
    let of = |values: &[f64]| {
        let all: Vec<_> = values.iter().map(|&value| (value, 0, 0)).collect();
        lower_quartile(&all)
    };
    assert_eq!((of(&[]), of(&[3.0]), of(&[0.0, 4.0]), of(&[0.0, 4.0, 8.0])), (0.0, 3.0, 1.0, 2.0));
}

#[test]
fn bad_numbers_are_named() {
    let modules = Modules { ranks: &[1], caps: &[1], costs: &[1] };
    let bounds = Bounds { budget: 1, most: 1, margin: 1.0 };
    let of = |values, judged, grown, bounds| {
        choose(&modules, &Components { values, judged, grown }, bounds).unwrap_err().to_string()
    };
    let error = of(&[f64::NAN], &[true], &[true], &bounds);
    assert!(error.contains("values[0] is NaN"));
    let error = of(&[1.0, 1.0], &[true], &[true], &bounds);
    assert!(error.contains("values has 2 entries"));
    let error = of(&[1.0], &[true], &[true; 2], &bounds);
    assert!(error.contains("grown has 2 entries"));
    let error = of(&[1.0], &[true], &[true], &Bounds { budget: 1, most: 1, margin: 0.5 });
    assert!(error.contains("margin is 0.5"));
}

proptest! {
    #[test]
    fn the_budget_and_the_caps_are_kept(
        modules in prop::collection::vec((0u64..5, 1u64..4, 0u64..3), 1..8),
        seeds in prop::collection::vec((0.0f64..10.0, any::<(bool, bool)>()), 40),
        slack in 0u64..10,
        most in 0u64..20,
        margin in 1.0f64..5.0,
    ) {
        let ranks: Vec<u64> = modules.iter().map(|module| module.0).collect();
        let costs: Vec<u64> = modules.iter().map(|module| module.1).collect();
        let caps: Vec<u64> = modules.iter().map(|module| module.0 + module.2).collect();
        let total = ranks.iter().sum::<u64>() as usize;
        let (values, flags): (Vec<f64>, Vec<(bool, bool)>) = seeds[..total].iter().copied().unzip();
        let (judged, grown): (Vec<bool>, Vec<bool>) = flags.into_iter().unzip();
        let spent = |ranks: &[u64]| ranks.iter().zip(&costs).map(|(rank, cost)| rank * cost).sum::<u64>();
        let budget = spent(&ranks) + slack;
        let moves = choose(
            &Modules { ranks: &ranks, caps: &caps, costs: &costs },
            &Components { values: &values, judged: &judged, grown: &grown },
            &Bounds { budget, most, margin },
        ).unwrap();
        let mut left = ranks.clone();
        let mut owner = Vec::new();
        for (module, &rank) in ranks.iter().enumerate() {
            owner.extend(vec![module; rank as usize]);
        }
        for &position in &moves.removed {
            prop_assert!(judged[position]);
            left[owner[position]] -= 1;
            prop_assert_eq!(moves.gained[owner[position]], 0, "it gives and takes");
        }
        let after: Vec<u64> = left.iter().zip(&moves.gained).map(|(left, gained)| left + gained).collect();
        prop_assert!(spent(&after) <= budget);
        prop_assert!(after.iter().zip(&caps).all(|(rank, cap)| rank <= cap));
    }
}
