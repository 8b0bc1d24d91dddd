//! Which components leave a module and which modules gain one, when ranks move. Plain arithmetic, no tensors.

use crate::errors::{Error, Result};
use crate::policies::growth::NEAR;

/// What is known of the modules, in model order.
#[derive(Debug)]
pub struct Modules<'a> {
    /// Active components of each.
    pub ranks: &'a [u64],
    /// The most that each may have.
    pub caps: &'a [u64],
    /// What a component of each takes of the budget, at least 1.
    pub costs: &'a [u64],
}

/// What is known of the components of all modules, module by module.
#[derive(Debug)]
pub struct Components<'a> {
    /// What each is worth, finite and at least 0.
    pub values: &'a [f64],
    /// May each be judged by it? One that was born lately cannot leave.
    pub judged: &'a [bool],
    /// Does each speak for its module? One that is still learning is worth less than it will be.
    pub grown: &'a [bool],
}

/// The bounds of one event.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// What all components may take after it.
    pub budget: u64,
    /// What may move, beside what has to leave for the budget.
    pub most: u64,
    /// How many times as much as each that leaves for it a component has to be expected to be worth.
    pub margin: f64,
}

/// What an event changes.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Moves {
    /// Components that leave, as positions among all, ascending.
    pub removed: Vec<usize>,
    /// Components that each module gains.
    pub gained: Vec<u64>,
}

/// Chooses the moves of one event.
///
/// All is weighed by value for cost. The component worth least leaves first. What a module's next component is
/// expected to be worth is the lower quartile of its grown ones (of all that may be judged, where none is
/// grown), divided by one more than the number that it gains at this event: a module whose components are all
/// worth much has more to learn, and one that has some worth little has had enough. A component is given as
/// long as it is expected to be worth `margin` times as much as each that has to leave for it. No module gives
/// and gains at one event.
pub fn choose(
    modules: &Modules<'_>,
    components: &Components<'_>,
    bounds: &Bounds,
) -> Result<Moves> {
    check(modules, components, bounds)?;
    let mut state = State::new(modules, components);
    state.prune(bounds.budget);
    let mut moved = 0u64;
    while moved < bounds.most {
        let Some(module) = state.best() else { break };
        if !state.give(module, bounds) {
            break;
        }
        moved += modules.costs[module];
    }
    let mut removed = state.removed;
    removed.sort_unstable();
    Ok(Moves { removed, gained: state.gained })
}

struct State<'a> {
    modules: &'a Modules<'a>,
    /// Components that may leave, the least worth first: value for cost, module, position.
    queue: Vec<(f64, usize, usize)>,
    /// The expected value for cost of the next component of each module, before the division.
    scores: Vec<f64>,
    /// What each has left of its components.
    ranks: Vec<u64>,
    removed: Vec<usize>,
    gained: Vec<u64>,
    spent: u64,
}

impl<'a> State<'a> {
    fn new(modules: &'a Modules<'a>, components: &Components<'_>) -> Self {
        let count = modules.ranks.len();
        let (mut queue, mut scores) = (Vec::new(), vec![0.0; count]);
        let mut start = 0;
        for (module, &rank) in modules.ranks.iter().enumerate() {
            let positions = start..start + rank as usize;
            start = positions.end;
            let cost = modules.costs[module] as f64;
            let mut own: Vec<_> = positions
                .filter(|&position| components.judged[position])
                .map(|position| (components.values[position] / cost, module, position))
                .collect();
            own.sort_by(|one, other| one.0.total_cmp(&other.0).then(one.2.cmp(&other.2)));
            let grown: Vec<_> = own
                .iter()
                .filter(|&&(_, _, position)| components.grown[position])
                .copied()
                .collect();
            scores[module] = lower_quartile(if grown.is_empty() { &own } else { &grown });
            queue.append(&mut own);
        }
        queue.sort_by(|one, other| one.0.total_cmp(&other.0).then(one.2.cmp(&other.2)));
        let spent = modules.ranks.iter().zip(modules.costs).map(|(rank, cost)| rank * cost).sum();
        Self {
            modules,
            queue,
            scores,
            ranks: modules.ranks.to_vec(),
            removed: Vec::new(),
            gained: vec![0; count],
            spent,
        }
    }

    /// Removes the least worth until all fits the budget.
    fn prune(&mut self, budget: u64) {
        let mut next = 0;
        while self.spent > budget && next < self.queue.len() {
            self.remove(next);
            next += 1;
        }
        self.queue.drain(..next);
    }

    fn remove(&mut self, index: usize) {
        let (_, module, position) = self.queue[index];
        self.removed.push(position);
        self.ranks[module] -= 1;
        self.spent -= self.modules.costs[module];
    }

    fn expected(&self, module: usize) -> f64 {
        self.scores[module] / (1 + self.gained[module]) as f64
    }

    /// The module whose next component is expected to be worth most; of those near to it the first.
    fn best(&self) -> Option<usize> {
        let open = |&module: &usize| {
            // One that gave some away has had enough.
            let whole = self.ranks[module] == self.modules.ranks[module];
            whole && self.ranks[module] + self.gained[module] < self.modules.caps[module]
        };
        let open: Vec<_> = (0..self.ranks.len()).filter(open).collect();
        let most = open.iter().map(|&module| self.expected(module)).fold(0.0, f64::max);
        open.into_iter().find(|&module| most > 0.0 && self.expected(module) >= most * (1.0 - NEAR))
    }

    /// Gives the module a component, for which others leave where there is no room. Is it worth them?
    fn give(&mut self, module: usize, bounds: &Bounds) -> bool {
        let (cost, expected) = (self.modules.costs[module], self.expected(module));
        let mut room = bounds.budget.saturating_sub(self.spent);
        let mut leave = Vec::new();
        for (index, &(value, other, _)) in self.queue.iter().enumerate() {
            if room >= cost {
                break;
            }
            if value * bounds.margin >= expected {
                return false;
            }
            // What is gained is gained for good at this event.
            if other != module && self.gained[other] == 0 {
                room += self.modules.costs[other];
                leave.push(index);
            }
        }
        if room < cost {
            return false;
        }
        for &index in &leave {
            self.remove(index);
        }
        for &index in leave.iter().rev() {
            self.queue.remove(index);
        }
        self.gained[module] += 1;
        self.spent += cost;
        true
    }
}

/// Of ascending values, between its neighbours in proportion; 0 of none.
fn lower_quartile(ascending: &[(f64, usize, usize)]) -> f64 {
    let Some(last) = ascending.len().checked_sub(1) else { return 0.0 };
    let place = last as f64 / 4.0;
    let (below, above) = (ascending[place as usize].0, ascending[(place as usize + 1).min(last)].0);
    below + (above - below) * place.fract()
}

fn check(modules: &Modules<'_>, components: &Components<'_>, bounds: &Bounds) -> Result<()> {
    let count = modules.ranks.len();
    for (name, length) in [("caps", modules.caps.len()), ("costs", modules.costs.len())] {
        if length != count {
            return Err(Error::Value(format!(
                "{name} has {length} entries for {count} modules; give one each"
            )));
        }
    }
    if let Some(module) = modules.costs.iter().position(|&cost| cost == 0) {
        return Err(Error::Value(format!("costs[{module}] is 0; a component costs 1 or more")));
    }
    let total: u64 = modules.ranks.iter().sum();
    let lengths = [
        ("values", components.values.len()),
        ("judged", components.judged.len()),
        ("grown", components.grown.len()),
    ];
    for (name, length) in lengths {
        if length as u64 != total {
            return Err(Error::Value(format!(
                "{name} has {length} entries for ranks of {total} in all"
            )));
        }
    }
    if !(bounds.margin.is_finite() && bounds.margin >= 1.0) {
        return Err(Error::Value(format!(
            "margin is {}; give a finite number, 1 or more",
            bounds.margin
        )));
    }
    match components.values.iter().position(|value| !(value.is_finite() && *value >= 0.0)) {
        Some(at) => Err(Error::Value(format!(
            "values[{at}] is {}; values must be finite and at least 0",
            components.values[at]
        ))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
