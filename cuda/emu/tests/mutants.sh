#!/usr/bin/env bash
# Builds mutants.cu once right and once with each planted bug; the right one must pass and each bug must be caught, by
# the results at some schedule and by the checker. Called by run.sh with its scratch folder.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cuda=$(cd "$here/../.." && pwd)
out=$1
cxx=${CXX:-g++}
flags=(-std=c++17 -O1 -g -Wall -Wextra -Werror -Wno-unknown-pragmas -ffp-contract=off -DGLM_EMULATOR)
flags+=(-I "$cuda" -I "$cuda/emu" -I "$here")
tsan=(-fsanitize=thread --param tsan-instrument-func-entry-exit=0)
count=$(sed -n 's/^#define MUTANTS //p' "$here/mutants.h")

"$cxx" "${flags[@]}" -c "$here/mutants.cpp" -o "$out/mutants.o"
"$cxx" "${flags[@]}" -c "$cuda/emu/emu.cpp" -o "$out/mutants-emu.o"
"$cxx" "${flags[@]}" -DEMU_CHECK -c "$cuda/emu/emu.cpp" -o "$out/mutants-check.o"
status=0
for mutant in $(seq 0 "$count"); do
    "$cxx" "${flags[@]}" -DMUTANT="$mutant" -c -x c++ "$here/mutants.cu" -o "$out/mutant.o" &
    plain=$!
    "$cxx" "${flags[@]}" -DMUTANT="$mutant" "${tsan[@]}" -c -x c++ "$here/mutants.cu" -o "$out/mutant-check.o"
    wait $plain
    "$cxx" "$out"/{mutant,mutants,mutants-emu}.o -o "$out/mutant" -ldl -lpthread
    "$cxx" "$out"/{mutant-check,mutants,mutants-check}.o -o "$out/mutant-check" -ldl -lpthread
    for mode in mutant mutant-check; do
        echo "== $mode $mutant"
        code=0
        "$out/$mode" || code=$?
        want=1
        [ "$mutant" != 0 ] || want=0
        if [ $code != $want ]; then
            echo "FAILED: $mode $mutant ended with $code, want $want"
            status=1
        fi
    done
done
[ $status = 0 ] && echo "mutants: all caught"
exit $status
