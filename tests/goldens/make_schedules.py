"""Learning rates of transformers' own schedules -> learning_rates.json (made with transformers 5.23.0).

    python tests/goldens/make_schedules.py > tests/goldens/learning_rates.json

Each case: the arguments of `get_scheduler`, and the rates of updates 0 .. last.
"""

import json

import torch
import transformers
from transformers import get_scheduler

BASE = 3e-4


def rates(name, warmup, total, specific):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=BASE)
    schedule = get_scheduler(name, optimizer, warmup, total, scheduler_specific_kwargs=specific)
    out = []
    # A little past the end: a run may be asked for its rate there.
    for _ in range(total + 3):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return out


cases = []
for warmup, total in [(0, 12), (3, 12), (5, 17)]:
    for name, specific in [
        ("linear", {}),
        ("cosine", {}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.5}),
        ("cosine_with_restarts", {}),
        ("constant", {}),
        ("constant_with_warmup", {}),
        ("polynomial", {}),
        ("polynomial", {"power": 2.0}),
        ("polynomial", {"power": 0.5, "lr_end": 0.2 * BASE}),
        ("inverse_sqrt", {}),
    ]:
        row = {"scheduler": name, "warmup": warmup, "total": total, **specific}
        cases.append({**row, "rates": rates(name, warmup, total, specific)})
rows = ",\n".join(json.dumps(case) for case in cases)
print(f'{{"transformers": "{transformers.__version__}", "base": {BASE}, "cases": [\n{rows}\n]}}')
