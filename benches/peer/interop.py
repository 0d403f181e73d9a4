"""Do the real peers read what glmtune writes, and say the same?

    interop.py official MODEL LOGITS [--dtype float16]   the official PyTorch code beside our logits (transformers 4.30)
    interop.py bnb MODEL LOGITS                          bitsandbytes' own Linear4bit beside our logits
    interop.py thudm MODEL LOGITS                        THUDM's formula of int4 and int8 in PyTorch beside our logits
    interop.py cpp FILE LOGITS                           chatglm.cpp itself: greedy tokens beside ours (chatglm-cpp)

LOGITS is what `examples/logits.rs` wrote; its standard output lies beside it, as .jsonl. Each prints one line of JSON and
ends with 1 when the two disagree. `scripts/interop.sh` runs all of it.
"""

import argparse
import json
import sys
from pathlib import Path

# Largest difference of a logit that two orders of summation in float32 explain, by the spread of the logits (measured: 1e-6 to 5e-6).
SUMS = 2e-5
# chatglm.cpp rounds activations to 8 bits before it multiplies them with weights in few bits: where its answer leaves ours, the two
# tokens must have been as close as that explains, by the spread of the logits.
ACTIVATIONS = 0.2


def numbers(path):
    """[(ids, logits)] of a file of examples/logits.rs, as tensors."""
    import torch
    from safetensors.numpy import load_file

    file = {name: torch.from_numpy(value) for name, value in load_file(path).items()}
    return [(file[f"ids.{i}"].long(), file[f"logits.{i}"]) for i in range(len(file) // 2)]


def compare(what, pairs, bound, **more):
    """pairs: (theirs, ours) logits [N, V]."""
    import torch

    theirs, ours = (torch.cat([pair[i].double() for pair in pairs]) for i in (0, 1))
    worst = (theirs - ours).abs().max().item()
    spread = ours.std().item()
    top = (theirs.argmax(-1) == ours.argmax(-1)).float().mean().item()
    fine = worst <= bound * spread  # NaN is not
    print(json.dumps(dict(peer=what, positions=len(ours), max_difference=worst, spread=spread, relative=worst / spread,
                          bound=bound, top1=top, equal=fine, **more)))
    return fine


def rows(logits, ids, count):
    """The rows of logits [S, V] after which the last `count` tokens of ids come."""
    return logits[len(ids) - 1 - count : len(ids) - 1]


def official(options):
    import torch
    import transformers

    load = dict(trust_remote_code=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model, **load)
    model, info = transformers.AutoModel.from_pretrained(options.model, output_loading_info=True, **load)
    # The head is tied; the frequencies are computed.
    expected = lambda name: name == "lm_head.weight" or name.endswith("inv_freq")
    lost = {key: left for key, value in info.items() if (left := [name for name in value if not expected(name)])}
    model = model.to(getattr(torch, options.dtype)).float().eval()
    pairs, same_ids = [], True
    with torch.no_grad():
        for prompt, (ids, ours) in zip(options.prompts, numbers(options.logits)):
            # The tokenizer of the folder, too: prompt, [gMASK], <sop>.
            same_ids &= tokenizer(prompt)["input_ids"] == ids[: len(ids) - len(ours)].tolist()
            pairs.append((rows(model(ids[None]).logits[0], ids, len(ours)), ours))
    fine = compare("official code", pairs, SUMS, transformers=transformers.__version__, torch=torch.__version__,
                   lost=lost, same_ids=same_ids)
    return fine and same_ids and not lost


def bnb(options):
    import bitsandbytes
    import torch
    from safetensors import safe_open
    from tiny_chatglm import Config, TinyChatGLM

    config = Config.read(options.model)
    config["quantization_config"]["load_in_4bit"]  # written as transformers writes it
    model = TinyChatGLM(config).eval()
    tensors = {}
    for file in sorted(Path(options.model).glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            tensors.update({name: opened.get_tensor(name) for name in opened.keys()})
    count = 0
    for name in [name for name in tensors if name.split(".quant_state.")[0] + ".absmax" in tensors and ".quant_state." in name]:
        weight = name.split(".quant_state.")[0]
        parts = {key: tensors.pop(key) for key in list(tensors) if key.startswith(weight + ".")}
        # As transformers loads a quantised checkpoint.
        packed = bitsandbytes.nn.Params4bit.from_prequantized(
            data=tensors.pop(weight), quantized_stats=parts, requires_grad=False, device="cpu")
        owner = model.get_submodule(weight.rsplit(".", 2)[0])
        old = getattr(owner, weight.split(".")[-2])
        new = bitsandbytes.nn.Linear4bit(old.in_features, old.out_features, compute_dtype=torch.float32)
        new.weight = packed
        new.bias = torch.nn.Parameter(tensors.pop(weight.replace(".weight", ".bias")).float(), requires_grad=False)
        new.quant_state = packed.quant_state
        # Decoded to float32: bitsandbytes rounds to the type that was quantised, training here does not.
        new.weight.quant_state.dtype = torch.float32
        setattr(owner, weight.split(".")[-2], new)
        count += 1
    rest = {name: value.float() for name, value in tensors.items()}
    lost = model.load_state_dict(rest, strict=False)
    # The head is tied: it may be missing.
    missing = [name for name in lost.missing_keys if name != "lm_head.weight" and "mlp.dense" not in name and "attention" not in name]
    if "lm_head.weight" not in rest:
        model.lm_head.weight = model.transformer.word_embeddings.weight
    pairs = []
    with torch.no_grad():
        for ids, ours in numbers(options.logits):
            pairs.append((rows(model(ids[None])[0], ids, len(ours)), ours))
    fine = compare("bitsandbytes", pairs, SUMS, bitsandbytes=bitsandbytes.__version__, linears=count, missing=missing,
                   unexpected=lost.unexpected_keys)
    return fine and count == 4 * config.num_layers and not missing and not lost.unexpected_keys


def thudm(options):
    import torch
    from tiny_chatglm import Config, TinyChatGLM

    config = Config.read(options.model)
    tensors = {}
    for file in sorted(Path(options.model).glob("*.bin")):
        tensors.update(torch.load(file, weights_only=True))
    scales = [name for name in tensors if name.endswith(".weight_scale")]
    for name in scales:
        weight, codes = name.removesuffix("_scale"), tensors[name.removesuffix("_scale")]
        if config.quantization_bit == 4:
            # The even column in the high nibble; both are signed.
            codes = torch.stack([codes >> 4, (codes << 4) >> 4], -1).flatten(1)
        tensors[weight] = codes.float() * tensors.pop(name).float()[:, None]
    model = TinyChatGLM(config).eval()
    rest = {name: value.float() for name, value in tensors.items() if "inv_freq" not in name}
    rest.setdefault("lm_head.weight", rest["transformer.word_embeddings.weight"])
    model.load_state_dict(rest)
    pairs = []
    with torch.no_grad():
        for ids, ours in numbers(options.logits):
            pairs.append((rows(model(ids[None])[0], ids, len(ours)), ours))
    fine = compare(f"THUDM int{config.quantization_bit}", pairs, SUMS, linears=len(scales))
    return fine and len(scales) == 4 * config.num_layers


def cpp(options):
    import chatglm_cpp
    from safetensors.numpy import load_file

    pipeline = chatglm_cpp.Pipeline(options.model)
    settings = chatglm_cpp._C.GenerationConfig(
        max_length=2048, max_new_tokens=options.tokens, max_context_length=2048, do_sample=False, top_k=0, top_p=1.0,
        temperature=1.0, repetition_penalty=1.0)
    answers = [json.loads(line) for line in Path(options.logits).with_suffix(".jsonl").read_text().splitlines()]
    file = load_file(options.logits)
    same, lengths, gaps = 0, [], []
    for number, (prompt, answer) in enumerate(zip(options.prompts, answers)):
        logits = file[f"logits.{number}"]
        ids = pipeline.tokenizer.encode(prompt, 2048)
        theirs, ours = list(pipeline._stream_generate_ids(ids, None, settings)), answer["ids"]
        same += theirs == ours
        lengths.append(len(ours))
        for i, (a, b) in enumerate(zip(theirs, ours)):
            if a != b:
                gaps.append([i, (logits[i, b] - logits[i, a]).item() / logits.std().item()])
                break
    exact = Path(options.model).stem in ("f32", "f16")
    fine = same == len(answers) if exact else all(gap <= ACTIVATIONS for _, gap in gaps)
    print(json.dumps(dict(peer="chatglm.cpp", version=chatglm_cpp.__version__, file=Path(options.model).name, answers=len(answers),
                          same=same, tokens=lengths, left_at=gaps, equal=fine)))
    return fine


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=["official", "bnb", "thudm", "cpp"])
    parser.add_argument("model")
    parser.add_argument("logits")
    parser.add_argument("prompts", nargs="*")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(not {"official": official, "bnb": bnb, "thudm": thudm, "cpp": cpp}[options.peer](options))


if __name__ == "__main__":
    main()
