#!/usr/bin/env bash
# Gathers what scripts/gpu-check.sh needs on a machine that has an NVIDIA card but no Rust, no CUDA toolkit and no network:
#   bash scripts/pack-gpu-check.sh [FOLDER]            release binaries with --features cuda; default folder target/gpu-check
#   bash scripts/pack-gpu-check.sh --plain [FOLDER]    what `cargo test` has built already: to try the check without a card
# Options: --packages DIR    a Python site-packages folder to take bitsandbytes from, for the peer (only its newest CUDA 13
#                            library: 5 of 125 MB); without it the peer uses what the machine has.
# On the machine: bash FOLDER/gpu-check.sh
set -euo pipefail
cd "$(dirname "$0")/.."

folder=target/gpu-check
build=(--release --features cuda)
packages=
while [ $# -gt 0 ]; do
    case $1 in
        --plain) build=() ;;
        --packages)
            packages=${2:?--packages needs a folder}
            shift
            ;;
        -*)
            echo "error: unknown option $1" >&2
            exit 2
            ;;
        *) folder=$1 ;;
    esac
    shift
done
if [ -e "$folder" ] && [ ! -e "$folder/gpu-check.sh" ]; then
    echo "error: $folder exists and is no folder of this script; give another" >&2
    exit 1
fi

# The executables of the program and of two tests, as cargo names them.
executables=$(cargo test --locked "${build[@]}" --no-run --test cuda --test golden --message-format=json |
    sed -n 's/.*"executable":"\([^"]*\)".*/\1/p')
find_one() {
    grep -E "/$1(-[0-9a-f]+)?\$" <<<"$executables" | head -1
}
program=$(find_one glmtune)
if [ -z "$program" ]; then
    cargo build --locked "${build[@]}"
    target=${CARGO_TARGET_DIR:-target}
    program=$target/debug/glmtune
    [ ${#build[@]} -eq 0 ] || program=$target/release/glmtune
fi

rm -rf "$folder"
mkdir -p "$folder/peer"
cp "$program" "$folder/glmtune"
cp "$(find_one cuda)" "$folder/cuda-tests"
cp "$(find_one golden)" "$folder/golden-tests"
strip "$folder/glmtune" "$folder/cuda-tests" "$folder/golden-tests"
cp scripts/gpu-check.sh "$folder/"
cp -r tests/goldens "$folder/goldens"
cp benches/peer/chatglm.py benches/peer/compare.py benches/peer/tiny_chatglm.py "$folder/peer/"
if [ -n "$packages" ]; then
    mkdir "$folder/packages"
    cp -r "$packages/bitsandbytes" "$folder/packages/"
    find "$folder/packages" -name __pycache__ -prune -exec rm -r {} +
    find "$folder/packages" -name '*.so' ! -name '*_cpu.so' ! -name '*_cuda130.so' -delete
fi
git rev-parse HEAD >"$folder/commit" 2>/dev/null || echo unknown >"$folder/commit"

bytes=$(du -sb "$folder" | cut -f1)
echo "$folder: $((bytes / 1000000)) MB"
if [ "$bytes" -gt 60000000 ]; then
    echo "error: more than 60 MB" >&2
    exit 1
fi
