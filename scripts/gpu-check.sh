#!/usr/bin/env bash
# Everything that only a real card can show, in under 10 minutes, from a folder that scripts/pack-gpu-check.sh made:
#   bash gpu-check.sh [--out DIR] [FOLDER]    default: the folder of this script; results in FOLDER/results
# Every step has a time limit and a failed one does not stop the rest; what cannot run here says SKIPPED and why. Without a
# card everything that needs none still runs, small.
# Results: summary.txt (what is printed), check.log (the output of every step), *.json (the figures), lane_maps.txt.
set -uo pipefail

here=$(cd "$(dirname "$0")" && pwd)
out=
folder=$here
while [ $# -gt 0 ]; do
    case $1 in
        --out)
            out=${2:?--out needs a folder}
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
if [ ! -x "$folder/glmtune" ]; then
    echo "error: $folder/glmtune: found no program, expected a folder made by scripts/pack-gpu-check.sh" >&2
    exit 1
fi
folder=$(cd "$folder" && pwd)
mkdir -p "${out:=$folder/results}"
out=$(cd "$out" && pwd)
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
: >"$out/check.log"
: >"$out/summary.txt"

started=$SECONDS
total=580 # seconds for all steps together
failed=0

say() {
    echo "$*" | tee -a "$out/summary.txt"
}

report() { # name, verdict, seconds, remark
    say "$(printf '%-18s %-8s %4s s  %s' "$1" "$2" "$3" "${4:-}")"
}

skip() { # name, reason
    report "$1" SKIPPED 0 "$2"
}

# Runs a command for at most `limit` seconds; its last line is the remark.
step() { # name, limit, command...
    local name=$1 limit=$2 left=$((total - (SECONDS - started))) begun=$SECONDS log="$logs/$1" code verdict
    shift 2
    if [ "$left" -lt 5 ]; then
        skip "$name" "no time left"
        return 1
    fi
    timeout --kill-after=5 "$((limit < left ? limit : left))" "$@" >"$log" 2>&1 </dev/null
    code=$?
    {
        echo "=== $name: $*"
        cat "$log"
        echo "=== exit code $code, $((SECONDS - begun)) s"
        echo
    } >>"$out/check.log"
    case $code in
        0) verdict=ok ;;
        124 | 137) verdict=TIMEOUT ;;
        *) verdict="FAILED" ;;
    esac
    report "$name" "$verdict" "$((SECONDS - begun))" "$(grep -v '^$' "$log" | tail -1 | cut -c 1-150)"
    if [ "$code" -ne 0 ]; then
        failed=$((failed + 1))
        grep -E 'panicked|error|Error|FAILED|mismatch' "$log" | head -5 | sed 's/^/    /' | tee -a "$out/summary.txt"
        return 1
    fi
}

say "glmtune $(cut -c 1-12 "$folder/commit"), $(date -u '+%Y-%m-%d %H:%M') UTC, $(uname -sm)"
command -v nvidia-smi >/dev/null && say "$(nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,temperature.gpu,power.draw --format=csv,noheader 2>/dev/null | head -4)"
step doctor 30 "$folder/glmtune" doctor
sed 's/^/    /' "$logs/doctor" | tee -a "$out/summary.txt"

card=no
why="no card: see doctor"
if grep -q '^cuda:0 ' "$logs/doctor" && grep -q '^auto .*cuda:0' "$logs/doctor"; then
    card=yes
elif grep -q '^cuda:0 ' "$logs/doctor"; then
    why="not a card: see doctor"
fi
glmtune=$folder/glmtune
export GLMTUNE_GOLDENS=$folder/goldens
export PYTHONPATH=$folder/packages${PYTHONPATH:+:$PYTHONPATH}

# --- Is it right? -----------------------------------------------------------------------------------------------------
if [ $card = yes ]; then
    # Compared with the emulator's answer, which is compiled in.
    GLMTUNE_LANE_MAPS=$out/lane_maps.txt step "lane maps" 20 "$folder/cuda-tests" lane_maps
    step operations 90 "$folder/cuda-tests" --skip lane_maps
    step goldens 90 "$folder/golden-tests" forward gradients trajectories generation peft
    step "every kernel runs" 30 "$glmtune" bench kernels --quick --device cuda
else
    for name in "lane maps" operations goldens; do
        skip "$name" "$why"
    done
    # On the CPU the tests themselves run in `cargo test`; here only that the carried executables start.
    step "tests start" 20 bash -c '"$0" --list | tail -1 && "$1" --list | tail -1' "$folder/cuda-tests" "$folder/golden-tests"
    step "kernels, small" 30 "$glmtune" bench kernels --quick --device cpu --json "$out/kernels.json"
    step "training, small" 20 "$glmtune" bench train --quick --device cpu --json "$out/train.json"
    step "decoding, small" 20 "$glmtune" bench decode --quick --device cpu --json "$out/decode.json"
fi

# --- Is it fast? ------------------------------------------------------------------------------------------------------
if [ $card = yes ]; then
    step training 60 "$glmtune" bench train --device cuda --length 512,2048 --json "$out/train.json"
    step decoding 40 "$glmtune" bench decode --device cuda --json "$out/decode.json"
    # Does it fit? The driver's own figure beside the plan, at ChatGLM-6B's size.
    step "6 GB" 60 "$glmtune" bench memory --device cuda --vram 6GB --length 512,2048,8192 --steps 2 --json "$out/memory-6gb.json"
    step "8 GB" 60 "$glmtune" bench memory --device cuda --vram 8GB --length 512,2048,8192 --steps 2 --json "$out/memory-8gb.json"
    step "12 GB" 60 "$glmtune" bench memory --device cuda --vram 12GB --length 512,2048,8192 --steps 2 --json "$out/memory-12gb.json"
    step "full, 24 GB" 120 "$glmtune" bench memory --device cuda --full --vram 24GB --length 512 --steps 2 --json "$out/memory-full.json"
    step "ways to save" 180 "$glmtune" bench memory --device cuda --length 2048 --rounds 2 --steps 3 --json "$out/memory.json"
    step kernels 90 "$glmtune" bench kernels --device cuda --json "$out/kernels.json"
else
    for name in training decoding kernels; do
        skip "$name" "$why"
    done
fi

# --- And beside PyTorch, bitsandbytes and PEFT? -----------------------------------------------------------------------
python=${GLMTUNE_PYTHON:-python3}
if ! "$python" -c 'import torch, bitsandbytes, peft' >"$logs/python" 2>&1; then
    skip peer "$(tail -1 "$logs/python")"
elif [ $card = yes ] && [ $((total - (SECONDS - started))) -lt 120 ]; then
    skip peer "no time left"
elif [ $card = yes ]; then
    # It starts no round that would end later than this, and needs a while to make its model.
    left=$((total - (SECONDS - started)))
    seconds=$((left - 110))
    step peer "$((left - 60))" "$python" "$folder/peer/compare.py" --ours "$glmtune" --device cuda \
        --seconds "$((seconds < 180 ? seconds : 180))" --json "$out/peer.json"
else
    step "peer is ChatGLM" 60 "$python" "$folder/peer/chatglm.py"
    step "peer, small" 90 "$python" "$folder/peer/compare.py" --ours "$glmtune" --device cpu --config tiny --rows 1,16 \
        --attention 16 --lengths 16 --contexts 8 --tokens 4 --steps 1 --rounds 1 --seconds 30 --json "$out/peer.json"
fi

# --- Does it touch what it must not? ----------------------------------------------------------------------------------
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -1)
for tool in memcheck racecheck; do
    if [ $card = no ]; then
        skip "$tool" "$why"
    elif [ -z "$sanitizer" ]; then
        skip "$tool" "no compute-sanitizer on this machine"
    else
        step "$tool" 75 "$sanitizer" --tool "$tool" --error-exitcode 9 "$folder/cuda-tests" --test-threads 1
    fi
done

# --- The figures ------------------------------------------------------------------------------------------------------
if [ $card = yes ]; then
    for name in training decoding kernels peer; do
        if [ -s "$logs/$name" ]; then
            say ""
            say "== $name"
            cat "$logs/$name" | tee -a "$out/summary.txt"
        fi
    done
fi
say ""
say "$((SECONDS - started)) s, $failed steps failed; results in $out"
[ "$failed" -eq 0 ]
