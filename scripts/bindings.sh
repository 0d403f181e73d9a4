#!/usr/bin/env bash
# cuda/kernels.h -> src/cuda/sys.rs (bash scripts/bindings.sh), or only compare the two (bash scripts/bindings.sh --check).
# Needs libclang: from LIBCLANG_PATH, beside CUDA_HOME, from scripts/fetch-nvcc.sh, or the system's (apt install libclang1).
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -z "${LIBCLANG_PATH:-}" ]; then
    for folder in "${CUDA_HOME:-/nonexistent}/../../clang/native" .toolchain/cuda-13.0/clang/native; do
        if [ -e "$folder/libclang.so" ]; then
            LIBCLANG_PATH=$(cd "$folder" && pwd)
            export LIBCLANG_PATH
            break
        fi
    done
fi
if [ -z "${LIBCLANG_PATH:-}" ] && ! compgen -G "/usr/lib/*/libclang[-.][0-9s]*" >/dev/null && ! compgen -G "/usr/lib/llvm-*/lib/libclang[-.][0-9s]*" >/dev/null; then
    echo "error: libclang not found; run: bash scripts/fetch-nvcc.sh" >&2
    exit 1
fi

made=$(mktemp)
trap 'rm -f "$made"' EXIT
cargo build --quiet --locked --manifest-path scripts/bindings/Cargo.toml --target-dir target/bindings
target/bindings/debug/bindings cuda/kernels.h "$made"
if [ "${1:-}" = --check ]; then
    if ! diff -u src/cuda/sys.rs "$made"; then
        echo "error: src/cuda/sys.rs is not what cuda/kernels.h says; run: bash scripts/bindings.sh" >&2
        exit 1
    fi
else
    mkdir -p src/cuda
    if ! cmp -s src/cuda/sys.rs "$made"; then
        cp "$made" src/cuda/sys.rs
        echo "src/cuda/sys.rs written"
    fi
fi
