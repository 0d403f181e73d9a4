#!/usr/bin/env bash
# The real peers on what glmtune writes: bash scripts/interop.sh CODE [WORK]
#
# CODE is a folder with the official Python files of ChatGLM-6B (configuration_chatglm.py, modeling_chatglm.py, tokenization_chatglm.py,
# quantization.py and tokenizer_config.json of huggingface.co/THUDM/chatglm-6b); they are not part of this project. Trains two small
# adapters on the built-in model, merges and exports them in every form, and asks the peers: the official code, PEFT, bitsandbytes,
# chatglm.cpp built from source, TensorBoard. One line of JSON for each answer; ends with 1 when a peer disagrees. WORK (default:
# target/interop) receives the environments and the files. What was seen stands in docs/interop.md.
set -euo pipefail
cd "$(dirname "$0")/.."
code=${1:?"give the folder with the official Python files"}
work=${2:-target/interop}
mkdir -p "$work"
base=models/tiny-glm
prompts=(
    "抽取故障三元组：\n小刚说滚筒经常不通电，还有电热毯总是老化。"
    "抽取故障三元组：\n客户反映门铃又冒烟，请尽快处理。"
    "抽取故障三元组：\n热水器有异味，导致车载导航突然卡死。"
    "抽取故障三元组：\n昨天发现轮胎漏气，变速箱也异响。"
)
for i in "${!prompts[@]}"; do prompts[i]=$(printf '%b' "${prompts[i]}"); done

environment() { # NAME PACKAGE... : a virtual environment with these packages
    local name=$1
    shift
    if [ ! -e "$work/$name/done" ]; then
        python3 -m venv "$work/$name"
        "$work/$name/bin/pip" install -q "$@"
        touch "$work/$name/done"
    fi
}
# The official code of 2023 needs a transformers of its time; PEFT and bitsandbytes are today's.
[ -n "${OFFICIAL_PYTHON:-}" ] || environment official torch numpy safetensors sentencepiece "transformers==4.30.2"
[ -n "${PEER_PYTHON:-}" ] || environment peer torch numpy safetensors "peft==0.21.2" "transformers==5.23.0" "bitsandbytes==0.50.2"
if [ -z "${CPP_PYTHON:-}" ]; then
    # Its CMake files ask for a policy that CMake 4 has dropped.
    export CMAKE_POLICY_VERSION_MINIMUM=3.5
    environment cpp --no-binary chatglm-cpp "chatglm-cpp==0.4.2" numpy safetensors
fi
official=${OFFICIAL_PYTHON:-$work/official/bin/python}
peer=${PEER_PYTHON:-$work/peer/bin/python}
cpp=${CPP_PYTHON:-$work/cpp/bin/python}

cargo build --release --locked --bin glmtune --example logits
glmtune=target/release/glmtune
logits=target/release/examples/logits
files="$work/files"
rm -rf "$files"
mkdir -p "$files"

failed=0
ask() {
    echo "== $*" >&2
    "$@" || failed=1
}
ours() { # NAME MODEL: our logits and answers
    "$logits" "$2" "$files/$1.safetensors" 32 "${prompts[@]}" >"$files/$1.jsonl"
}

for method in lora qlora; do
    "$glmtune" train --model "$base" --data examples/demo/train.jsonl --method $method --device cpu --max-steps 300 --learning-rate 2e-3 \
        --lora-r 4 --cache-dir "$files/cache" --output "$files/$method" >"$files/$method.log" 2>&1
done

# 1. Merged folders in the official code, computed in fp32: the order of sums is all that differs. It holds every weight in fp16, whatever
# the file says, so that is what is written.
for form in original:lora dequantized:qlora; do
    IFS=: read -r into method <<<"$form"
    name="merged-$method"
    "$glmtune" merge --model "$base" --adapter "$files/$method" --into "$into" --type fp16 --device cpu --output "$files/$name"
    cp "$code"/*.py "$code/tokenizer_config.json" "$files/$name/"
    ours "$name" "$files/$name"
    ask "$official" benches/peer/interop.py official "$files/$name" "$files/$name.safetensors" "${prompts[@]}"
done

# 2. The adapter in PEFT, as it was trained and as `export --format peft` writes it.
"$glmtune" export --format peft --model "$base" --adapter "$files/lora" --output "$files/peft"
for adapter in lora qlora peft; do
    ask "$peer" benches/peer/check_peft.py "$files/$adapter" "$base"
done

# 3. Four bits in bitsandbytes, with and without double quantisation, in both tables.
for form in nf4: nf4:--no-double-quant fp4:; do
    IFS=: read -r kind flag <<<"$form"
    name="bnb-$kind$flag"
    # Two rounds of rounding: the bound is given, the loss of the format is in the table that export prints.
    "$glmtune" export --format bnb --type "$kind" $flag --model "$base" --adapter "$files/qlora" --device cpu --output "$files/$name"
    ours "$name" "$files/$name"
    ask "$peer" benches/peer/interop.py bnb "$files/$name" "$files/$name.safetensors" "${prompts[@]}"
done

# 4. THUDM's int4 and int8: the official kernels run on cards alone, so it is its formula that is compared, in PyTorch.
for bits in 4 8; do
    "$glmtune" export --format "thudm-int$bits" --model "$base" --adapter "$files/lora" --device cpu --output "$files/int$bits"
    ours "int$bits" "$files/int$bits"
    ask "$peer" benches/peer/interop.py thudm "$files/int$bits" "$files/int$bits.safetensors"
done

# 5. GGML in chatglm.cpp itself: greedy answers, token by token.
for kind in f32 f16 q8_0 q5_1 q5_0 q4_1 q4_0; do
    "$glmtune" export --format ggml --type "$kind" --model "$base" --adapter "$files/lora" --device cpu --output "$files/$kind.bin"
    TOKENIZER="$base" ours "$kind" "$files/$kind.bin"
    ask "$cpp" benches/peer/interop.py cpp "$files/$kind.bin" "$files/$kind.safetensors" "${prompts[@]}" --tokens 32
done

# 6. TensorBoard on the events of the run.
ask python3 scripts/check-tensorboard.py "$files/lora"
exit $failed
