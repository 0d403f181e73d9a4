"""Opens in PEFT what glmtune wrote, and compares the logits.

    GLMTUNE_PEFT_OUT=DIR cargo test --test adapters folders_for_peft
    python tests/goldens/open_in_peft.py GOLDENS DIR      # GOLDENS: the set that the test used
"""

import sys
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file

from make_peft import base

goldens, out = Path(sys.argv[1]), Path(sys.argv[2])
folders = sorted(path for path in out.iterdir() if (path / "said.safetensors").exists())
assert folders, f"nothing in {out}"
for folder in folders:
    said = load_file(folder / "said.safetensors")
    config = PeftConfig.from_pretrained(folder)
    # CAUSAL_LM adds `generate`, which the tiny base has not.
    config.task_type = None
    model = PeftModel.from_pretrained(base(goldens), folder, config=config).eval()
    with torch.no_grad():
        logits = model(said["input_ids"]).flatten(0, 1)
        plain = base(goldens)(said["input_ids"]).flatten(0, 1)
    off = (logits - said["logits"]).abs().max().item()
    moved = (plain - said["logits"]).abs().max().item()
    print(f"{folder.name}: {model.peft_config['default'].r=} logits within {off:.1e}; training moved them by {moved:.1e}")
    assert off < 1e-3 * moved + 5e-5
