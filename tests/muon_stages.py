"""Worker of tests/test_muon.py, run on every rank: two updates from known gradients, with ZeRO stages and without
DeepSpeed.

Writes to OUT/<stage>.safetensors the float32 weights before and after each: `0.name`, `1.name`, `2.name`.
"""

import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import save_file
from torch import Tensor, nn

from pixel_sail import dist
from pixel_sail.config import TrainConfig, load_config
from pixel_sail.training.accelerator import build_accelerator
from pixel_sail.training.build import build_model
from pixel_sail.training.checkpoint import _host_copy, _whole_parameter
from pixel_sail.training.finite import GradientCheck
from pixel_sail.training.muon import find_layouts
from pixel_sail.training.optim import build_optimizer, set_learning_rate

SMALL = (
    *("name=x", "optim=muon", "optim.lr=1e-2", "optim.max_grad_norm=1e6", "optim.weight_decay=0.1"),
    *("model.architecture.hidden_size=32", "model.architecture.intermediate_size=48"),
    *("model.architecture.num_hidden_layers=2", "model.architecture.mask_dim=16"),
)


def main() -> None:
    dist.ensure_launch_environment()
    for stage in sys.argv[2:]:
        save(Path(sys.argv[1]) / f"{stage}.safetensors", stage)
    dist.shutdown()


def gradient(name: str, shape: torch.Size, step: int) -> Tensor:
    """Return values exact in bfloat16; as a matrix, the singular values are 0.3 .. 1."""
    generator = torch.Generator().manual_seed(1000 * step + sum(name.encode()))
    initialized = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        u, s, v = torch.linalg.svd(initialized.flatten(1), full_matrices=False)
        initialized = (u * torch.linspace(0.3, 1.0, len(s)) @ v).view(shape)
    return initialized.bfloat16().float()


class Known:
    """Replaces the model's forward pass by a loss with known gradients."""

    def forward(self, step: int) -> Tensor:
        return sum((p * gradient(n, p.shape, step).to(p.dtype)).sum() for n, p in self.named_parameters())


def save(path: Path, stage: str) -> None:
    AcceleratorState._reset_state()
    GradientState._reset_state()
    name, _, precision = stage.partition("-")
    own = (f"deepspeed={name}", f"optim.precision={precision or 'fp32'}")
    config = load_config("train", TrainConfig, [*SMALL, *own])
    accelerator = build_accelerator(config, 1)
    model, _ = build_model(config.model, seed=0, teachers={})
    model.__class__ = type("KnownModel", (Known, type(model)), {})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    model, optimizer = accelerator.prepare(model, build_optimizer(model, config.optim))
    find_layouts(optimizer)
    set_learning_rate(optimizer, config.optim.lr)
    gradients = GradientCheck(model, accelerator)
    tensors = weights(accelerator.unwrap_model(model), 0)
    for step in (1, 2):
        with accelerator.accumulate(model):
            gradients.backward(model(step), ("a",))
            optimizer.step()
            optimizer.zero_grad()
        tensors |= weights(accelerator.unwrap_model(model), step)
    if dist.rank() == 0:
        save_file(tensors, path)


def weights(model: nn.Module, step: int) -> dict[str, Tensor]:
    return {f"{step}.{name}": _host_copy(_whole_parameter(parameter)) for name, parameter in model.named_parameters()}


if __name__ == "__main__":
    main()
