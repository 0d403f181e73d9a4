"""Is tiny_chatglm.py ChatGLM-6B? check_goldens.py GOLDENS: checkpoints, forward cases, loss."""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from tiny_chatglm import TinyChatGLM

root = Path(sys.argv[1], "chatglm_v1")
model = TinyChatGLM.load(root / "checkpoint_fp32_safetensors")
bin_model = TinyChatGLM.load(root / "checkpoint_fp16_bin")
same = all(torch.equal(a, b) for a, b in zip(model.parameters(), bin_model.parameters()))
print("fp16 .bin shards equal the fp32 safetensors:", same)
worst = 0.0
with torch.no_grad():
    for name in ("train_rightpad", "leftpad_tokenizer", "leftpad_model_masks", "mixed_gmask_mask", "long_single"):
        case = load_file(root / "forward" / f"{name}.safetensors")
        given = dict(position_ids=case["position_ids"], attention_mask=case["attention_mask"])
        logits = model(case["input_ids"], **given)
        if "logits_rows" in case:
            logits = logits[:, case["logits_rows"]]
        difference = (logits - case["logits"]).abs().max().item()
        worst = max(worst, difference)
        line = f"{name}: logits {difference:.2e}"
        if "loss" in case:
            loss, derived = model(case["input_ids"], labels=case["labels"],
                                  **({} if name == "train_rightpad" else given))
            if name == "train_rightpad":
                line += f", with own masks {(derived - case['logits']).abs().max():.2e}"
            line += f", loss {abs(loss.item() - case['loss'].item()):.2e}"
        print(line)
print("worst logit difference", worst, "(tolerance 5e-5)")
sys.exit(not (same and worst <= 5e-5))
