//! Work on many independent items, over torch's threads.

use std::sync::Mutex;

use super::pool;

/// Work below which another thread costs more than it saves.
const WORTH_A_THREAD: usize = 200_000;

/// Runs `work` on parts of `items` that cost about the same; `cost` of an item is about its
/// nanoseconds.
pub fn split<J: Send>(items: &mut [J], cost: impl Fn(&J) -> usize, work: impl Fn(&mut [J]) + Sync) {
    let costs: Vec<usize> = items.iter().map(cost).collect();
    let total: usize = costs.iter().sum();
    let parts = pool::threads().min(total / WORTH_A_THREAD).max(1);
    if parts == 1 {
        return work(items);
    }
    let mut shares = Vec::with_capacity(parts);
    let (mut rest, mut first) = (items, 0);
    for _ in 1..parts {
        let mut done = 0;
        let fits = |&&cost: &&usize| {
            done += cost;
            done <= total / parts
        };
        let count = costs[first..].iter().take_while(fits).count();
        first += count;
        let (now, later) = std::mem::take(&mut rest).split_at_mut(count);
        rest = later;
        shares.push(Mutex::new(now));
    }
    shares.push(Mutex::new(rest));
    pool::run(parts, |thread, threads| {
        // Fewer threads may come than were asked for.
        for share in shares.iter().skip(thread).step_by(threads) {
            // Each share has one thread: nobody else ever holds the lock.
            if let Ok(mut share) = share.try_lock() {
                work(&mut share);
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_is_worked_on_once() {
        for (count, cost) in [(0, 1), (1, usize::MAX >> 20), (3, 1), (7, 1 << 22), (1000, 1 << 13)]
        {
            let mut items = vec![0; count];
            split(&mut items, |_| cost, |part| part.iter_mut().for_each(|item| *item += 1));
            assert!(items.iter().all(|&item| item == 1));
        }
    }
}
