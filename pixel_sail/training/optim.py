"""AdamW with parameter groups that are proved to cover every parameter exactly once.

Place in the flow: `training/loop.py` builds it before DeepSpeed takes over. Two groups: matrices decay, everything
with one axis (norms, biases) and the token embedding does not - unless `optim.decay_all` asks for the released
behaviour.
"""

from typing import Any

from torch import nn
from torch.optim import AdamW

from pixel_sail.config import OptimConfig


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Return the optimizer's groups; every trainable parameter is in exactly one."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decays = config.decay_all or (parameter.ndim > 1 and id(parameter) not in embeddings)
            (decayed if decays else kept).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert len(grouped) == len(set(grouped)) and set(grouped) == trainable, "parameter groups must partition the model"
    return groups


def build_optimizer(model: nn.Module, config: OptimConfig) -> AdamW:
    """Return the optimizer at the learning rate of step 0; the loop sets the rate of every step."""
    return AdamW(
        parameter_groups(model, config), lr=config.lr, betas=(config.betas[0], config.betas[1]), eps=config.eps
    )
