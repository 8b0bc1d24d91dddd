//! Records the torch that the extension is built for, by the same interpreter that torch-sys asks, and compiles the
//! little that is written in C++ against its headers.

use std::process::Command;

const CPP: &str = "src/bindings/autograd.cpp";
const HEADER: &str = "src/bindings/torch_versions.h";
const ASK: &str = "
import sysconfig, torch
from torch.utils.cpp_extension import include_paths
print(torch.__version__.split('+')[0])
print(*include_paths(), sysconfig.get_path('include'), sep='\\n')";

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed={CPP}");
    println!("cargo:rerun-if-changed={HEADER}");
    println!("cargo:rerun-if-env-changed=VIRTUAL_ENV");
    println!("cargo:rerun-if-env-changed=PATH");
    let python = if cfg!(windows) {
        "python.exe"
    } else if std::env::var_os("VIRTUAL_ENV").is_some() {
        "python"
    } else {
        "python3"
    };
    let output = Command::new(python)
        .args(["-c", ASK])
        .output()
        .unwrap_or_else(|error| panic!("could not run {python}: {error}"));
    assert!(
        output.status.success(),
        "{python} cannot import torch; build in an environment that has it:\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let answer = String::from_utf8_lossy(&output.stdout);
    let mut lines = answer.lines();
    println!("cargo:rustc-env=INCRELORA_TORCH_VERSION={}", lines.next().unwrap_or_default());
    // The C++ version, as torch-sys's, is in .cargo/config.toml.
    cc::Build::new()
        .cpp(true)
        .pic(true)
        .warnings(false)
        .includes(lines)
        .file(CPP)
        .compile("increlora_autograd");
}
