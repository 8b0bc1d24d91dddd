#!/usr/bin/env bash
# older.sh VERSION: a wheel for torch 2.11 or 2.12, by the bindings of their time. In a copy of the tree,
# whose lock changes; in an environment of its own, since pip would not leave the other torch where it is.
set -euo pipefail

version=${1:?the version of torch, such as 2.11.0}
minor=${version%.*}
case $minor in
# 0.24 is written for 2.11; there is no 0.25.
2.11 | 2.12) bindings=0.24.0 ;;
*)
    echo "TORCH=$version: 2.11 and 2.12 are built so; without TORCH the wheel is for 2.13 and later" >&2
    exit 2
    ;;
esac
root=$(cd "$(dirname "$0")/.." && pwd)
copy=$root/target/torch-$minor
mkdir -p "$copy"
tar -C "$root" -c --exclude=./.git --exclude=./target --exclude=./.venv --exclude=./dist --exclude='*.so' . |
    tar -C "$copy" -x
cd "$copy"
sed -i -E "s/\"torch==[^\"]*\"/\"torch==$version\"/; s/\"torch>=[^\"]*\"/\"torch==$minor.*\"/" pyproject.toml
cargo update --quiet pyo3-tch --precise "$bindings"
"${PYTHON:-python3}" -m venv .venv
export VIRTUAL_ENV=$copy/.venv PATH=$copy/.venv/bin:$PATH
# Not what later headers need: torch_versions.h and C++20.
export HOST_CXXFLAGS=-std=c++17 TARGET_CXXFLAGS=-std=c++17
pip install --quiet "torch==$version" "maturin>=1.8,<2" setuptools numpy
maturin build --release --out "$root/dist/torch-$minor"
