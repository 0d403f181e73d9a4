"""ChatGLM-6B as a user of PyTorch, bitsandbytes and PEFT would fine-tune it on a card: the peer of `glmtune bench`.

Random weights at any size, made layer by layer on the device: no checkpoint, and host memory for nothing. The linears are
bitsandbytes' NF4 with double quantisation, attention is torch's SDPA with the dense prefix mask, blocks can be checkpointed.
Adapters are either minimal ("light": parameters in float32, products in the compute type, which is what autocast makes of
PEFT) or PEFT's own. `check` holds it against tiny_chatglm.py, which is held against the official code.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tiny_chatglm import ALPHA, LINEARS, Config, Rotary, rotate

SIZES = {
    "chatglm-6b": dict(vocab_size=130528, hidden_size=4096, inner_hidden_size=16384, num_layers=28,
                       num_attention_heads=32, bos_token_id=130004, gmask_token_id=130001, mask_token_id=130000),
    "tiny": dict(vocab_size=1024, hidden_size=128, inner_hidden_size=512, num_layers=2, num_attention_heads=2,
                 bos_token_id=1004, gmask_token_id=1001, mask_token_id=1000),
}


def config(name):
    return Config(layernorm_epsilon=1e-5, model_type="chatglm", **SIZES[name])


class Cache:
    """Keys and values of one layer, room for all positions."""

    def __init__(self, size, heads, capacity, d, like):
        self.keys = torch.zeros(size, heads, capacity, d, dtype=like.dtype, device=like.device)
        self.values = torch.zeros_like(self.keys)
        self.length = 0

    def append(self, k, v):
        end = self.length + k.shape[2]
        self.keys[:, :, self.length:end], self.values[:, :, self.length:end] = k, v
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class Attention(nn.Module):
    def __init__(self, config, linear):
        super().__init__()
        self.heads = config.num_attention_heads
        self.query_key_value = linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = linear(config.hidden_size, config.hidden_size)

    def forward(self, x, rope, mask, cache=None):
        B, S, H = x.shape
        d = H // self.heads
        q, k, v = self.query_key_value(x).view(B, S, self.heads, 3 * d).chunk(3, -1)
        (cos0, sin0), (cos1, sin1) = rope
        q0, q1 = q.chunk(2, -1)
        k0, k1 = k.chunk(2, -1)
        q = torch.cat([rotate(q0, cos0, sin0), rotate(q1, cos1, sin1)], -1).transpose(1, 2)
        k = torch.cat([rotate(k0, cos0, sin0), rotate(k1, cos1, sin1)], -1).transpose(1, 2)
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.dense(y.transpose(1, 2).reshape(B, S, H))


class Mlp(nn.Module):
    def __init__(self, config, linear):
        super().__init__()
        self.dense_h_to_4h = linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, x):
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config, linear, norm):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        self.attention, self.mlp = Attention(config, linear), Mlp(config, linear)

    def forward(self, x, rope, mask, cache=None):
        a = self.input_layernorm(x)
        b = self.post_attention_layernorm(ALPHA * a + self.attention(a, rope, mask, cache))
        return ALPHA * b + self.mlp(b)


class Transformer(nn.Module):
    def __init__(self, config, linear, norm, factory):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, **factory)
        self.layers = nn.ModuleList(Block(config, linear, norm) for _ in range(config.num_layers))
        self.final_layernorm = norm()


class ChatGlm(nn.Module):
    """Frozen. `quantized` False keeps dense linears, for `check`; with `like` the large weights are that model's own."""

    def __init__(self, config, device, dtype, quantized=True, like=None):
        super().__init__()
        factory = dict(device=device, dtype=dtype)
        self.config, self.dtype = config, dtype
        self.checkpointing = False
        ready = [getattr(room, name) for layer in like.transformer.layers for room in (layer.attention, layer.mlp)
                 for name in LINEARS if hasattr(room, name)] if like else []

        def linear(inputs, outputs):
            if ready:
                return ready.pop(0)
            dense = nn.Linear(inputs, outputs, **factory)
            nn.init.normal_(dense.weight, std=inputs**-0.5)
            nn.init.zeros_(dense.bias)
            return quantize(dense, dtype) if quantized else dense

        norm = lambda: nn.LayerNorm(config.hidden_size, config.layernorm_epsilon, **factory)
        self.transformer = Transformer(config, linear, norm, factory)
        if like:
            self.transformer.word_embeddings = like.transformer.word_embeddings
        else:
            nn.init.normal_(self.transformer.word_embeddings.weight, std=3 / config.hidden_size)
        self.lm_head = nn.Linear(1, 1, bias=False, **factory)
        self.lm_head.weight = self.transformer.word_embeddings.weight
        self.rotary = Rotary(config.hidden_size // config.num_attention_heads // 2)
        self.rotary.inv_freq = self.rotary.inv_freq.to(device)
        self.requires_grad_(False)

    def rope(self, position):
        both = self.rotary(position[:, 0]), self.rotary(position[:, 1])
        return [tuple(part.to(self.dtype) for part in half) for half in both]

    def hidden(self, ids, position, mask, caches=None):
        """`position` [B, 2, S]; `mask` [B, 1, S, S] is True where a key is seen, or None where all are."""
        rope = self.rope(position)
        x = self.transformer.word_embeddings(ids)
        for i, layer in enumerate(self.transformer.layers):
            if self.checkpointing and self.training:
                x = checkpoint(layer, x, rope, mask, use_reentrant=False)
            else:
                x = layer(x, rope, mask, caches[i] if caches else None)
        return self.transformer.final_layernorm(x)

    def forward(self, input_ids, labels=None, position_ids=None, attention_mask=None, **_):
        logits = F.linear(self.hidden(input_ids, position_ids, attention_mask), self.lm_head.weight)
        if labels is None:
            return logits
        # As transformers: every position, in float32.
        return F.cross_entropy(logits[:, :-1].float().reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1))

    @torch.no_grad()
    def generate(self, ids, position, mask, tokens):
        """Greedy; yields after each token. Keys and values are cached."""
        size, length = ids.shape
        c = self.config
        caches = [Cache(size, c.num_attention_heads, length + tokens, c.hidden_size // c.num_attention_heads,
                        self.lm_head.weight) for _ in range(c.num_layers)]
        hidden = self.hidden(ids, position, mask, caches)[:, -1:]
        position = position[:, :, -1:].clone()
        for _ in range(tokens):
            token = F.linear(hidden, self.lm_head.weight).argmax(-1)
            yield token
            position[:, 1] += 1
            hidden = self.hidden(token, position, None, caches)

    def prepare_inputs_for_generation(self, *_, **__):
        """Only here because PEFT looks for it in a causal language model."""
        raise NotImplementedError


def quantize(dense, dtype):
    """bitsandbytes' NF4 with double quantisation, on the device where the dense weight lies."""
    import bitsandbytes as bnb

    out = bnb.nn.Linear4bit(dense.in_features, dense.out_features, bias=True, compute_dtype=dtype,
                            compress_statistics=True, quant_type="nf4", device="meta")
    out.weight = bnb.nn.Params4bit(dense.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4")
    out.bias = dense.bias
    return out.to(dense.weight.device)  # moving to a device is what quantises


class LightLora(nn.Module):
    def __init__(self, base, r, alpha):
        super().__init__()
        device = base.bias.device
        self.base, self.scale = base, alpha / r
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        u = F.linear(x, self.lora_A.to(x.dtype))
        return self.base(x) + F.linear(u, self.lora_B.to(x.dtype)) * self.scale


def add_lora(model, kind="light", r=8, alpha=16):
    """LoRA on the four linears of every layer, without dropout; returns the model to call."""
    if kind == "light":
        for layer in model.transformer.layers:
            for room in (layer.attention, layer.mlp):
                for name in LINEARS:
                    if hasattr(room, name):
                        setattr(room, name, LightLora(getattr(room, name), r, alpha))
        return model
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=0.0, target_modules=list(LINEARS), task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


def places(size, length, context, device):
    """Positions [B, 2, S] and mask [B, 1, S, S] of sequences whose first `context` tokens see each other."""
    index = torch.arange(length, device=device)
    position = torch.stack([index.clamp(max=max(context - 1, 0)), (index + 1 - context).clamp(min=0)])
    seen = (index[None, :] <= index[:, None]) | (index[None, :] < context)
    return position.expand(size, 2, length), seen[None, None].expand(size, 1, length, length)


def batch(config, size, length, device):
    """Random ids, a quarter context, the rest supervised: ids, labels, positions, mask."""
    generator = torch.Generator().manual_seed(1)
    context = length // 4
    ids = torch.randint(5, config.mask_token_id, (size, length), generator=generator).to(device)
    labels = ids.clone()
    labels[:, :context] = -100
    return ids, labels, *places(size, length, context, device)


def check():
    """The largest difference to tiny_chatglm.py on the same dense weights in float32 on the CPU, and whether generating with
    a cache gives the tokens that the whole sequence gives."""
    from tiny_chatglm import TinyChatGLM

    torch.manual_seed(0)
    c = config("tiny")
    model, reference = ChatGlm(c, "cpu", torch.float32, quantized=False), TinyChatGLM(c)
    reference.load_state_dict(model.state_dict())
    ids, _, position, seen = batch(c, 2, 24, "cpu")
    with torch.no_grad():
        want = reference(ids, position_ids=position, attention_mask=~seen)
        worst = (model(ids, position_ids=position, attention_mask=seen) - want).abs().max().item()
        prompt = ids[:, :6]
        tokens = torch.cat(list(model.generate(prompt, places(2, 6, 6, "cpu")[0], None, 4)), 1)
        position, seen = places(2, 10, 6, "cpu")
        again = model(torch.cat([prompt, tokens], 1), position_ids=position, attention_mask=seen).argmax(-1)[:, 5:-1]
    return worst, torch.equal(again, tokens)


if __name__ == "__main__":
    worst, same = check()
    print(f"logits differ from tiny_chatglm.py by {worst:.2e}; cached generation agrees: {same}")
    raise SystemExit(not (worst < 1e-4 and same))
