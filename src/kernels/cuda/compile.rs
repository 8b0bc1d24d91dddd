//! The CUDA sources, compiled at run time by NVRTC for the architecture at hand. Neither a toolkit nor a
//! GPU is needed for it. Results are kept in memory and in the user's cache folder.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::{env, fs, process};

use cudarc::nvrtc::{result as nvrtc, sys};

use super::KERNELS;
use crate::errors::{Error, Result};

/// What every kernel is written with.
const PRELUDE: [&str; 2] = [include_str!("intrinsics.cu"), include_str!("prelude.cu")];

/// All that is compiled, as one file.
fn source() -> String {
    PRELUDE.into_iter().chain(KERNELS.iter().map(|kernels| kernels.source)).collect()
}

/// Device code for one architecture.
pub struct Compiled {
    /// The binary that the driver loads.
    pub cubin: Vec<u8>,
    /// What the compiler said: registers and spills of every kernel.
    pub log: String,
}

/// Compiles all kernels for `architecture`, such as "sm_90".
pub fn compile(architecture: &str) -> Result<Compiled> {
    if !architecture.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
        return Err(Error::Value(format!(
            "architecture is {architecture:?}; it must be one such as \"sm_90\""
        )));
    }
    if !present() {
        let message =
            "libnvrtc, the run-time compiler of CUDA, was not found; torch's CUDA packages \
                       bring it (nvidia-cuda-nvrtc)";
        return Err(Error::Cuda(message.to_owned()));
    }
    let failed = |what: &str, error: &dyn std::fmt::Debug, log: &str| {
        Error::Cuda(format!("the kernels cannot be {what} for {architecture}: {error:?} {log}"))
    };
    let source =
        CString::new(source()).map_err(|error| failed("passed to the compiler", &error, ""))?;
    let program = nvrtc::create_program(&source, Some(c"increlora.cu"))
        .map_err(|error| failed("passed to the compiler", &error, ""))?;
    // SAFETY: the program was just made, and is destroyed by nobody but this guard, at the end.
    let program = unsafe { Program::own(program) };
    let options = options(architecture);
    // SAFETY: the program is alive; the options hold no NUL, as checked above.
    let compiled = unsafe { nvrtc::compile_program(program.0, &options) };
    // SAFETY: the program is alive; NVRTC ends its log with a NUL.
    let log = unsafe { nvrtc::get_program_log(program.0) }.map_or_else(
        |_| String::new(),
        |log| unsafe { CStr::from_ptr(log.as_ptr()) }.to_string_lossy().into_owned(),
    );
    compiled.map_err(|error| failed("compiled", &error, log.trim()))?;
    let cubin = program.cubin().map_err(|error| failed("compiled", &error, log.trim()))?;
    Ok(Compiled { cubin, log })
}

fn options(architecture: &str) -> [String; 3] {
    let architecture = format!("--gpu-architecture={architecture}");
    [architecture, "--std=c++17".to_owned(), "--ptxas-options=-v".to_owned()]
}

/// A program of NVRTC, destroyed with this.
struct Program(sys::nvrtcProgram);

impl Program {
    /// # Safety
    ///
    /// `program` is alive, and nobody else destroys it.
    unsafe fn own(program: sys::nvrtcProgram) -> Self {
        Self(program)
    }

    fn cubin(&self) -> std::result::Result<Vec<u8>, nvrtc::NvrtcError> {
        let mut size = 0;
        // SAFETY: the program is alive, and NVRTC writes as many bytes as it asked for.
        unsafe {
            sys::nvrtcGetCUBINSize(self.0, &mut size).result()?;
            let mut cubin = vec![0u8; size];
            sys::nvrtcGetCUBIN(self.0, cubin.as_mut_ptr().cast()).result()?;
            Ok(cubin)
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: the program is alive until here. Nothing can be done about a failure.
        let _ = unsafe { nvrtc::destroy_program(self.0) };
    }
}

/// Is NVRTC there? cudarc panics where it is not, so nothing of it may be called before.
fn present() -> bool {
    static PRESENT: OnceLock<bool> = OnceLock::new();
    // SAFETY: only looks whether a library can be loaded.
    *PRESENT.get_or_init(|| unsafe { sys::is_culib_present() })
}

/// The device code for `architecture`: from memory, from the cache folder, or compiled.
pub fn cubin(architecture: &str) -> Result<Arc<Vec<u8>>> {
    static MEMORY: OnceLock<Mutex<HashMap<String, Arc<Vec<u8>>>>> = OnceLock::new();
    let key = key(architecture);
    // A panic while the lock was held leaves the map as it was.
    let mut memory =
        MEMORY.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(cubin) = memory.get(&key) {
        return Ok(cubin.clone());
    }
    let file = folder().map(|folder| folder.join(format!("{key}.cubin")));
    let cubin = match file.as_deref().and_then(read) {
        Some(cubin) => cubin,
        None => {
            let cubin = compile(architecture)?.cubin;
            if let Some(file) = &file {
                // A cache that cannot be written costs two seconds a process and nothing else.
                let _ = write(file, &cubin);
            }
            cubin
        }
    };
    let cubin = Arc::new(cubin);
    memory.insert(key, cubin.clone());
    Ok(cubin)
}

/// Names a result: architecture, and everything that the compiler was given, itself included.
fn key(architecture: &str) -> String {
    let (mut major, mut minor) = (0, 0);
    if present() {
        // SAFETY: NVRTC is there, and writes two numbers. Without an answer they stay 0.
        let _ = unsafe { sys::nvrtcVersion(&mut major, &mut minor) };
    }
    let input = [source(), options(architecture).concat(), format!("{major}.{minor}")];
    format!("{architecture}-{:016x}", hash(input.concat().as_bytes()))
}

fn folder() -> Option<PathBuf> {
    let set = |name: &str| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")))?;
    Some(cache.join("increlora_rs"))
}

/// FNV-1a: the same number in every process, which std's hasher does not promise.
fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

const MARK: &[u8; 16] = b"increlora cubin1";
const HEADER: usize = MARK.len() + 16;

/// The content of a cache file: mark, length, hash, device code.
fn pack(cubin: &[u8]) -> Vec<u8> {
    let length = (cubin.len() as u64).to_le_bytes();
    [MARK, length.as_slice(), &hash(cubin).to_le_bytes(), cubin].concat()
}

/// What [`pack`] packed; `None` if it is damaged.
fn unpack(packed: &[u8]) -> Option<&[u8]> {
    let (header, cubin) = packed.split_at_checked(HEADER)?;
    (header == &pack(cubin)[..HEADER]).then_some(cubin)
}

fn read(file: &Path) -> Option<Vec<u8>> {
    unpack(&fs::read(file).ok()?).map(<[u8]>::to_vec)
}

/// Writes beside the file and renames, so that no process ever reads half of it.
fn write(file: &Path, cubin: &[u8]) -> std::io::Result<()> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    if let Some(folder) = file.parent() {
        fs::create_dir_all(folder)?;
    }
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let part = file.with_extension(format!("{}-{count}.part", process::id()));
    let written = fs::write(&part, pack(cubin)).and_then(|()| fs::rename(&part, file));
    if written.is_err() {
        let _ = fs::remove_file(&part);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    fn temporary(name: &str) -> PathBuf {
        env::temp_dir().join(format!("increlora-{}-{name}", process::id()))
    }

    #[test]
    fn a_cache_file_comes_back_as_it_was_written() {
        let folder = temporary("whole");
        let file = folder.join("deep").join("sm_90-0.cubin");
        write(&file, b"device code").unwrap();
        assert_eq!(read(&file).as_deref(), Some(b"device code".as_slice()));
        assert_eq!(fs::read_dir(file.parent().unwrap()).unwrap().count(), 1, "no part is left");
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_damaged_cache_file_counts_as_none() {
        let whole = pack(b"device code");
        assert_eq!(unpack(&whole), Some(b"device code".as_slice()));
        for length in 0..whole.len() {
            assert_eq!(unpack(&whole[..length]), None, "cut at {length}");
        }
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            assert_eq!(unpack(&damaged), None, "byte {at}");
        }
        assert_eq!(unpack(&[whole.as_slice(), b"x"].concat()), None, "too long");
    }

    #[test]
    fn an_unwritable_folder_is_an_error_and_no_panic() {
        let file = temporary("file");
        fs::write(&file, b"").unwrap();
        assert!(write(&file.join("sub").join("sm_90-0.cubin"), b"device code").is_err());
        assert_eq!(read(&file.join("sub").join("sm_90-0.cubin")), None);
        fs::remove_file(file).unwrap();
    }

    #[test]
    fn the_hash_is_fnv_1a() {
        // The published value for "foobar".
        assert_eq!(hash(b"foobar"), 0x8594_4171_f739_67e8);
    }

    #[test]
    fn an_architecture_with_other_characters_is_refused() {
        assert!(matches!(compile("sm_90 -x"), Err(Error::Value(_))));
        assert!(matches!(compile("sm_90\0"), Err(Error::Value(_))));
    }
}
