"""The tiny model in PyTorch: trains the base, then proves that QLoRA teaches it the demo's task.

    prototype.py base base.jsonl MODEL_DIR [--minutes M] [--lr LR]     writes model.safetensors (fp16) beside config.json
    prototype.py demo MODEL_DIR DEMO_DIR [--tokens N] [--lr LR]        NF4 base + LoRA r8 on all linears, before and after
"""

import argparse
import json
import math
import random
import sys
import time
import unicodedata
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benches" / "peer"))
from tiny_chatglm import LINEARS, Config, TinyChatGLM, add_lora, blocked, positions, quantize_linears, replace_linears

IGNORE = -100


class Encoder:
    def __init__(self, folder, config):
        self.sp = sentencepiece.SentencePieceProcessor(model_file=str(Path(folder, "ice_text.model")))
        self.config = config

    def ids(self, text):
        return self.sp.encode(text.replace("\n", "<n>"))

    def prompt(self, record):
        # As glmtune joins them.
        query = "\n".join(filter(None, [record["instruction"], record["input"]]))
        return self.ids(query) + [self.config.gmask_token_id, self.config.bos_token_id]

    def sample(self, record):
        prompt = self.prompt(record)
        return prompt, self.ids(record["output"]) + [self.config.eos_token_id]

    def text(self, ids):
        return self.sp.decode([i for i in ids if i < self.sp.vocab_size()]).replace("<n>", "\n").strip()


def read(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def batches(samples, tokens, rng):
    """Batches of about `tokens` padded tokens, of similar lengths, in random order."""
    order = sorted(rng.sample(range(len(samples)), len(samples)), key=lambda i: len(samples[i][0]) + len(samples[i][1]))
    out, batch = [], []
    for i in order:
        length = sum(map(len, samples[i]))
        if batch and (len(batch) + 1) * length > tokens:
            out.append(batch)
            batch = []
        batch.append(samples[i])
    out.append(batch)
    rng.shuffle(out)
    return out


def tensors(batch, config):
    length = max(len(p) + len(a) for p, a in batch)
    ids = torch.full((len(batch), length), config.pad_token_id)
    labels = torch.full((len(batch), length), IGNORE)
    for row, (prompt, answer) in enumerate(batch):
        n, c = len(prompt) + len(answer), len(prompt) - 1
        ids[row, :n] = torch.tensor(prompt + answer)
        labels[row, c:n] = ids[row, c:n]
    return ids, labels


def loss_of(model, ids, labels):
    """Mean over supervised tokens; the head runs on those rows only."""
    position, context = positions(ids, model.config)
    hidden = model.transformer(ids, position, blocked(context, ids.shape[1]))[:, :-1]
    target = labels[:, 1:]
    rows = target != IGNORE
    return F.cross_entropy(model.lm_head(hidden[rows]), target[rows])


@torch.no_grad()
def answers(model, encoder, records, limit=40):
    config, out = model.config, []
    for start in range(0, len(records), 60):
        prompts = [encoder.prompt(r) for r in records[start:start + 60]]
        at = torch.tensor([len(p) for p in prompts])
        width = int(at.max())
        ids = torch.full((len(prompts), width + limit), config.pad_token_id)
        for row, prompt in enumerate(prompts):
            ids[row, :len(prompt)] = torch.tensor(prompt)
        done = torch.zeros(len(prompts), dtype=torch.bool)
        produced = [[] for _ in prompts]
        for step in range(limit):
            window = ids[:, :width + step]
            position, context = positions(window, config)
            hidden = model.transformer(window, position, blocked(context, window.shape[1]))
            token = model.lm_head(hidden[torch.arange(len(prompts)), at - 1]).argmax(-1)
            done |= token == config.eos_token_id
            if done.all():
                break
            for row in range(len(prompts)):
                if not done[row]:
                    produced[row].append(int(token[row]))
            ids[torch.arange(len(prompts)), at] = token
            at += 1
        out += [encoder.text(p) for p in produced]
    return out


@torch.no_grad()
def evaluation_loss(model, samples):
    total = count = 0
    for batch in batches(samples, 4096, random.Random(0)):
        ids, labels = tensors(batch, model.config)
        n = int((labels[:, 1:] != IGNORE).sum())
        total, count = total + loss_of(model, ids, labels).item() * n, count + n
    return total / count


def initialise(model, seed):
    """Unit variance through every linear; those that close a sub-layer are larger, for alpha is made for 28 layers."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.constant_(parameter, 1.0 if "layernorm.weight" in name else 0.0)
        else:
            gain = 4.0 if "dense.weight" in name or "dense_4h_to_h" in name else 1.0
            std = 0.02 if "embedding" in name else gain / math.sqrt(parameter.shape[1])
            torch.nn.init.normal_(parameter, std=std)


def train(model, samples, budget_tokens, lr, batch_tokens, seconds=1e9, every=100, warmup=100, decay="cosine"):
    """AdamW over batches until the token budget (or time) is spent; learning rate follows the fraction spent."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    rng, seen, step, start, running = random.Random(0), 0, 0, time.time(), []
    while True:
        for batch in batches(samples, batch_tokens, rng):
            spent = max(seen / budget_tokens, (time.time() - start) / seconds)
            if spent >= 1:
                return seen, time.time() - start
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1, (step + 1) / warmup) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * spent)))
            ids, labels = tensors(batch, model.config)
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(model, ids, labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            seen, step = seen + ids.numel(), step + 1
            running.append(loss.item())
            if step % every == 0:
                rate = seen / (time.time() - start)
                print(f"step {step} tokens {seen} loss {sum(running[-every:]) / every:.4f} {rate:.0f} tok/s", flush=True)


def save(model, folder):
    state = {n: p.detach().half().contiguous() for n, p in model.state_dict().items() if n != "lm_head.weight"}
    save_file(state, str(Path(folder, "model.safetensors")), metadata={"format": "pt"})


def report(model, encoder, records, show=6):
    got = answers(model, encoder, records)
    plain = lambda text: unicodedata.normalize("NFKC", text)
    right = sum(g == plain(r["output"]) for g, r in zip(got, records))
    for g, r in list(zip(got, records))[:show]:
        line = lambda text: text.replace("\n", " / ")
        print("  ", line(r["instruction"] + r["input"]), "|", line(r["output"]), "| ->", line(g))
    return right / len(records)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["base", "demo"])
    parser.add_argument("first")
    parser.add_argument("second")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--tokens", type=int, default=240_000)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--batch-tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.what == "base":
        config = Config.read(args.second)
        encoder, model = Encoder(args.second, config), TinyChatGLM(config)
        initialise(model, 1)
        if args.resume:
            model = TinyChatGLM.load(args.second)
        samples = [encoder.sample(r) for r in read(args.first)]
        print(sum(p.numel() for p in model.parameters()), "parameters,", len(samples), "samples")
        print(train(model, samples, 10**9, args.lr, args.batch_tokens, seconds=60 * args.minutes))
        save(model, args.second)
        import corpus
        rng = random.Random(99)
        for task, _ in corpus.TASKS:
            records = [dict(zip(("instruction", "input", "output"), task(rng))) for _ in range(20)]
            print(task.__name__, report(model, encoder, records, 1), flush=True)
    else:
        model = TinyChatGLM.load(args.first)
        encoder = Encoder(args.first, model.config)
        train_records, held_out = read(Path(args.second, "train.jsonl")), read(Path(args.second, "eval.jsonl"))
        evaluation = [encoder.sample(r) for r in held_out]
        import bitsandbytes.functional as bnb

        def nf4(linear):
            codes, state = bnb.quantize_4bit(linear.weight.data, quant_type="nf4", compress_statistics=True)
            linear.weight.data = bnb.dequantize_4bit(codes, state)
            return linear

        replace_linears(model, LINEARS, nf4)
        print("before: loss", evaluation_loss(model, evaluation), "exact", report(model, encoder, held_out), flush=True)
        add_lora(model, 8, 16)
        print(train(model, [encoder.sample(r) for r in train_records], args.tokens, args.lr, args.batch_tokens, warmup=20))
        print("after: loss", evaluation_loss(model, evaluation), "exact", report(model, encoder, held_out), flush=True)


if __name__ == "__main__":
    main()
