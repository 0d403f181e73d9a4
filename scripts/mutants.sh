#!/usr/bin/env bash
# Plants the bugs of tests/cuda/mutants.list in the kernels, one at a time: each must fail its test, which must pass on the
# kernels as they are. bash scripts/mutants.sh [names]
#
# PART=i/n: only every n-th mutant, from the i-th on (i from 0), for checks that have little time.
# The test program is built once (features: FEATURES, emu unless set). A mutant is a shared library of the emulator and one
# kernel file, whose kernels the emulator in the test program prefers to its own (cuda/emu/substitute.h).
set -euo pipefail
cd "$(dirname "$0")/.."
list=tests/cuda/mutants.list
cxx=${CXX:-g++}
# Without the bf16 kernels: half the time to compile, and tests cover both types alike.
flags=(-std=c++17 -O1 -g1 -fPIC -ffp-contract=off -Wno-unknown-pragmas -DGLM_EMULATOR -DGLM_HAS_BF16=0)
tsan=(-fsanitize=thread --param tsan-instrument-func-entry-exit=0)
schedules=(0 1 3)
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

fail() {
    echo "error: $*" >&2
    exit 1
}

# A line of the list: a name, the file to change, the .cu to compile, the test, perhaps "checked".
names=()
declare -A file source filter mode old new
while IFS= read -r line; do
    case $line in
    '' | '#'*) ;;
    '- '*) old[$name]+=${old[$name]:+$'\n'}${line#- } ;;
    '+ '*) new[$name]+=${new[$name]:+$'\n'}${line#+ } ;;
    *)
        read -r name changed compiled test how <<<"$line"
        [ -z "${file[$name]:-}" ] || fail "$list: two mutants are called $name"
        names+=("$name")
        file[$name]=$changed source[$name]=$compiled filter[$name]=$test mode[$name]=${how:-plain}
        old[$name]='' new[$name]=''
        ;;
    esac
done <$list
wanted=("${@:-${names[@]}}")
if [ -n "${PART:-}" ]; then
    chosen=()
    for ((i = ${PART%/*}; i < ${#wanted[@]}; i += ${PART#*/})); do
        chosen+=("${wanted[i]}")
    done
    wanted=("${chosen[@]}")
fi
for name in "${wanted[@]}"; do
    [ -n "${file[$name]:-}" ] || fail "$list: no mutant is called $name"
    text=$(<"cuda/${file[$name]}")
    rest=${text#*"${old[$name]}"}
    [ "$rest" != "$text" ] || fail "$name: cuda/${file[$name]} does not contain: ${old[$name]}"
    [[ $rest != *"${old[$name]}"* ]] || fail "$name: cuda/${file[$name]} contains twice: ${old[$name]}"
done

built=$(cargo test --locked --features "${FEATURES:-emu}" --test cuda --no-run --message-format=json-render-diagnostics)
program=$(sed -n '/"kind":\["test"\]/s/.*"executable":"\([^"]*\)".*/\1/p' <<<"$built")
[ -x "$program" ] || fail "cargo names no test program: $program"

# library LIBRARY MODE FOLDER SOURCE: the kernels of SOURCE in FOLDER.
library() {
    local checked=()
    [ "$2" = plain ] || checked=("${tsan[@]}")
    "$cxx" "${flags[@]}" "${checked[@]}" -I "$3" -I "$3/emu" -c -x c++ "$3/$4" -o "$1.o" &&
        "$cxx" -shared -Wl,-Bsymbolic "$1.o" "$out/emu-$2.o" -o "$1" -ldl -lpthread
}

# attempt LIBRARY SCHEDULE LOG FILTERS...: what the tests end with.
attempt() {
    local library=$1 schedule=$2 log=$3 code=0
    shift 3
    GLMTUNE_EMU_KERNELS=$library GLMTUNE_EMU_SCHEDULE=$schedule RUST_BACKTRACE=0 \
        timeout 120 "$program" --test-threads=1 "$@" >"$log" 2>&1 || code=$?
    return $code
}

# Are the tests fine with the kernels as they are, compiled like a mutant's?
control() { # mode source filters...
    local so=$out/control-$1-$2 log=$out/control-$1-$2.log schedule
    library "$so" "$1" cuda "$2"
    for schedule in "${schedules[@]}"; do
        if ! attempt "$so" "$schedule" "$log" "${@:3}" || grep -q SKIPPED "$log" || ! grep -q '^test .* ok$' "$log"; then
            echo "FAILED  $2 as it is ($1), schedule $schedule"
            cat "$log"
            return 1
        fi
    done
}

mutant() { # name
    local so=$out/$1 copy=$out/cuda-$1 log=$out/$1.log text schedule code
    cp -r cuda "$copy"
    text=$(<"cuda/${file[$1]}")
    printf '%s\n' "${text/"${old[$1]}"/"${new[$1]}"}" >"$copy/${file[$1]}"
    if ! library "$so" "${mode[$1]}" "$copy" "${source[$1]}"; then
        echo "FAILED  $1: does not compile"
        return 1
    fi
    for schedule in "${schedules[@]}"; do
        code=0
        attempt "$so" "$schedule" "$log" "${filter[$1]}" || code=$?
        if [ $code = 101 ] && grep -q '^test .* FAILED$' "$log"; then
            echo "caught  $1: schedule $schedule, ${mode[$1]}: $(grep -A 1 -m 1 'panicked at' "$log" | tail -n 1 | cut -c 1-150)"
            return
        elif [ $code != 0 ]; then
            echo "FAILED  $1: schedule $schedule: ended with $code, not with a failed test"
            tail -n 5 "$log"
            return 1
        fi
    done
    echo "FAILED  $1: nothing noticed it"
    return 1
}

for how in plain checked; do
    define=()
    [ $how = plain ] || define=(-DEMU_CHECK)
    "$cxx" "${flags[@]}" "${define[@]}" -I cuda -I cuda/emu -c cuda/emu/emu.cpp -o "$out/emu-$how.o" &
done
wait

# Controls first: they take longest.
declare -A filters
for name in "${wanted[@]}"; do
    group="${mode[$name]} ${source[$name]}"
    [[ " ${filters[$group]:-} " == *" ${filter[$name]} "* ]] || filters[$group]+=" ${filter[$name]}"
done
pids=()
start() {
    while [ "$(jobs -pr | wc -l)" -ge "$(nproc)" ]; do
        wait -n || true
    done
    "$@" &
    pids+=($!)
}
for group in "${!filters[@]}"; do
    # shellcheck disable=SC2086
    start control $group ${filters[$group]}
done
for name in "${wanted[@]}"; do start mutant "$name"; done
# Each by its number: `wait -n` may answer for a job that was waited for already.
status=0
for pid in "${pids[@]}"; do
    wait "$pid" || status=1
done
[ $status = 0 ] && echo "mutants: all ${#wanted[@]} caught"
exit $status
