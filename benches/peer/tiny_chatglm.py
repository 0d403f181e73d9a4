"""ChatGLM-6B (first version) in plain PyTorch, eager, for sizes that fit a test.

The peer glmtune is timed against and the judge of its adapters: module names are those of the Hugging Face
checkpoint, so state dicts and PEFT adapters load by name. One idea per class, no cache, no dropout.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

# The official block is built without num_layers, so its default, 28, decides the residual scale at every depth.
ALPHA = math.sqrt(2 * 28)

SIZES = {
    "h128": dict(hidden_size=128, num_layers=4, num_attention_heads=4, vocab_size=1024),
    "h256": dict(hidden_size=256, num_layers=4, num_attention_heads=4, vocab_size=4096),
    "h512": dict(hidden_size=512, num_layers=6, num_attention_heads=8, vocab_size=8192),
}


class Config(dict):
    """config.json with attributes; PEFT asks for `get` and `to_dict`."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def to_dict(self):
        return dict(self)

    @staticmethod
    def read(folder):
        return Config(json.loads(Path(folder, "config.json").read_text()))

    @staticmethod
    def tiny(hidden_size, num_layers, num_attention_heads, vocab_size):
        """A configuration whose special ids are the last of the vocabulary."""
        return Config(
            model_type="chatglm", hidden_size=hidden_size, inner_hidden_size=4 * hidden_size, num_layers=num_layers,
            num_attention_heads=num_attention_heads, vocab_size=vocab_size, layernorm_epsilon=1e-5, pad_token_id=3,
            mask_token_id=vocab_size - 6, gmask_token_id=vocab_size - 5, bos_token_id=vocab_size - 2,
            eos_token_id=vocab_size - 1)


def positions(ids, config):
    """Position, block position [B, 2, S] and context length [B] as the model derives them from the ids."""
    size, length = ids.shape
    index = torch.arange(length)
    out = torch.empty(size, 2, length, dtype=torch.long)
    context = torch.empty(size, dtype=torch.long)
    for b, row in enumerate(ids.tolist()):
        start = row.index(config.bos_token_id)
        mask = config.gmask_token_id if config.gmask_token_id in row else config.mask_token_id
        out[b, 0] = torch.where(index < start, index, row.index(mask))
        out[b, 1] = (index - start + 1).clamp(min=0)
        context[b] = start
    return out, context


def blocked(context, length):
    """[B, 1, S, S], True where query i may not see key j: allowed are j < context and j <= i."""
    index = torch.arange(length)
    allowed = (index[None, :] <= index[:, None]) | (index[None, None, :] < context[:, None, None])
    return ~allowed[:, None]


class Rotary:
    """cos and sin [B, S, 1, d/2] of one half of the head; the frequencies are rounded to fp16 as in the release."""

    def __init__(self, half):
        # In float32 throughout: rounding 1/10000^x from float64 would give other fp16 values.
        self.inv_freq = (1.0 / 10000 ** (torch.arange(0, half, 2).float() / half)).half().float()

    def __call__(self, position):
        angle = position[..., None].float() * self.inv_freq
        angle = torch.cat([angle, angle], -1)[:, :, None]
        return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.heads, self.scale = config.num_attention_heads, layer + 1.0
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, rope, mask):
        B, S, H = x.shape
        d = H // self.heads
        # Interleaved by head: [q | k | v] of head 0, then of head 1, ...
        q, k, v = self.query_key_value(x).view(B, S, self.heads, 3 * d).chunk(3, -1)
        (cos0, sin0), (cos1, sin1) = rope
        q0, q1 = q.chunk(2, -1)
        k0, k1 = k.chunk(2, -1)
        q = torch.cat([rotate(q0, cos0, sin0), rotate(q1, cos1, sin1)], -1).transpose(1, 2)
        k = torch.cat([rotate(k0, cos0, sin0), rotate(k1, cos1, sin1)], -1).transpose(1, 2)
        scores = (q / (math.sqrt(d) * self.scale)) @ k.transpose(-1, -2)
        weights = F.softmax(scores.masked_fill(mask, -10000.0).float() * self.scale, dim=-1).to(q.dtype)
        return self.dense((weights @ v.transpose(1, 2)).transpose(1, 2).reshape(B, S, H))


class Mlp(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, x):
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        norm = lambda: nn.LayerNorm(config.hidden_size, config.layernorm_epsilon)
        self.input_layernorm = norm()
        self.attention = Attention(config, layer)
        self.post_attention_layernorm = norm()
        self.mlp = Mlp(config)

    def forward(self, x, rope, mask):
        # The residual carries the OUTPUT of the norm.
        a = self.input_layernorm(x)
        b = self.post_attention_layernorm(ALPHA * a + self.attention(a, rope, mask))
        return ALPHA * b + self.mlp(b)


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, config.layernorm_epsilon)
        self.rotary = Rotary(config.hidden_size // config.num_attention_heads // 2)

    def forward(self, ids, position, mask):
        rope = self.rotary(position[:, 0]), self.rotary(position[:, 1])
        x = self.word_embeddings(ids)
        for layer in self.layers:
            x = layer(x, rope, mask)
        return self.final_layernorm(x)


class TinyChatGLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.get("tie_word_embeddings", True):
            self.lm_head.weight = self.transformer.word_embeddings.weight

    @staticmethod
    def load(folder):
        """A Hugging Face folder: safetensors or torch .bin, one file or shards; computed in float32."""
        model = TinyChatGLM(Config.read(folder))
        state = {}
        files = sorted(Path(folder).glob("model*.safetensors")) or sorted(Path(folder).glob("pytorch_model*.bin"))
        if not files:
            raise SystemExit(f"{folder}: no model*.safetensors and no pytorch_model*.bin")
        for file in files:
            if file.suffix == ".safetensors":
                from safetensors.torch import load_file
                state |= load_file(file)
            else:
                state |= torch.load(file, map_location="cpu", weights_only=True)
        state = {name: value.float() for name, value in state.items() if not name.endswith("inv_freq")}
        if model.config.get("tie_word_embeddings", True):
            state["lm_head.weight"] = state["transformer.word_embeddings.weight"]
        model.load_state_dict(state)
        return model

    def forward(self, input_ids, labels=None, position_ids=None, attention_mask=None, **_):
        """Logits [B, S, V], or (loss, logits) with labels [B, S], -100 where a token is not supervised."""
        if position_ids is None:
            position_ids, context = positions(input_ids, self.config)
            if attention_mask is None:
                attention_mask = blocked(context, input_ids.shape[1])
        logits = self.lm_head(self.transformer(input_ids, position_ids, attention_mask))
        if labels is None:
            return logits
        return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1)), logits

    def prepare_inputs_for_generation(self, *_, **__):
        """Only here because PEFT looks for it in a causal language model."""
        raise NotImplementedError


LINEARS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")


class LoraLinear(nn.Module):
    """y = base(x) + alpha/r * B(A(x)): what PEFT computes, without PEFT's bookkeeping."""

    def __init__(self, base, r, alpha):
        super().__init__()
        self.base, self.scale = base, alpha / r
        self.lora_A = nn.Linear(base.in_features, r, bias=False)
        self.lora_B = nn.Linear(r, base.out_features, bias=False)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        return self.base(x) + self.lora_B(self.lora_A(x)) * self.scale


def replace_linears(model, targets, make):
    for layer in model.transformer.layers:
        for room in (layer.attention, layer.mlp):
            for name in targets:
                if hasattr(room, name):
                    setattr(room, name, make(getattr(room, name)))


def add_lora(model, r=8, alpha=16, targets=LINEARS):
    """Freezes the model and gives the named linears an adapter."""
    model.requires_grad_(False)
    replace_linears(model, targets, lambda linear: LoraLinear(linear, r, alpha))
    return model


def quantize_linears(model):
    """NF4 with double quantisation by bitsandbytes, on the CPU, computing in float32."""
    import bitsandbytes as bnb

    def make(linear):
        out = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=True, compute_dtype=torch.float32,
                                compress_statistics=True, quant_type="nf4")
        out.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, compress_statistics=True,
                                       quant_type="nf4")
        out.bias = linear.bias
        return out.to("cpu")  # moving to a device is what quantises

    replace_linears(model, LINEARS, make)
    return model
