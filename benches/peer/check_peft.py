"""Does PEFT load this adapter? check_peft.py ADAPTER_DIR BASE_DIR

Builds the base by its official module names, loads the adapter with PeftModel.from_pretrained, and prints the
largest logit difference between base and base + adapter: zero would mean that PEFT found nothing to attach.
"""

import json
import sys
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file

from tiny_chatglm import TinyChatGLM

adapter, base = Path(sys.argv[1]), Path(sys.argv[2])
model = TinyChatGLM.load(base).eval()
config = model.config
torch.manual_seed(0)
prompt = torch.randint(5, min(config.mask_token_id, config.vocab_size), (2, 12))
answer = torch.randint(5, min(config.mask_token_id, config.vocab_size), (2, 8))
column = lambda value: torch.full((2, 1), value)
ids = torch.cat([prompt, column(config.gmask_token_id), column(config.bos_token_id), answer], 1)
with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    without = model(ids)
    peft = PeftModel.from_pretrained(model, adapter).eval()
    with_adapter = peft(ids)
for warning in caught:
    # PEFT reports missing and unexpected adapter keys only as a warning.
    print("warning:", str(warning.message)[:300])
file = adapter / "adapter_model.safetensors"
stored = load_file(file) if file.exists() else torch.load(adapter / "adapter_model.bin", weights_only=True)
live = {name.replace(".default", ""): value for name, value in peft.state_dict().items() if "lora_" in name}
equal = stored.keys() == live.keys() and all(torch.equal(stored[n].float(), live[n].float()) for n in stored)
settings = json.loads((adapter / "adapter_config.json").read_text())
difference = (with_adapter - without).abs().max().item()

# The same sum computed without PEFT: W x + scale * B A x.
scale = settings["lora_alpha"] / (settings["r"] ** 0.5 if settings.get("use_rslora") else settings["r"])
plain = TinyChatGLM.load(base)
for name, a in stored.items():
    if name.endswith("lora_A.weight"):
        path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        plain.get_submodule(path).weight.data += scale * stored[name.replace("lora_A", "lora_B")].float() @ a.float()
with torch.no_grad():
    merged = (plain(ids) - with_adapter).abs().max().item()
print(json.dumps(dict(adapter=adapter.name, r=settings["r"], alpha=settings["lora_alpha"],
                      targets=sorted(settings["target_modules"]), tensors=len(stored), tensors_equal=equal,
                      max_logit_change=difference, max_difference_to_merged=merged)))
sys.exit(not (equal and difference > 0 and merged < 1e-3))
