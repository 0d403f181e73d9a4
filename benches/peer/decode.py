"""Tokens per second of CPU time, one thread: glmtune on its formats beside chatglm.cpp on a q4_0 file of the same model.

    decode.py GLMTUNE MODEL Q4_0.bin CHATGLM_CPP_PYTHON [--rounds 5] [--tokens 16 80]

MODEL is a model folder (`glmtune synth`), Q4_0.bin what `glmtune export --format ggml --type q4_0` made of it. Each round runs chatglm.cpp,
then each of our formats, with the smaller and the larger number of tokens; the difference of their user times is that of the tokens in
between, loading and prompt aside. User time does not count the time that other programs took. chatglm.cpp uses as many threads as there are
processors: it is shown one (a library with get_nprocs, compiled by cc, put before the C library's).
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

PROMPT = "你好，请介绍一下北京的天气。"
THEIRS = """
import sys, chatglm_cpp
pipeline = chatglm_cpp.Pipeline(sys.argv[1])
settings = chatglm_cpp._C.GenerationConfig(max_length=2048, max_new_tokens=int(sys.argv[2]), max_context_length=512, do_sample=False,
    top_k=0, top_p=1.0, temperature=1.0, repetition_penalty=1.0)
print(len(list(pipeline._stream_generate_ids(pipeline.tokenizer.encode(sys.argv[3], 512), None, settings))))
"""
OURS = {
    "nf4, head nf4": ["--load-in", "4bit", "--head-storage", "nf4"],
    "nf4": ["--load-in", "4bit"],
    "fp16": ["--load-in", "stored"],
}


def user_time(command, environment=None):
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ["glmtune", "model", "ggml", "python"]:
        parser.add_argument(name)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, nargs=2, default=[16, 80])
    options = parser.parse_args()
    few, many = options.tokens
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "one.c"), Path(folder, "one.so")
        source.write_text("int get_nprocs(void) { return 1; }")
        subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
        alone = dict(os.environ, LD_PRELOAD=str(library))

        def theirs(tokens):
            return user_time([options.python, "-c", THEIRS, options.ggml, str(tokens), PROMPT], alone)

        def ours(flags):
            def run(tokens):
                return user_time([options.glmtune, "generate", "--model", options.model, "--cache-dir", folder, "--prompt", PROMPT, "--greedy",
                                  "--device", "cpu", "--threads", "1", "--max-new-tokens", str(tokens), *flags])
            return run

        runs = {"chatglm.cpp q4_0": theirs} | {name: ours(flags) for name, flags in OURS.items()}
        rates = {name: [] for name in runs}
        runs["nf4"](1)  # makes the 4-bit copy
        for _ in range(options.rounds):
            for name, run in runs.items():
                rates[name].append((many - few) / (run(many) - run(few)))
    base = rates["chatglm.cpp q4_0"]
    for name, values in rates.items():
        ratios = [value / other for value, other in zip(values, base)]
        print(json.dumps(dict(format=name, tokens_per_second=round(statistics.median(values), 2), lowest=round(min(values), 2),
                              highest=round(max(values), 2), ratio=round(statistics.median(ratios), 2),
                              ratio_range=[round(min(ratios), 2), round(max(ratios), 2)])))


if __name__ == "__main__":
    main()
