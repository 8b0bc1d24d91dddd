//! torch's own OpenMP threads for the loops here: no second pool, and `torch.set_num_threads` holds.
//! libgomp is in the process once torch is loaded, and is found by name at run time.

use std::ffi::{c_char, c_int, c_uint, c_void, CStr};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::OnceLock;

extern "C" {
    fn dlsym(handle: *mut c_void, name: *const c_char) -> *mut c_void;
}

type Region = unsafe extern "C" fn(*mut c_void);
type GompParallel = unsafe extern "C" fn(Region, *mut c_void, c_uint, c_uint);
type Query = unsafe extern "C" fn() -> c_int;

struct OpenMp {
    parallel: GompParallel,
    thread: Query,
    threads: Query,
}

fn openmp() -> Option<&'static OpenMp> {
    static FOUND: OnceLock<Option<OpenMp>> = OnceLock::new();
    let find = || {
        let symbol = |name: &CStr| {
            // SAFETY: a null handle asks for the first symbol of that name in the process.
            let address = unsafe { dlsym(std::ptr::null_mut(), name.as_ptr()) };
            (!address.is_null()).then_some(address)
        };
        let parallel = symbol(c"GOMP_parallel")?;
        let thread = symbol(c"omp_get_thread_num")?;
        let threads = symbol(c"omp_get_num_threads")?;
        // SAFETY: libgomp documents these three functions with these signatures.
        unsafe {
            Some(OpenMp {
                parallel: std::mem::transmute::<*mut c_void, GompParallel>(parallel),
                thread: std::mem::transmute::<*mut c_void, Query>(thread),
                threads: std::mem::transmute::<*mut c_void, Query>(threads),
            })
        }
    };
    FOUND.get_or_init(find).as_ref()
}

struct Job<'a> {
    work: &'a (dyn Fn(usize, usize) + Sync),
    openmp: &'static OpenMp,
    panicked: AtomicBool,
}

unsafe extern "C" fn region(data: *mut c_void) {
    // SAFETY: `run` passes a job that outlives the parallel region.
    let job = unsafe { &*data.cast::<Job>() };
    // SAFETY: plain queries of the runtime that runs this region.
    let (thread, threads) = unsafe { ((job.openmp.thread)(), (job.openmp.threads)()) };
    // A panic must not unwind through libgomp.
    if catch_unwind(AssertUnwindSafe(|| (job.work)(thread as usize, threads as usize))).is_err() {
        job.panicked.store(true, Ordering::Relaxed);
    }
}

/// Threads that torch uses, at least 1.
pub fn threads() -> usize {
    usize::try_from(tch::get_num_threads()).unwrap_or(1).max(1)
}

/// Calls `work(thread, threads)` once a thread, on `wanted` threads at most; the caller's thread alone
/// where there is no OpenMP runtime.
///
/// # Panics
/// Where `work` does.
pub fn run(wanted: usize, work: impl Fn(usize, usize) + Sync) {
    let Some(openmp) = openmp().filter(|_| wanted > 1) else {
        return work(0, 1);
    };
    let job = Job { work: &work, openmp, panicked: AtomicBool::new(false) };
    let data = std::ptr::from_ref(&job).cast_mut().cast::<c_void>();
    // SAFETY: `region` reads the job, which lives until GOMP_parallel has joined its threads.
    unsafe { (openmp.parallel)(region, data, wanted as c_uint, 0) };
    assert!(!job.panicked.load(Ordering::Relaxed), "a loop over tensors panicked in a thread");
}

/// The part of `0..items` that is thread `thread`'s of `threads`; parts start at multiples of `grain`.
pub fn part(items: usize, grain: usize, thread: usize, threads: usize) -> std::ops::Range<usize> {
    let grains = items.div_ceil(grain);
    let bound = |thread: usize| (grains * thread / threads * grain).min(items);
    bound(thread)..bound(thread + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    #[test]
    fn every_thread_works_once() {
        let calls = AtomicUsize::new(0);
        let shares = AtomicUsize::new(0);
        run(2, |_, threads| {
            calls.fetch_add(1, Ordering::Relaxed);
            shares.store(threads, Ordering::Relaxed);
        });
        assert_eq!(calls.into_inner(), shares.into_inner());
    }

    #[test]
    #[should_panic(expected = "a loop over tensors panicked")]
    fn a_panic_comes_back_to_the_caller() {
        run(2, |thread, threads| assert!(thread + 1 < threads, "the last one"));
        // Where there is one thread only, its panic is the caller's own.
        panic!("a loop over tensors panicked");
    }

    #[test]
    fn parts_cover_everything_once() {
        for (items, grain, threads) in [(0, 8, 2), (7, 8, 3), (100, 8, 3), (64, 1, 64), (5, 2, 9)] {
            let mut next = 0;
            for thread in 0..threads {
                let part = part(items, grain, thread, threads);
                assert_eq!(part.start, next);
                assert!(part.start.is_multiple_of(grain) || part.is_empty());
                next = part.end;
            }
            assert_eq!(next, items);
        }
    }
}
