#!/usr/bin/env bash
# Builds and runs the emulator's own tests with g++ alone: plainly, under ASan and UBSan, with the checker of shared
# memory; then the mutants, each of which must be caught. bash cuda/emu/tests/run.sh [scratch folder]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cuda=$(cd "$here/../.." && pwd)
out=${1:-$(mktemp -d)}
mkdir -p "$out"
[ $# -gt 0 ] || trap 'rm -rf "$out"' EXIT
cxx=${CXX:-g++}
flags=(-std=c++17 -g -Wall -Wextra -Werror -Wno-unknown-pragmas -ffp-contract=off -DGLM_EMULATOR)
flags+=(-I "$cuda" -I "$cuda/emu" -I "$here")
# Calls at loads and stores that check.h defines; libtsan is not linked.
tsan=(-fsanitize=thread --param tsan-instrument-func-entry-exit=0)

compile() { # object source flags...
    local object=$1 source=$2
    shift 2
    "$cxx" "${flags[@]}" "$@" -c -x c++ "$source" -o "$out/$object"
}

tests() { # name, flags of kernels, flags of everything
    local name=$1 kernel_flags=$2 all_flags=$3
    # shellcheck disable=SC2086
    {
        compile "$name-main.o" "$here/main.cpp" $all_flags &
        local main=$!
        compile "$name-kernels.o" "$here/kernels.cu" $kernel_flags $all_flags
        compile "$name-lane_maps.o" "$cuda/lane_maps.cu" $kernel_flags $all_flags
        compile "$name-emu.o" "$cuda/emu/emu.cpp" $all_flags
        wait $main
        "$cxx" $all_flags "$out/$name"-{kernels,lane_maps,main,emu}.o -o "$out/$name" -ldl -lpthread
    }
    echo "== $name"
    "$out/$name"
}

tests plain "" "-O2"
tests ucontext "" "-O1 -DEMU_UCONTEXT"
tests sanitized "" "-O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined"
tests checked "${tsan[*]}" "-O1 -DEMU_CHECK"

bash "$here/mutants.sh" "$out"
