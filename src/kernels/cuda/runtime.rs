//! Launches of the kernels: on torch's own context and stream of a device, or, in tests without a GPU, on
//! the CPU through an emulator.

use std::collections::HashMap;
use std::ffi::{c_char, c_int, c_void, CString};
use std::marker::PhantomData;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use cudarc::driver::{result as driver, sys, CudaContext, DriverError};
use tch::Tensor;

use super::list::{suffix, Kernels};
use super::{compile, KERNELS};
use crate::errors::{Error, Result};

/// The stream that kernels are queued on: the handle of torch's current stream on the device of the
/// tensors, `torch._C._cuda_getCurrentRawStream(index)` in Python. Ignored on the CPU.
#[derive(Clone, Copy, Debug)]
pub struct Stream(pub usize);

/// One argument of a kernel; its width must be the one of the kernel's parameter.
pub enum Argument<'a> {
    /// Address in the memory of the device.
    Pointer(u64),
    /// `int`.
    Int(i32),
    /// `u32`.
    Word(u32),
    /// `i64` or `u64`.
    Long(u64),
    /// `float`.
    Float(f32),
    /// `double`.
    Double(f64),
    /// The address of a structure that is passed by value.
    Structure(*const c_void, PhantomData<&'a ()>),
}

impl<'a> Argument<'a> {
    /// The first element of a tensor.
    pub fn of(tensor: &Tensor) -> Self {
        Self::Pointer(tensor.data_ptr() as u64)
    }

    /// A structure, passed by value; laid out as the kernel has it (`repr(C)`).
    pub fn structure<T>(value: &'a T) -> Self {
        Self::Structure(std::ptr::from_ref(value).cast(), PhantomData)
    }

    fn address(&self) -> *mut c_void {
        match self {
            Self::Pointer(value) | Self::Long(value) => std::ptr::from_ref(value).cast_mut().cast(),
            Self::Int(value) => std::ptr::from_ref(value).cast_mut().cast(),
            Self::Word(value) => std::ptr::from_ref(value).cast_mut().cast(),
            Self::Float(value) => std::ptr::from_ref(value).cast_mut().cast(),
            Self::Double(value) => std::ptr::from_ref(value).cast_mut().cast(),
            Self::Structure(value, _) => value.cast_mut(),
        }
    }
}

/// Blocks of a launch along x and y.
pub type Grid = (i64, i64);

/// Where the kernels for a tensor run.
pub enum Target {
    /// On a device, queued on a stream.
    Device(&'static Device, Stream),
    /// On the CPU, in a test.
    Emulator(EmulatedLaunch),
}

impl Target {
    /// Where the kernels for `tensor` run; `None` where they cannot (see [`unavailable`]).
    pub fn of(tensor: &Tensor, stream: Stream) -> Option<Self> {
        match tensor.device() {
            tch::Device::Cuda(ordinal) => Some(Self::Device(device(ordinal).ok()?, stream)),
            tch::Device::Cpu => emulator().map(Self::Emulator),
            _ => None,
        }
    }

    /// Queues the kernel `name` on `grid` blocks of `threads` threads.
    ///
    /// # Safety
    ///
    /// The arguments are those of the kernel, and every pointer is one to memory of this device that
    /// is as long as the kernel and the grid take it to be.
    pub unsafe fn launch(
        &self,
        name: &str,
        grid: Grid,
        threads: u32,
        arguments: &[Argument<'_>],
    ) -> Result<()> {
        let blocks = |count: i64| {
            u32::try_from(count)
                .map_err(|_| Error::Cuda(format!("{name}: {count} blocks are too many")))
        };
        let grid = (blocks(grid.0)?, blocks(grid.1)?);
        let mut addresses: Vec<*mut c_void> = arguments.iter().map(Argument::address).collect();
        match self {
            // SAFETY: the promise of the caller.
            Self::Device(device, stream) => unsafe {
                device.launch(name, grid, threads, *stream, &mut addresses)
            },
            // SAFETY: the promise of the caller, and of who set the emulator.
            Self::Emulator(launch) => unsafe {
                let kernel = CString::new(name).map_err(|error| Error::Cuda(error.to_string()))?;
                match launch(kernel.as_ptr(), grid.0, grid.1, threads, addresses.as_ptr()) {
                    0 => Ok(()),
                    code => {
                        Err(Error::Cuda(format!("{name}: the emulator failed with code {code}")))
                    }
                }
            },
        }
    }
}

/// Where the kernels for `tensor` run, and the suffix of their names.
pub fn target(tensor: &Tensor, stream: Stream) -> Option<(Target, &'static str)> {
    let suffix = suffix(tensor.f_kind().ok()?)?;
    Some((Target::of(tensor, stream)?, suffix))
}

/// Do the kernels take an `x` of this device and dtype: float32, float16 or bfloat16 on a CUDA device
/// whose kernels could be loaded?
pub fn takes(x: &Tensor, stream: Stream) -> bool {
    target(x, stream).is_some()
}

/// A device whose kernels are loaded.
pub struct Device {
    context: Arc<CudaContext>,
    /// Handles of the kernels by name; the module they belong to is never unloaded.
    functions: HashMap<String, usize>,
}

impl Device {
    fn load(ordinal: usize) -> Result<Self> {
        if !driver_present() {
            return Err(Error::Cuda("the CUDA driver (libcuda) was not found".to_owned()));
        }
        let failed = |error: DriverError| Error::Cuda(format!("device {ordinal}: {error}"));
        // The primary context, which is the one that torch uses.
        let context = CudaContext::new(ordinal).map_err(failed)?;
        context.bind_to_thread().map_err(failed)?;
        let (major, minor) = context.compute_capability().map_err(failed)?;
        let cubin = compile::cubin(&format!("sm_{major}{minor}"))?;
        // SAFETY: the context is bound, and the cubin is one that NVRTC made for this architecture.
        let module = unsafe { driver::module::load_data(cubin.as_ptr().cast()) }.map_err(failed)?;
        let functions = KERNELS.iter().flat_map(Kernels::names).map(|name| {
            let symbol =
                CString::new(name.as_str()).map_err(|error| Error::Cuda(error.to_string()))?;
            // SAFETY: the module was just loaded, and is never unloaded.
            let function = unsafe { driver::module::get_function(module, symbol) }
                .map_err(|error| Error::Cuda(format!("device {ordinal}, {name}: {error}")))?;
            Ok((name, function as usize))
        });
        Ok(Self { context, functions: functions.collect::<Result<_>>()? })
    }

    /// # Safety
    ///
    /// As for [`Target::launch`].
    unsafe fn launch(
        &self,
        name: &str,
        grid: (u32, u32),
        threads: u32,
        stream: Stream,
        addresses: &mut [*mut c_void],
    ) -> Result<()> {
        let failed = |error: DriverError| Error::Cuda(format!("{name}: {error}"));
        let Some(&function) = self.functions.get(name) else {
            return Err(Error::Cuda(format!("{name}: no such kernel")));
        };
        // Autograd calls from threads of its own, which have no context yet.
        self.context.bind_to_thread().map_err(failed)?;
        // SAFETY: the handles are alive, and the rest is the promise of the caller.
        unsafe {
            driver::launch_kernel(
                function as sys::CUfunction,
                (grid.0, grid.1, 1),
                (threads, 1, 1),
                0,
                stream.0 as sys::CUstream,
                addresses,
            )
        }
        .map_err(failed)
    }
}

/// Is the driver there? cudarc panics where it is not, so nothing of it may be called before.
fn driver_present() -> bool {
    static PRESENT: OnceLock<bool> = OnceLock::new();
    // SAFETY: only looks whether a library can be loaded.
    *PRESENT.get_or_init(|| unsafe { sys::is_culib_present() })
}

type Devices = HashMap<usize, std::result::Result<&'static Device, String>>;

fn devices() -> &'static Mutex<Devices> {
    static DEVICES: OnceLock<Mutex<Devices>> = OnceLock::new();
    DEVICES.get_or_init(Mutex::default)
}

/// The device `ordinal`, its kernels loaded at the first call; the reason where that failed, then and
/// at every later call.
pub fn device(ordinal: usize) -> std::result::Result<&'static Device, String> {
    // A panic while the lock was held leaves the map as it was.
    let mut devices = devices().lock().unwrap_or_else(PoisonError::into_inner);
    devices
        .entry(ordinal)
        .or_insert_with(|| match Device::load(ordinal) {
            // Kept until the process ends: torch's context outlives everything else, too.
            Ok(device) => Ok(Box::leak(Box::new(device))),
            Err(error) => Err(error.to_string()),
        })
        .clone()
}

/// Why kernels were asked for and could not be had, for the first device where that happened.
pub fn unavailable() -> Option<String> {
    let devices = devices().lock().unwrap_or_else(PoisonError::into_inner);
    devices.values().find_map(|device| device.as_ref().err().cloned())
}

/// Runs a kernel by name: grid along x and y, threads a block, the addresses of the arguments. Gives 0,
/// or a code where it failed.
pub type EmulatedLaunch = unsafe extern "C" fn(
    kernel: *const c_char,
    grid_x: u32,
    grid_y: u32,
    threads: u32,
    arguments: *const *mut c_void,
) -> c_int;

static EMULATOR: AtomicUsize = AtomicUsize::new(0);

/// Makes kernels for CPU tensors run through the [`EmulatedLaunch`] at `address`; 0: not any more.
///
/// # Safety
///
/// `address` is 0 or that of such a function, which stays loaded.
pub unsafe fn emulate(address: usize) {
    EMULATOR.store(address, Ordering::Release);
}

fn emulator() -> Option<EmulatedLaunch> {
    match EMULATOR.load(Ordering::Acquire) {
        0 => None,
        // SAFETY: the promise of who called `emulate`.
        address => Some(unsafe { std::mem::transmute::<usize, EmulatedLaunch>(address) }),
    }
}
