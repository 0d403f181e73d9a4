"""Makes tests/goldens/peft: what PEFT itself computes for DoRA, PiSSA, rsLoRA, LoRA+ and modules_to_save.

    python tests/goldens/make_peft.py GOLDENS OUT      # GOLDENS: a set with chatglm_v1/checkpoint_fp16_bin; OUT: .../peft

Needs torch, peft, safetensors (made with peft 0.21, torch 2.15). The base is the tiny ChatGLM-6B of the golden set; its
block is written here from the formulas in that set's README with the official module names, and checked against the
logits that the official code gave before anything is made.
"""

import json
import math
import shutil
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file, save_file
from torch import nn

torch.set_num_threads(1)
warnings.filterwarnings("ignore")
GMASK, SOP, IGNORE = 1041, 1044, -100
# The official blocks are built without a layer count, so their default 28 stands.
ALPHA = math.sqrt(2 * 28)
STEPS = 10
ALL = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]


class Attention(nn.Module):
    def __init__(self, hidden, heads):
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(hidden, 3 * hidden)
        self.dense = nn.Linear(hidden, hidden)

    def forward(self, x, rotations, blocked):
        batch, length, hidden = x.shape
        width = hidden // self.heads
        q, k, v = self.query_key_value(x).view(batch, length, self.heads, 3 * width).chunk(3, dim=-1)
        q, k = rotate(q, rotations), rotate(k, rotations)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(width)
        p = scores.masked_fill(blocked[:, None], -10000.0).softmax(-1)
        return self.dense(torch.einsum("bhij,bjhd->bihd", p, v).reshape(batch, length, hidden))


class Mlp(nn.Module):
    def __init__(self, hidden, inner):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(hidden, inner)
        self.dense_4h_to_h = nn.Linear(inner, hidden)

    def forward(self, x):
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x), approximate="tanh"))


class Block(nn.Module):
    """Residuals start from the output of the norms."""

    def __init__(self, hidden, inner, heads, eps):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(hidden, eps)
        self.attention = Attention(hidden, heads)
        self.post_attention_layernorm = nn.LayerNorm(hidden, eps)
        self.mlp = Mlp(hidden, inner)

    def forward(self, x, rotations, blocked):
        a = self.input_layernorm(x)
        b = self.post_attention_layernorm(ALPHA * a + self.attention(a, rotations, blocked))
        return ALPHA * b + self.mlp(b)


class Transformer(nn.Module):
    def __init__(self, c):
        super().__init__()
        hidden = c["hidden_size"]
        self.word_embeddings = nn.Embedding(c["vocab_size"], hidden)
        block = lambda: Block(hidden, c["inner_hidden_size"], c["num_attention_heads"], c["layernorm_epsilon"])
        self.layers = nn.ModuleList(block() for _ in range(c["num_layers"]))
        self.final_layernorm = nn.LayerNorm(hidden, c["layernorm_epsilon"])


class ChatGlm(nn.Module):
    """The head is tied to the embedding."""

    def __init__(self, c):
        super().__init__()
        self.width = c["hidden_size"] // c["num_attention_heads"]
        self.transformer = Transformer(c)
        self.lm_head = nn.Linear(c["hidden_size"], c["vocab_size"], bias=False)
        self.lm_head.weight = self.transformer.word_embeddings.weight

    def forward(self, input_ids, labels=None):
        rotations, blocked = geometry(input_ids, self.width)
        x = self.transformer.word_embeddings(input_ids)
        for block in self.transformer.layers:
            x = block(x, rotations, blocked)
        logits = self.lm_head(self.transformer.final_layernorm(x))
        if labels is None:
            return logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)


def geometry(ids, width):
    """Cosines and sines of both halves, and which keys are blocked, from the ids alone (no mask is passed in training)."""
    length = ids.shape[1]
    r = width // 2
    inv_freq = (1.0 / 10000 ** (torch.arange(0, r, 2, dtype=torch.float32) / r)).half().float()
    positions, blocks, blocked = [], [], []
    for row in ids:
        c, m = (row == SOP).nonzero()[0].item(), (row == GMASK).nonzero()[0].item()
        i = torch.arange(length)
        positions.append(torch.where(i < c, i, m))
        blocks.append(torch.where(i < c, 0, i - c + 1))
        blocked.append((i[None, :] > i[:, None]) & (i[None, :] >= c))
    table = lambda p: (torch.stack(p).float()[..., None] * inv_freq).repeat(1, 1, 2)[:, :, None]
    angles = [table(positions), table(blocks)]
    return [(a.cos(), a.sin()) for a in angles], torch.stack(blocked)


def rotate(x, rotations):
    halves = []
    for half, (cos, sin) in zip(x.chunk(2, dim=-1), rotations):
        a, b = half.chunk(2, dim=-1)
        halves.append(half * cos + torch.cat([-b, a], -1) * sin)
    return torch.cat(halves, -1)


def base(goldens, dequantised=False):
    folder = goldens / "chatglm_v1/checkpoint_fp16_bin"
    model = ChatGlm(json.loads((folder / "config.json").read_text()))
    weights = {}
    for shard in sorted(folder.glob("*.bin")):
        weights |= torch.load(shard, weights_only=True)
    weights = {k: v.float() for k, v in weights.items() if "inv_freq" not in k}
    if dequantised:
        values = load_file(goldens / "nf4/qlora_base_dequant_f32.safetensors")
        known = {k: v for k, v in values.items() if k in weights}
        assert len(known) == 12, values.keys()
        weights |= known
    model.load_state_dict(weights)
    return model


def check_base(goldens):
    want = load_file(goldens / "chatglm_v1/forward/train_rightpad.safetensors")
    with torch.no_grad():
        got = base(goldens)(want["input_ids"])
        loss = base(goldens)(want["input_ids"], want["labels"])
    torch.testing.assert_close(got, want["logits"], atol=5e-5, rtol=0)
    torch.testing.assert_close(loss.reshape(1), want["loss"], atol=2e-6, rtol=0)
    print("base: logits within", (got - want["logits"]).abs().max().item())


def batches():
    """Five batches of two sequences, the second shorter and padded on the right (pad id 3)."""
    g = torch.Generator().manual_seed(20)
    ids, labels = torch.full((5, 2, 18), 3), torch.full((5, 2, 18), IGNORE)
    for b in range(5):
        for s in range(2):
            prompt, answer = 4 + b % 3 + s, 9 - 3 * s
            row = torch.randint(20, 1000, (prompt + answer,), generator=g)
            row = torch.cat([row[:prompt], torch.tensor([GMASK, SOP]), row[prompt:], torch.tensor([1045])])
            ids[b, s, : len(row)] = row
            labels[b, s, prompt + 1 : len(row)] = row[prompt + 1 :]
    return ids, labels


def short(name):
    return name.replace(".default", "").replace(".modules_to_save", "")


def slices(tensors, rows):
    """Large tensors by some rows: enough to see what trained, small enough to keep."""
    return {k: (v[rows] if v.shape[0] > 1000 else v).contiguous().clone() for k, v in tensors.items()}


def train(model, optimizer, ids, labels, rows):
    losses, norms, first = [], [], None
    for step in range(STEPS):
        i = step % len(ids)
        loss = model(ids[i], labels=labels[i])
        optimizer.zero_grad()
        loss.backward()
        trained = {short(n): p for n, p in model.named_parameters() if p.requires_grad}
        norms.append(math.sqrt(sum(p.grad.double().pow(2).sum().item() for p in trained.values())))
        losses.append(loss.item())
        if first is None:
            first = slices({n: p.grad for n, p in trained.items()}, rows)
        optimizer.step()
    return losses, norms, first


def make(goldens, out, name, config, dequantised=False, loraplus=None, keep_folder=True):
    ids, labels = batches()
    rows = torch.cat([ids.unique()[:30], torch.tensor([GMASK, SOP, 1046])])
    torch.manual_seed(7)
    folder = out / name
    folder.mkdir(parents=True)
    model = get_peft_model(base(goldens, dequantised), LoraConfig(lora_dropout=0.0, task_type=None, **config))
    model.train()
    pissa = str(config.get("init_lora_weights", "")).startswith("pissa")
    scratch = folder / "start"
    model.save_pretrained(scratch)
    if pissa:
        # As PEFT asks for it: an initial adapter to subtract later, which must not decompose again.
        text = json.loads((scratch / "adapter_config.json").read_text())
        (scratch / "adapter_config.json").write_text(json.dumps(text | {"init_lora_weights": True}))
        (folder / "initial_adapter").mkdir()
        model.save_pretrained(folder / "initial_adapter", path_initial_model_for_weight_conversion=str(scratch))
    else:
        shutil.copytree(scratch, folder / "initial_adapter")
    hyper = {"lr": 2e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01}
    groups = None
    if loraplus:
        decay = {"loraplus_weight_decay": hyper["weight_decay"]}
        betas = {"betas": tuple(hyper["betas"]), "eps": hyper["eps"]}
        optimizer = create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=hyper["lr"], loraplus_lr_ratio=loraplus, **decay, **betas
        )
        names = {id(p): short(n) for n, p in model.named_parameters()}
        groups = [
            {"lr": g["lr"], "weight_decay": g["weight_decay"], "names": [names[id(p)] for p in g["params"]]}
            for g in optimizer.param_groups
        ]
    else:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, **(hyper | {"betas": tuple(hyper["betas"])}))
    losses, norms, first = train(model, optimizer, ids, labels, rows)
    save_file(first, folder / "step0_grads.safetensors")
    if pissa:
        model.save_pretrained(folder / "final_adapter", path_initial_model_for_weight_conversion=str(scratch))
    else:
        model.save_pretrained(folder / "final_adapter")
    if not keep_folder:
        for part in ["initial_adapter", "final_adapter"]:
            path = folder / part / "adapter_model.safetensors"
            save_file(slices(load_file(path), rows), path)
    shutil.rmtree(scratch)
    with torch.no_grad():
        model.eval()
        logits = model(ids[0])
    save_file({"logits": logits[:, -1].contiguous(), "rows": rows}, folder / "after.safetensors")
    record = {
        "peft_config": {k: v for k, v in config.items()},
        "base": "nf4 dequantised" if dequantised else "dense",
        "steps": STEPS,
        "hyperparameters": hyper | ({"loraplus_lr_ratio": loraplus} if loraplus else {}),
        "loss": losses,
        "grad_norm": norms,
    }
    if groups:
        record["groups"] = groups
    for part in folder.glob("*/README.md"):
        part.unlink()
    (folder / "case.json").write_text(json.dumps(record, indent=1) + "\n")
    print(name, losses[0], losses[-1], sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()))


def make_sketches(goldens, out):
    """torch.svd_lowrank with the random matrix that it drew: with the same one, another program gets the same product."""
    drawn, randn = [], torch.randn
    torch.randn = lambda *a, **k: drawn.append(randn(*a, **k)) or drawn[-1]
    tensors = {}
    model = base(goldens)
    for module in ["attention.query_key_value", "mlp.dense_4h_to_h"]:
        name = f"transformer.layers.1.{module}.weight"
        weight = model.state_dict()[name]
        for niter in [1, 4]:
            drawn.clear()
            torch.manual_seed(5)
            u, s, v = torch.svd_lowrank(weight, 6, niter=niter)
            assert len(drawn) == 1
            tensors |= {f"{name}.{niter}.sketch": drawn[0], f"{name}.{niter}.s": s}
            tensors[f"{name}.{niter}.product"] = (u * s) @ v.T
    torch.randn = randn
    small = {k: v.contiguous() for k, v in tensors.items() if not k.endswith("product")}
    # A product of rank 6 by its action on a few vectors, drawn with the generator that numpy and torch share: none needed,
    # columns 0..8 and rows 0..8 tell it apart.
    for k, v in tensors.items():
        if k.endswith("product"):
            small[k + ".rows"] = v[:8].contiguous()
            small[k + ".columns"] = v[:, :8].contiguous()
    save_file(small, out / "sketches.safetensors")


def main():
    goldens, out = Path(sys.argv[1]), Path(sys.argv[2])
    check_base(goldens)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    ids, labels = batches()
    save_file({"input_ids": ids, "labels": labels}, out / "batches.safetensors")
    small = {"r": 3, "lora_alpha": 6}
    qkv = small | {"target_modules": ["query_key_value"]}
    make(goldens, out, "dora_all", small | {"target_modules": ALL, "use_dora": True})
    make(goldens, out, "dora_nf4", small | {"target_modules": ["query_key_value", "dense_4h_to_h"], "use_dora": True}, dequantised=True)
    two = small | {"target_modules": ["query_key_value", "dense_h_to_4h"]}
    make(goldens, out, "pissa", two | {"init_lora_weights": "pissa"})
    make(goldens, out, "pissa_niter_16", two | {"init_lora_weights": "pissa_niter_16", "use_rslora": True})
    make(goldens, out, "saved_norms", qkv | {"modules_to_save": ["input_layernorm", "post_attention_layernorm", "final_layernorm"]})
    make(goldens, out, "saved_embedding", qkv | {"modules_to_save": ["word_embeddings"]}, keep_folder=False)
    make(goldens, out, "saved_head", qkv | {"modules_to_save": ["lm_head"]}, keep_folder=False)
    both = ["word_embeddings", "lm_head", "final_layernorm"]
    plus = qkv | {"use_dora": True, "use_rslora": True, "modules_to_save": both}
    make(goldens, out, "loraplus_dora_saved", plus, loraplus=8.0, keep_folder=False)
    make_sketches(goldens, out)
    print("all:", sum(f.stat().st_size for f in out.rglob("*") if f.is_file()))


if __name__ == "__main__":
    main()
