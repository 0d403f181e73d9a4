"""Training-step throughput of PyTorch eager, alone or interleaved with glmtune.

    bench.py [--config h128,h256,h512] [--mode lora,full,qlora] [--threads 1,2] [--rounds 5] [--seconds 2]
             [--ours PATH_TO_STEP_BENCH]

One step is forward, backward and AdamW over random tokens of one fixed batch: a quarter of each sequence is context,
the rest supervised. `lora` puts r = 8, alpha = 16 on all four linears of every layer (`--targets` changes that),
`qlora` the same on bitsandbytes' NF4 `Linear4bit` (double quantisation, float32 compute), `full` trains everything.

With --ours, each round times PyTorch, then ours, on the same cores; the ratio is taken inside a round and the median
of the rounds is reported, so that a drift of the machine cancels. Ours is called as
    PATH --json --config C --mode M --threads T --seconds S
and must print one JSON object per line with config, mode, threads and tokens_per_second.
"""

import argparse
import json
import os
import statistics
import subprocess
import time

import torch

from tiny_chatglm import LINEARS, SIZES, Config, TinyChatGLM, add_lora, quantize_linears

BATCH = {"h128": (2, 64), "h256": (2, 128), "h512": (1, 128)}


def load_average():
    with open("/proc/loadavg") as file:
        return float(file.read().split()[0])


def batch(config, size, length):
    """Random ids with [gMASK] <sop> after a quarter of the sequence."""
    ids = torch.randint(5, config.mask_token_id, (size, length))
    start = length // 4
    ids[:, start - 1], ids[:, start], ids[:, -1] = config.gmask_token_id, config.bos_token_id, config.eos_token_id
    labels = ids.clone()
    labels[:, :start] = -100
    return ids, labels


class Peer:
    """A PyTorch training step kept warm between rounds."""

    def __init__(self, name, mode, targets):
        torch.manual_seed(0)
        config = Config.tiny(**SIZES[name])
        self.model = TinyChatGLM(config)
        if mode == "qlora":
            quantize_linears(self.model)
        if mode in ("lora", "qlora"):
            add_lora(self.model, targets=targets)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)
        self.ids, self.labels = batch(config, *BATCH[name])
        for _ in range(3):
            self.step()

    def step(self):
        self.optimizer.zero_grad(set_to_none=True)
        loss, _ = self.model(self.ids, labels=self.labels)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def tokens_per_second(self, seconds):
        steps, start = 0, time.perf_counter()
        while True:
            self.step()
            steps += 1
            passed = time.perf_counter() - start
            if passed >= seconds:
                return steps * self.ids.numel() / passed


def ours(path, name, mode, threads, seconds):
    command = [path, "--json", "--config", name, "--mode", mode, "--threads", str(threads), "--seconds", str(seconds)]
    environment = os.environ | {"RAYON_NUM_THREADS": str(threads)}
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    for line in output.splitlines():
        if line.startswith("{"):
            row = json.loads(line)
            if (row["config"], row["mode"], row["threads"]) == (name, mode, threads):
                return row["tokens_per_second"]
    raise SystemExit(f"{' '.join(command)}: no JSON line for this case in its output:\n{output}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="h128,h256,h512")
    parser.add_argument("--mode", default="lora,full,qlora")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--targets", default=",".join(LINEARS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--ours", help="the step benchmark's executable")
    args = parser.parse_args()
    for name in args.config.split(","):
        for mode in args.mode.split(","):
            for threads in map(int, args.threads.split(",")):
                torch.set_num_threads(threads)
                before = load_average()
                peer = Peer(name, mode, args.targets.split(","))
                theirs, mine = [], []
                for _ in range(args.rounds):
                    theirs.append(peer.tokens_per_second(args.seconds))
                    if args.ours:
                        time.sleep(0.3)  # PyTorch's worker threads spin for a while after their last task
                        mine.append(ours(args.ours, name, mode, threads, args.seconds))
                size, length = BATCH[name]
                row = dict(config=name, mode=mode, threads=threads, batch=size, length=length,
                           torch_tokens_per_second=round(statistics.median(theirs)),
                           torch_range=[round(min(theirs)), round(max(theirs))])
                if mine:
                    ratios = [a / b for a, b in zip(mine, theirs)]
                    row |= dict(ours_tokens_per_second=round(statistics.median(mine)),
                                ratio=round(statistics.median(ratios), 3),
                                ratio_range=[round(min(ratios), 3), round(max(ratios), 3)])
                print(json.dumps(row | dict(load_average=[before, load_average()])), flush=True)


main()
