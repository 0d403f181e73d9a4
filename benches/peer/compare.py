"""glmtune beside PyTorch, bitsandbytes and PEFT on one device, interleaved; prints one table with ratios.

    compare.py --ours PATH_TO_GLMTUNE [--device cuda|cpu] [--config chatglm-6b|tiny] [--what kernels,train,decode]
               [--rows 1,16,...] [--lengths 512,2048] [--rounds 3] [--steps 8] [--seconds 240] [--json FILE]

Each round times the peer, then ours (`glmtune bench ... --json`), on the same device; ratios are taken inside a round, the
median of the rounds is printed. A ratio is peer time / our time (or our rate / the peer's): above 1 we are faster. What
does not work is a line that says so. No round is started that would end after --seconds.

Same protocol on both sides: random data, weights rotated past the cache, device events around many calls, the device kept
busy until the host is ahead; a training step is forward, backward, clipping at norm 1 and AdamW, a quarter of each
sequence context.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import chatglm

ROTATE = 256 << 20
REPEATS = 5
RATES = {"training": "tokens/s", "decode": "tokens/s"}


class Clock:
    """Microseconds of a call."""

    def __init__(self, device, quick):
        self.cuda, self.quick = device == "cuda", quick

    def span(self, call, calls, busy_us=0.0):
        if not self.cuda:
            start = time.perf_counter()
            for i in range(calls):
                call(i)
            us = 1e6 * (time.perf_counter() - start)
            return us, us
        torch.cuda.synchronize()
        if busy_us:
            torch.cuda._sleep(int(2000 * busy_us))  # cycles of about 0.5 ns
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        host = time.perf_counter()
        start.record()
        for i in range(calls):
            call(i)
        end.record()
        host = 1e6 * (time.perf_counter() - host)
        end.synchronize()
        return 1e3 * start.elapsed_time(end), host

    def __call__(self, call, copies=1):
        self.span(call, copies)
        us, host = (value / copies for value in self.span(call, copies))
        calls = 1 if self.quick else int(max(1, min(3000 / us, 2000 / host)) if self.cuda else max(1, 3000 / us))
        calls = -(-calls // copies) * copies
        spans = [self.span(call, calls, 1.25 * host * calls)[0] / calls for _ in range(2 if self.quick else REPEATS)]
        return statistics.median(spans)


def copies_of(size, quick):
    if quick:
        return 2
    return 1 if size >= 2 * ROTATE else min(64, max(4, -(-ROTATE // size)))


def kernel_cases(args, config, dtype):
    """Yields (key of our case, name of the peer, call, copies), the operands made just before."""
    device, quick = args.device, args.config == "tiny"
    normal = lambda *shape, scale=1.0: scale * torch.randn(*shape, device=device, dtype=dtype)
    key = lambda group, case, **shape: (group, case, tuple(sorted(shape.items())))
    side = 128 if quick else 8192
    size = 1 << 16 if quick else 2 * ROTATE
    source, target = torch.randn(size // 4, device=device), torch.empty(size // 4, device=device)
    yield key("ceiling", "copy", bytes=size), "torch", lambda i: target.copy_(source), 1
    a, b, c = normal(side, side), normal(side, side, scale=0.02), normal(side, side)
    yield key("ceiling", "dense product", M=side, N=side, K=side), "torch", lambda i: torch.mm(a, b.t(), out=c), 1
    del source, target, a, b, c
    h, inner = config.hidden_size, config.inner_hidden_size
    for n, k in [(3 * h, h), (h, h), (inner, h), (h, inner)]:
        element = torch.empty(0, dtype=dtype).element_size()
        dense = [normal(n, k, scale=0.02) for _ in range(copies_of(n * k * element, quick))]
        quantized = []
        for i in range(copies_of(n * k // 2, quick)):
            linear = torch.nn.Linear(k, n, device=device, dtype=dtype)
            linear.weight.data.copy_(dense[i % len(dense)])
            quantized.append(chatglm.quantize(linear, dtype))
        states = [layer.weight.quant_state for layer in quantized]
        import bitsandbytes.functional as bf
        yield (key("dequantize", "nf4", N=n, K=k), "bnb",
               lambda i: bf.dequantize_4bit(quantized[i % len(states)].weight.data, states[i % len(states)]), len(states))
        for m in args.rows:
            x, dy = normal(m, k), normal(m, n)
            shape = dict(M=m, N=n, K=k)
            with torch.no_grad():
                y, dx = torch.empty(m, n, device=device, dtype=dtype), torch.empty(m, k, device=device, dtype=dtype)
                for group in ("nf4", "dense"):
                    yield (key(group, "forward", **shape), "torch",
                           lambda i: torch.mm(x, dense[i % len(dense)].t(), out=y), len(dense))
                    yield (key(group, "backward", **shape), "torch",
                           lambda i: torch.mm(dy, dense[i % len(dense)], out=dx), len(dense))
                yield (key("nf4", "forward", **shape), "bnb",
                       lambda i: quantized[i % len(quantized)](x), len(quantized))
            leaf = x.detach().requires_grad_()
            outputs = [layer(leaf) for layer in (quantized if m <= 64 else quantized[:4])]
            yield (key("nf4", "backward", **shape), "bnb",
                   lambda i: torch.autograd.grad(outputs[i % len(outputs)], leaf, dy, retain_graph=True), len(outputs))
            del outputs
    heads = config.num_attention_heads
    d = h // heads
    for s in args.attention:
        q, k, v, dy = (normal(1, heads, s, d) for _ in range(4))
        seen = chatglm.places(1, s, s // 4, device)[1]
        shape = dict(S=s, heads=heads, d=d)
        with torch.no_grad():
            yield (key("attention", "forward", **shape), "torch",
                   lambda i: F.scaled_dot_product_attention(q, k, v, attn_mask=seen), 1)
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        output = F.scaled_dot_product_attention(*leaves, attn_mask=seen)
        yield (key("attention", "backward", **shape), "torch",
               lambda i: torch.autograd.grad(output, leaves, dy, retain_graph=True), 1)
        del output, leaves
        cached = [(normal(1, heads, s + 1, d), normal(1, heads, s + 1, d))
                  for _ in range(copies_of(2 * h * (s + 1) * element, quick))]
        one = q[:, :, :1]
        with torch.no_grad():
            yield (key("attention", "one token", cached=s, heads=heads, d=d), "torch",
                   lambda i: F.scaled_dot_product_attention(one, *cached[i % len(cached)]), len(cached))
        del cached
    with torch.no_grad():
        for m in [m for m in args.rows if m == 1 or m >= 512]:
            xs = [normal(m, h) for _ in range(copies_of(2 * m * h * element, quick))]
            weight, bias = normal(h), normal(h)
            yield (key("norm", "forward", M=m, N=h), "torch",
                   lambda i: F.layer_norm(xs[i % len(xs)], (h,), weight, bias), len(xs))
            yield key("dropout", "forward", M=m, N=h), "torch", lambda i: F.dropout(xs[i % len(xs)], 0.1), len(xs)
            xs = [normal(m, inner) for _ in range(copies_of(2 * m * inner * element, quick))]
            yield (key("gelu", "forward", M=m, N=inner), "torch",
                   lambda i: F.gelu(xs[i % len(xs)], approximate="tanh"), len(xs))
            del xs
    table = normal(config.vocab_size, h, scale=h**-0.5)
    x = normal(1, h)
    with torch.no_grad():
        yield (key("head", "logits", M=1, V=config.vocab_size, K=h), "torch", lambda i: F.linear(x, table), 1)
    most = max(args.rows)
    for rows in [m for m in args.rows if m >= min(most, 512) and m <= 2048]:
        x, labels = normal(rows, h).requires_grad_(), torch.randint(config.vocab_size, (rows,), device=device)

        def loss(i):
            value = F.cross_entropy(F.linear(x, table).float(), labels, reduction="sum")
            torch.autograd.grad(value, x)
            return value.item()

        yield key("head", "loss and gradient", rows=rows, V=config.vocab_size, K=h), "torch", loss, 1
    parameters = []
    for _ in range(config.num_layers):
        for n, k in [(3 * h, h), (h, h), (inner, h), (h, inner)]:
            parameters += [torch.randn(8, k, device=device), torch.randn(n, 8, device=device)]
    for p in parameters:
        p.requires_grad_()
        p.grad = torch.randn_like(p)
    adamw = torch.optim.AdamW(parameters, lr=1e-5, fused=args.device == "cuda")
    count = sum(p.numel() for p in parameters)
    yield (key("adamw", "update", tensors=len(parameters), N=count), "torch", lambda i: adamw.step(), 1)
    yield (key("adamw", "gradient norm", tensors=len(parameters), N=count), "torch",
           lambda i: torch.nn.utils.get_total_norm([p.grad for p in parameters]).item(), 1)


def our_figures(args, what, *flags):
    """What `glmtune bench WHAT` measures; what it cannot measure is in its rows."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "figures.json")
        command = [args.ours, "bench", what, "--device", args.device, "--config", args.config, "--json", str(file), *flags]
        if args.config == "tiny":
            command.append("--quick")
        done = subprocess.run(command, capture_output=True, text=True)
        if not file.exists():
            raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1])
        return json.loads(file.read_text())


class Table:
    """Median times or rates by case, ours and the peers', and the median of the ratios of each round."""

    def __init__(self):
        self.cases = {}  # key -> {"ours": [per round], peer: [per round]}
        self.notes = []

    def add(self, key, who, value):
        self.cases.setdefault(key, {}).setdefault(who, []).append(value)

    def note(self, text):
        if text not in self.notes:
            self.notes.append(text)
            print(f"  {text}", flush=True)

    def rows(self):
        for key, values in self.cases.items():
            ours = values.get("ours", [])
            row = dict(what=key[0], case=key[1], shape=dict(key[2]))
            if ours:
                row["ours"] = statistics.median(ours)
            for who, theirs in values.items():
                if who == "ours":
                    continue
                row[who] = statistics.median(theirs)
                ratios = [(b / a if key[0] not in RATES else a / b) for a, b in zip(ours, theirs)]
                if ratios:
                    row[f"ratio {who}"] = statistics.median(ratios)
                    row[f"range {who}"] = [min(ratios), max(ratios)]
            yield row

    def print(self):
        for what in dict.fromkeys(key[0] for key in self.cases):
            rows = [row for row in self.rows() if row["what"] == what]
            peers = list(dict.fromkeys(who for row in rows for who in row
                                       if who not in ("what", "case", "shape", "ours") and " " not in who))
            unit = RATES.get(what, "us")
            print(f"\n{what + ', ' + unit:<50}{'glmtune':>12}" + "".join(f"{who:>18}{'ratio':>7}{'range':>12}" for who in peers))
            for row in rows:
                letters = sorted(row["shape"], key=lambda letter: "MVNKrSd".find(letter))
                shape = " ".join(f"{letter} {row['shape'][letter]}" for letter in letters)
                line = f"{row['case'] + ' ' + shape:<50}" + (f"{row['ours']:>12.2f}" if "ours" in row else f"{'-':>12}")
                for who in peers:
                    ratio = row.get(f"ratio {who}")
                    line += f"{row[who]:>18.2f}" if who in row else f"{'-':>18}"
                    if ratio is None:
                        line += f"{'-':>7}{'':>12}"
                    else:
                        low, high = row[f"range {who}"]
                        line += f"{ratio:>7.2f}{f'{low:.2f}-{high:.2f}':>12}"
                print(line)


class Deadline:
    def __init__(self, seconds):
        self.end, self.longest = time.monotonic() + seconds, 0.0

    def rounds(self, count):
        """Numbers of rounds, as long as another one is likely to fit."""
        self.longest = 0.0
        for number in range(count):
            start = time.monotonic()
            if number and start + self.longest > self.end:
                print(f"  stopped after {number} of {count} rounds: out of time", flush=True)
                return
            yield number
            self.longest = max(self.longest, time.monotonic() - start)


def free(args):
    gc.collect()
    if args.device == "cuda":
        torch.cuda.empty_cache()


def attempt(table, what, call):
    try:
        return call()
    except Exception as error:  # what one peer cannot do must not stop the rest
        text = str(error).strip().splitlines() or [type(error).__name__]
        table.note(f"{what}: {text[0][:160]}")
        return None


def compare_kernels(args, config, dtype, table, deadline):
    clock = Clock(args.device, args.config == "tiny")
    flags = ["--rows", ",".join(map(str, args.rows)), "--lengths", ",".join(map(str, args.attention))]
    for _ in deadline.rounds(min(args.rounds, 2)):
        def peer():
            for key, who, call, copies in kernel_cases(args, config, dtype):
                us = attempt(table, f"{who} {key[0]} {key[1]} {dict(key[2])}", lambda: clock(call, copies))
                if us is not None:
                    table.add(key, who, us)
        attempt(table, "kernels of the peer", peer)
        free(args)
        figures = attempt(table, "glmtune bench kernels", lambda: our_figures(args, "kernels", *flags))
        for row in (figures or {}).get("cases", []):
            if "us" in row:
                table.add((row["group"], row["case"], tuple(sorted(row["shape"].items()))), "ours", row["us"])
            else:
                table.note(f"glmtune {row['group']} {row['case']} {row['shape']}: {row['error'][:160]}")


class Trainee:
    """A model with adapters and its optimizer."""

    def __init__(self, base, kind, checkpointing, args, config, dtype):
        self.args, self.config = args, config
        inner = chatglm.ChatGlm(config, args.device, dtype, like=base)
        inner.checkpointing = checkpointing
        self.model = chatglm.add_lora(inner, kind).train()
        self.autocast = kind == "peft" and args.device == "cuda"  # as the Hugging Face Trainer with bf16=True
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-3, fused=args.device == "cuda")

    def measure(self, length, steps):
        """Tokens a second, peak bytes, loss."""
        ids, labels, position, seen = chatglm.batch(self.config, self.args.batch, length, self.args.device)
        cuda = self.args.device == "cuda"
        times = []
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        for i in range(2 + steps):
            start = time.perf_counter()
            with torch.autocast(self.args.device, torch.bfloat16, enabled=self.autocast):
                loss = self.model(input_ids=ids, labels=labels, position_ids=position, attention_mask=seen)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            value = loss.item()
            if cuda:
                torch.cuda.synchronize()
            if i >= 2:
                times.append(time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated() if cuda else 0
        return ids.numel() / statistics.median(times), peak, value


def compare_training(args, config, dtype, base, table, deadline):
    variants = {"bnb": ("light", False), "bnb+checkpoint": ("light", True), "peft+checkpoint": ("peft", True)}
    trainees = {}
    for name, (kind, checkpointing) in variants.items():
        made = attempt(table, name, lambda: Trainee(base, kind, checkpointing, args, config, dtype))
        if made:
            trainees[name] = made
    peaks = {}
    for _ in deadline.rounds(args.rounds):
        for name, trainee in trainees.items():
            for length in args.lengths:
                done = attempt(table, f"{name} at {length}", lambda: trainee.measure(length, args.steps))
                free(args)
                if done:
                    rate, peak, loss = done
                    table.add(("training", f"{args.batch} x {length}", ()), name, rate)
                    peaks[name, length] = peak, loss
        flags = ["--batch", str(args.batch), "--length", ",".join(map(str, args.lengths)), "--steps", str(args.steps)]
        figures = attempt(table, "glmtune bench train", lambda: our_figures(args, "train", *flags))
        for row in (figures or {}).get("train", []):
            table.add(("training", f"{row['batch']} x {row['length']}", ()), "ours", row["tokens_per_second"])
            peaks["glmtune", row["length"]] = row["tensor_bytes"] or 0, row["loss_last"]
    print("\npeak memory of tensors, and loss after the last round")
    for (name, length), (peak, loss) in sorted(peaks.items(), key=lambda item: item[0][1]):
        print(f"  {args.batch} x {length:<6}{name:<18}{peak / 1e9:8.2f} GB   loss {loss:.3f}")
    return {f"{name} {length}": dict(peak_bytes=peak, loss=loss) for (name, length), (peak, loss) in peaks.items()}


def compare_decoding(args, config, dtype, base, table, deadline):
    model = chatglm.ChatGlm(config, args.device, dtype, like=base).eval()
    for _ in deadline.rounds(args.rounds):
        for context in args.contexts:
            ids = chatglm.batch(config, 1, context, args.device)[0]
            position, seen = chatglm.places(1, context, context, args.device)

            def measure():
                times, last = [], None
                for token in model.generate(ids, position, None, args.tokens):
                    token.item()
                    now = time.perf_counter()
                    if last is not None:
                        times.append(now - last)
                    last = now
                return 1 / statistics.median(times)

            rate = attempt(table, f"decode at {context}", measure)
            if rate:
                table.add(("decode", f"after {context}", ()), "bnb", rate)
        flags = ["--context", ",".join(map(str, args.contexts)), "--tokens", str(args.tokens)]
        figures = attempt(table, "glmtune bench decode", lambda: our_figures(args, "decode", *flags))
        for row in (figures or {}).get("decode", []):
            table.add(("decode", f"after {row['context']}", ()), "ours", row["tokens_per_second"])


def numbers(text):
    return [int(part) for part in text.split(",")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", required=True, help="the glmtune executable")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--config", choices=list(chatglm.SIZES), default="chatglm-6b")
    parser.add_argument("--what", default="train,decode,kernels")
    parser.add_argument("--rows", type=numbers, default=[1, 16, 64, 512, 2048, 8192])
    parser.add_argument("--attention", type=numbers, default=[512, 2048, 8192], help="lengths of attention's kernels")
    parser.add_argument("--lengths", type=numbers, default=[512, 2048], help="of training")
    parser.add_argument("--contexts", type=numbers, default=[32, 512], help="of decoding")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    deadline, table, found = Deadline(args.seconds), Table(), {}
    config = chatglm.config(args.config)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    torch.manual_seed(0)
    import bitsandbytes
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    versions = f"torch {torch.__version__}, bitsandbytes {bitsandbytes.__version__}"
    print(f"{name}; {versions}; {str(dtype).removeprefix('torch.')}", flush=True)
    what = args.what.split(",")
    if "train" in what or "decode" in what:
        start = time.monotonic()
        base = chatglm.ChatGlm(config, args.device, dtype)
        print(f"peer's model made in {time.monotonic() - start:.1f} s", flush=True)
        if "train" in what:
            found["memory"] = compare_training(args, config, dtype, base, table, deadline)
            free(args)
        if "decode" in what:
            compare_decoding(args, config, dtype, base, table, deadline)
        del base
        free(args)
    if "kernels" in what:
        compare_kernels(args, config, dtype, table, deadline)
    table.print()
    if args.json:
        figures = dict(device=name, versions=versions, cases=list(table.rows()), notes=table.notes, **found)
        args.json.write_text(json.dumps(figures, indent=1))
    return 0 if any("ours" in case and len(case) > 1 for case in table.cases.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
