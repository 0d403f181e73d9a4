"""Steps of the optimizers that glmtune follows -> optimizers.json (torch 2.15.0, bitsandbytes 0.50.2).

    python tests/goldens/make_optim.py > tests/goldens/optimizers.json

torch.optim.AdamW and torch.optim.SGD as they are; Lion by its formula (Chen et al. 2023, algorithm 2), in f64; AdamW in 8
bits by the function of bitsandbytes that its backends without a kernel of their own run, which takes the nearest value of
the map, as its CUDA kernels do. (Its CPU backend looks codes up in a table whose steps of 3e-5 are coarser than the map:
there a second moment of 0 does not stay 0.)

Parameters and gradients come from integers, so that both sides have the same bits without storing them.
"""

import json
import math
import sys
import types

import torch

# bitsandbytes imports triton next to its pure PyTorch functions, which do without.
for name in ["triton", "triton.language"]:
    try:
        __import__(name)
    except ImportError:
        module = types.ModuleType(name)
        module.jit = lambda *args, **kwargs: args[0] if args else lambda f: f
        module.autotune = lambda *args, **kwargs: lambda f: f
        module.Config = module.constexpr = lambda *args, **kwargs: None
        module.cdiv = lambda a, b: -(-a // b)
        module.__getattr__ = lambda key: lambda *args, **kwargs: None
        sys.modules[name] = module
sys.modules["triton"].language = sys.modules["triton.language"]

import bitsandbytes  # noqa: E402
from bitsandbytes.backends.triton import kernels_optim  # noqa: E402
from bitsandbytes.functional import create_dynamic_map  # noqa: E402

WORD = 2**32


def numbers(n, seed):
    """f32 in [-0.5, 0.5), multiples of 2^-24, scaled by 2^-(3 (i / 64 mod 5)): blocks whose sizes differ within."""
    i = torch.arange(n, dtype=torch.int64)
    bits = (i * 2654435761 + seed * 40503 + 12345) % WORD
    bits = ((bits ^ (bits >> 15)) * 2246822519) % WORD
    bits = bits ^ (bits >> 13)
    values = (bits >> 8).double() / 2**24 - 0.5
    return (values * 2.0 ** (-3 * ((i // 64) % 5)).double()).float()


def torch_case(make, n, steps):
    p = torch.nn.Parameter(numbers(n, 0))
    optimizer = make([p])
    for t in range(1, steps + 1):
        p.grad = numbers(n, t)
        optimizer.step()
    return p.detach().tolist()


def lion_case(n, steps, lr, beta1, beta2, weight_decay):
    p, m = numbers(n, 0).double(), torch.zeros(n, dtype=torch.float64)
    for t in range(1, steps + 1):
        g = numbers(n, t).double()
        p = p * (1 - lr * weight_decay) - lr * torch.sign(beta1 * m + (1 - beta1) * g)
        m = beta2 * m + (1 - beta2) * g
    return p.tolist()


def eight_bit_case(n, steps, lr, beta1, beta2, eps, weight_decay):
    blocks = math.ceil(n / 256)
    p = numbers(n, 0)
    state = [torch.zeros(n, dtype=torch.uint8) for _ in range(2)]
    absmax = [torch.zeros(blocks) for _ in range(2)]
    maps = [create_dynamic_map(signed) for signed in (True, False)]
    snapshots = []
    for t in range(1, steps + 1):
        kernels_optim.optimizer_update_8bit_blockwise_pytorch(
            p, numbers(n, t), state[0], state[1], beta1, beta2, 0.0, 0.0, eps, t, lr, maps[0], maps[1], absmax[0],
            absmax[1], weight_decay, 1.0, False, optimizer_name="adam",
        )  # fmt: skip
        if t in (1, steps):
            snapshots.append(
                {
                    "step": t,
                    "state1": bytes(state[0].tolist()).hex(),
                    "state2": bytes(state[1].tolist()).hex(),
                    "absmax1": absmax[0].tolist(),
                    "absmax2": absmax[1].tolist(),
                    # Every 37th.
                    "p": p[::37].tolist(),
                }
            )
    return snapshots


N, STEPS, LR = 70, 12, 0.01
adamw = {"kind": "adamw", "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1}
cases = [
    {
        **adamw,
        "p": torch_case(
            lambda p: torch.optim.AdamW(p, LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1), N, STEPS
        ),
    }
]
for momentum, weight_decay in [(0.0, 0.0), (0.0, 0.1), (0.9, 0.0), (0.9, 0.1)]:
    make = lambda p: torch.optim.SGD(p, LR, momentum=momentum, weight_decay=weight_decay)  # noqa: E731
    row = {"kind": "sgd", "momentum": momentum, "weight_decay": weight_decay}
    cases.append({**row, "p": torch_case(make, N, STEPS)})
row = {"kind": "lion", "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1}
cases.append({**row, "p": lion_case(N, STEPS, LR, 0.9, 0.99, 0.1)})
eight = {"n": 4396, "rate": LR, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "weight_decay": 0.1}
eight["snapshots"] = eight_bit_case(4396, 8, LR, 0.9, 0.999, 1e-8, 0.1)
out = {
    "torch": torch.__version__,
    "bitsandbytes": bitsandbytes.__version__,
    "n": N,
    "steps": STEPS,
    "rate": LR,
    "first": numbers(N, 0)[:4].tolist(),
    "signed_map": create_dynamic_map(True).tolist(),
    "unsigned_map": create_dynamic_map(False).tolist(),
}
text = json.dumps(out)[:-1]
rows = ",\n".join(json.dumps(case) for case in cases)
print(f'{text}, "cases": [\n{rows}\n],\n"eight_bit": {json.dumps(eight)}}}')
