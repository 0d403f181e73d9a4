"""Does PEFT agree with `glmtune adapter`? check_adapter_tools.py GLMTUNE GOLDENS

PEFT itself makes and saves adapters of the tiny ChatGLM-6B of the golden set; glmtune reads, adds, scales and resizes them; PEFT
opens the results. Compared are the updates of every linear as PEFT computes them (`get_delta_weight`), for sums with PEFT's own
`add_weighted_adapter`.
"""

import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model

sys.path.insert(0, str(Path(__file__).parents[2] / "tests/goldens"))
from make_peft import base  # noqa: E402

warnings.filterwarnings("ignore")
glmtune, goldens = sys.argv[1], Path(sys.argv[2])
ALL = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]


def run(*args):
    done = subprocess.run([glmtune, "adapter", *map(str, args)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def make(folder, seed, **options):
    """An adapter that PEFT made, with a B that is not zero."""
    torch.manual_seed(seed)
    model = get_peft_model(base(goldens), LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder, safe_serialization=options.get("use_rslora", False))
    return folder


def deltas(model, adapter="default"):
    """The update of every linear that carries the adapter."""
    layers = model.base_model.model.named_modules()
    return {n: m.get_delta_weight(adapter) for n, m in layers if adapter in getattr(m, "lora_A", {})}


def opened(folder):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = PeftConfig.from_pretrained(folder)
        # CAUSAL_LM adds `generate`, which the tiny base has not.
        config.task_type = None
        model = PeftModel.from_pretrained(base(goldens), folder, config=config)
    said = [str(w.message) for w in caught if "adapter keys" in str(w.message)]
    assert not said, said
    return model


def compare(what, got, want, bound):
    assert got.keys() == want.keys(), (got.keys(), want.keys())
    square = lambda updates: sum(u.double().square().sum().item() for u in updates.values())
    off = (square({n: got[n].double() - want[n].double() for n in want}) / square(want)) ** 0.5
    print(f"{what}: {len(want)} updates within {off:.1e} of PEFT's")
    assert off < bound


with tempfile.TemporaryDirectory() as place, torch.no_grad():
    place = Path(place)
    a = make(place / "a", 1, r=4, lora_alpha=8, target_modules=ALL)
    b = make(place / "b", 2, r=3, lora_alpha=5, target_modules=ALL, use_rslora=True)
    p = make(place / "p", 3, r=6, lora_alpha=12, target_modules=["query_key_value", "dense"], layers_to_transform=[0, 2],
             rank_pattern={"attention.dense": 4}, alpha_pattern={r"layers\.2\..*": 3})
    x = make(place / "x", 4, r=5, lora_alpha=5, target_modules=r".*\.[02]\.mlp\..*")

    for folder in [a, b, p, x]:
        told = {m["module"]: m["frobenius"] for m in json.loads(run("inspect", folder, "--json"))["modules"]}
        want = {n: d.double().norm().item() for n, d in deltas(opened(folder)).items()}
        assert told.keys() == want.keys(), (told, want)
        off = max(abs(told[n] / want[n] - 1) for n in want)
        print(f"inspect {folder.name}: {len(want)} norms within {off:.1e} of PEFT's")
        assert off < 1e-5
        run("scale", folder, "--factor", "-0.25", "--output", place / f"scaled-{folder.name}")
        scaled = deltas(opened(place / f"scaled-{folder.name}"))
        compare(f"scale {folder.name}", scaled, {n: -0.25 * d for n, d in deltas(opened(folder)).items()}, 1e-6)
        told = json.loads(run("resize", folder, "--rank", 2, "--json", "--output", place / f"low-{folder.name}"))
        whole, low = deltas(opened(folder)), deltas(opened(place / f"low-{folder.name}"))
        for n, d in whole.items():
            u, s, v = torch.linalg.svd(d.double(), full_matrices=False)
            best = (u[:, :2] * s[:2]) @ v[:2]
            assert (low[n].double() - best).norm() < 1e-5 * d.norm(), n
        off = {n: (low[n].double() - whole[n].double()).square().sum().item() for n in whole}
        off = (sum(off.values()) / sum(d.double().square().sum().item() for d in whole.values())) ** 0.5
        print(f"resize {folder.name}: error {off:.6f} in PEFT, told {told['relative']:.6f}")
        assert abs(off - told["relative"]) < 1e-5

    both = opened(a)
    both.load_adapter(b, "b")
    for method, rank in [("cat", None), ("svd", 3)]:
        ours = place / method
        run("add", a, b, "--weights", "0.7,-0.4", "--method", method, *(["--rank", rank] if rank else []), "--output", ours)
        both.base_model.add_weighted_adapter(["default", "b"], [0.7, -0.4], method, combination_type=method, svd_rank=rank)
        compare(f"add {method}", deltas(opened(ours)), deltas(both, method), 1e-5)
