//! Records the torch that the extension is built for, by the same interpreter that torch-sys asks.

use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
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
        .args(["-c", "import torch; print(torch.__version__.split('+')[0])"])
        .output()
        .unwrap_or_else(|error| panic!("could not run {python}: {error}"));
    assert!(
        output.status.success(),
        "{python} cannot import torch; build in an environment that has it:\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let version = String::from_utf8_lossy(&output.stdout);
    println!("cargo:rustc-env=INCRELORA_TORCH_VERSION={}", version.trim());
}
