//! Autograd's graph, seen from Rust: which tensors an operation may take directly, and a node of the graph whose
//! backward pass calls Rust. The other half is `autograd.cpp`.

use std::ffi::c_void;
use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::panic::{catch_unwind, resume_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, Ordering};

use pyo3::ffi::PyObject as RawObject;
use pyo3::prelude::*;
use tch::Tensor;
use torch_sys::C_tensor;

use super::panic_message;
use crate::errors::Error;

/// Most tensors that one operation takes, or saves.
const MOST: usize = 8;

extern "C" {
    fn increlora_plain(
        objects: *const *mut RawObject,
        count: usize,
        tensors: *mut *mut C_tensor,
    ) -> bool;
    fn increlora_learns(tensor: *const C_tensor) -> bool;
    fn increlora_grad_mode() -> bool;
    fn increlora_below_autograd(work: unsafe extern "C" fn(*mut c_void), data: *mut c_void);
    fn increlora_record(
        y: *mut C_tensor,
        inputs: *const *const C_tensor,
        saved: *const *const C_tensor,
        count: usize,
        operation: *const Table,
        held: *const c_void,
    ) -> bool;
}

/// May nodes be made? One is laid out as the headers had it that it was compiled against, and libtorch of another
/// minor version may have a field more in it.
static OWN_TORCH: AtomicBool = AtomicBool::new(false);

/// Looks once, when the module is loaded, whether libtorch is of the minor version that this was compiled against.
pub fn look_at_torch(py: Python<'_>) -> PyResult<bool> {
    let installed: String = py.import("torch")?.getattr("__version__")?.str()?.extract()?;
    let own = minor(&installed) == minor(env!("INCRELORA_TORCH_VERSION"));
    OWN_TORCH.store(own, Ordering::Relaxed);
    Ok(own)
}

/// "2.13" of "2.13.0+cpu".
fn minor(version: &str) -> &str {
    version.match_indices('.').nth(1).map_or(version, |(end, _)| &version[..end])
}

/// A tensor that somebody else keeps alive.
pub struct Borrowed<'a>(ManuallyDrop<Tensor>, PhantomData<&'a Tensor>);

// SAFETY: it goes to no other thread; only the GIL is let go while it is in use.
unsafe impl Sync for Borrowed<'_> {}

impl Borrowed<'_> {
    /// # Safety
    /// The C++ tensor is there as long as this is.
    unsafe fn of(tensor: *const C_tensor) -> Self {
        // SAFETY: as the caller promises; it is not dropped.
        Self(ManuallyDrop::new(unsafe { Tensor::from_ptr(tensor.cast_mut()) }), PhantomData)
    }

    /// Does it want a gradient?
    pub fn learns(&self) -> bool {
        // SAFETY: a tensor.
        unsafe { increlora_learns(self.0.as_ptr()) }
    }
}

impl Deref for Borrowed<'_> {
    type Target = Tensor;

    fn deref(&self) -> &Tensor {
        &self.0
    }
}

/// The tensors of Python objects (None: none), if an operation may read them directly: float32 or bfloat16, in plain
/// memory of the CPU, and nobody else takes part in the call: no mode, transform, tracer or autocast. None under a
/// torch of another minor version than this was compiled against.
pub fn plain<'a, const N: usize>(
    objects: [&Bound<'a, PyAny>; N],
) -> Option<[Option<Borrowed<'a>>; N]> {
    if !OWN_TORCH.load(Ordering::Relaxed) {
        return None;
    }
    let raw = objects.map(Bound::as_ptr);
    let mut tensors = [std::ptr::null_mut(); N];
    // SAFETY: N objects and N places; a bound object means that the GIL is held.
    let fits = unsafe { increlora_plain(raw.as_ptr(), N, tensors.as_mut_ptr()) };
    // SAFETY: the objects, which outlive 'a, keep their tensors.
    fits.then(|| tensors.map(|tensor| (!tensor.is_null()).then(|| unsafe { Borrowed::of(tensor) })))
}

/// Is an operation on these inputs part of a graph?
pub fn records(inputs: &[&Borrowed<'_>]) -> bool {
    // SAFETY: a plain question.
    let wanted = unsafe { increlora_grad_mode() };
    wanted && inputs.iter().any(|input| input.learns())
}

/// Does `work` with libtorch's operations called as their own backward passes call others: without a look at
/// autograd, which costs as much as a small operation.
pub fn below_autograd<T>(work: impl FnOnce() -> T) -> T {
    struct Job<W, T> {
        work: Option<W>,
        done: Option<std::thread::Result<T>>,
    }
    unsafe extern "C" fn run<W: FnOnce() -> T, T>(data: *mut c_void) {
        // SAFETY: the job below, which nobody else has.
        let job = unsafe { &mut *data.cast::<Job<W, T>>() };
        // A panic must not unwind through C++.
        job.done = job.work.take().map(|work| catch_unwind(AssertUnwindSafe(work)));
    }
    fn runner<W: FnOnce() -> T, T>(_: &Job<W, T>) -> unsafe extern "C" fn(*mut c_void) {
        run::<W, T>
    }
    let mut job = Job { work: Some(work), done: None };
    let run = runner(&job);
    // SAFETY: `run` is for this job, and is done when the call returns.
    unsafe { increlora_below_autograd(run, std::ptr::from_mut(&mut job).cast()) };
    match job.done {
        Some(Ok(done)) => done,
        Some(Err(panic)) => resume_unwind(panic),
        None => unreachable!("the work is done"),
    }
}

/// What a node keeps beside tensors, and its backward pass. It runs without the GIL, without an autograd graph and
/// without autocast.
pub trait Backward: Send + Sync + 'static {
    /// How many inputs have a gradient.
    const INPUTS: usize;

    /// The gradients of the inputs from that of the output and from what was saved; `needed`: those that are asked
    /// for.
    fn backward(
        &self,
        gy: &Tensor,
        saved: &[Option<Borrowed<'_>>],
        needed: &[bool],
    ) -> PyResult<Vec<Option<Tensor>>>;
}

/// As the C++ side has it.
#[repr(C)]
struct Table {
    backward: unsafe extern "C" fn(
        *const c_void,
        *const C_tensor,
        *const *const C_tensor,
        *const bool,
        *mut *mut C_tensor,
    ) -> *mut c_void,
    raise: unsafe extern "C" fn(*mut c_void),
    drop: unsafe extern "C" fn(*mut c_void),
    inputs: usize,
}

trait HasTable: Backward + Sized {
    const TABLE: &'static Table =
        &Table { backward: backward::<Self>, raise, drop: drop_held::<Self>, inputs: Self::INPUTS };
}

impl<B: Backward> HasTable for B {}

/// Makes `y`, fresh memory, the output of an operation on `inputs`; `saved` is kept for its backward pass.
pub fn record<B: Backward>(
    py: Python<'_>,
    y: &mut Tensor,
    inputs: &[&Tensor],
    saved: &[Option<&Tensor>],
    backward: B,
) -> PyResult<()> {
    assert!(inputs.len() == B::INPUTS && inputs.len() <= MOST && saved.len() <= MOST);
    let mut given = [std::ptr::null(); MOST];
    given.iter_mut().zip(inputs).for_each(|(place, input)| *place = input.as_ptr());
    let mut kept = [std::ptr::null(); MOST];
    for (place, tensor) in kept.iter_mut().zip(saved) {
        *place = tensor.map_or(std::ptr::null(), Tensor::as_ptr);
    }
    let held = Box::into_raw(Box::new(backward)).cast_const().cast();
    // SAFETY: so many tensors are there; the node takes what is held, of the type that its table is for.
    let done = unsafe {
        let (y, inputs, kept) = (y.as_mut_ptr(), given.as_ptr(), kept.as_ptr());
        increlora_record(y, inputs, kept, saved.len(), B::TABLE, held)
    };
    if done {
        Ok(())
    } else {
        Err(PyErr::fetch(py))
    }
}

unsafe extern "C" fn backward<B: Backward>(
    held: *const c_void,
    gy: *const C_tensor,
    saved: *const *const C_tensor,
    needed: *const bool,
    gradients: *mut *mut C_tensor,
) -> *mut c_void {
    let work = || {
        // SAFETY: the node gives what `record` gave it, MOST places each, and keeps all of it meanwhile.
        let (held, gy, saved, needed) = unsafe {
            let saved: &[*const C_tensor; MOST] = &*saved.cast();
            let saved = saved.map(|tensor| (!tensor.is_null()).then(|| Borrowed::of(tensor)));
            let needed: &[bool; MOST] = &*needed.cast();
            (&*held.cast::<B>(), Borrowed::of(gy), saved, &needed[..B::INPUTS])
        };
        held.backward(&gy, &saved, needed)
    };
    let found = catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|panic| Err(Error::Panic(panic_message(panic.as_ref())).into()));
    match found {
        Ok(found) => {
            for (i, tensor) in found.into_iter().enumerate().take(B::INPUTS) {
                if let Some(tensor) = tensor {
                    let mut tensor = ManuallyDrop::new(tensor);
                    // SAFETY: there are so many places; the node takes the tensor.
                    unsafe { *gradients.add(i) = tensor.as_mut_ptr() };
                }
            }
            std::ptr::null_mut()
        }
        Err(error) => Box::into_raw(Box::new(error)).cast(),
    }
}

unsafe extern "C" fn raise(error: *mut c_void) {
    // SAFETY: what `backward` gave, once; the GIL is held.
    let error = unsafe { Box::from_raw(error.cast::<PyErr>()) };
    Python::with_gil(|py| error.restore(py));
}

unsafe extern "C" fn drop_held<B>(held: *mut c_void) {
    // SAFETY: what `record` gave, once.
    drop(unsafe { Box::from_raw(held.cast::<B>()) });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_minor_version_is_what_comes_before_the_second_dot() {
        for (version, wanted) in
            [("2.13.0", "2.13"), ("2.13.1+cu130", "2.13"), ("2.14.0a0+git1", "2.14"), ("3", "3")]
        {
            assert_eq!(minor(version), wanted);
        }
    }
}
