"""Worker of tests/test_non_finite.py, run on every rank: a non-finite gradient on one rank, at every ZeRO stage.

Writes to OUT/rank{r}.json, by stage (also without DeepSpeed): the error message, and whether all parameters are
unchanged.
"""

import json
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.optim import AdamW

from pixel_sail import dist
from pixel_sail.config import TrainConfig, load_config
from pixel_sail.training.accelerator import build_accelerator
from pixel_sail.training.checkpoint import _whole_parameter
from pixel_sail.training.finite import GradientCheck, NonFiniteLossError

BAD_RANK, BAD_STEP = 1, 2


def main() -> None:
    out, accumulation = Path(sys.argv[1]), 2
    results = {stage: outcome(stage, accumulation) for stage in sys.argv[2:]}
    (out / f"rank{dist.rank()}.json").write_text(json.dumps(results))
    dist.shutdown()


def outcome(stage: str, accumulation: int) -> dict[str, object]:
    AcceleratorState._reset_state()
    GradientState._reset_state()
    stage, _, precision = stage.partition("-")
    overrides = ["name=x", f"deepspeed={stage}", f"optim.precision={precision or 'fp32'}"]
    accelerator = build_accelerator(load_config("train", TrainConfig, overrides), accumulation)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 300), nn.Tanh(), nn.Linear(300, 2))
    groups = [{"params": [model[0].weight, model[2].weight]}, {"params": [model[0].bias, model[2].bias]}]
    model, optimizer = accelerator.prepare(model, AdamW(groups, lr=0.1))
    gradients = GradientCheck(model, accelerator)
    inputs = torch.ones(3, 4, dtype=next(accelerator.unwrap_model(model).parameters()).dtype)
    for step in range(1, BAD_STEP + 1):
        before = whole(model, accelerator)
        for micro in range(accumulation):
            with accelerator.accumulate(model):
                loss = model(inputs).float().square().mean()
                if (dist.rank(), step, micro) == (BAD_RANK, BAD_STEP, 0):
                    loss = loss + 0.0 * (0.0 * loss).sqrt()
                assert torch.isfinite(loss)
                try:
                    gradients.backward(loss, ("a", "b"))
                except NonFiniteLossError as error:
                    kept = [bool(torch.equal(x, y)) for x, y in zip(before, whole(model, accelerator), strict=True)]
                    return {"step": step, "message": str(error), "kept": kept}
                optimizer.step()
                optimizer.zero_grad()
        changed = [not torch.equal(x, y) for x, y in zip(before, whole(model, accelerator), strict=True)]
        assert all(changed), f"{stage}: step {step} changed {changed}"
    return {"message": "no error"}


def whole(model: nn.Module, accelerator) -> list[torch.Tensor]:
    return [
        _whole_parameter(parameter).detach().float().clone()
        for parameter in accelerator.unwrap_model(model).parameters()
    ]


if __name__ == "__main__":
    main()
