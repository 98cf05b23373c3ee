"""Builds the optimizer. Its parameter groups contain every trained parameter exactly once, which is asserted.

`training/prepare.py` calls it before DeepSpeed wraps the model. `optim.groups` assigns parameters by name. Within a
group, matrices have weight decay; parameters with one axis (norms, biases) and the token embedding have none, unless
`optim.decay_all` selects the released behavior. Frozen groups have no gradient and no optimizer state. For example

    {"adapters": GroupConfig(match=[".*lora"], lr_scale=5.0), "decoder": GroupConfig(match=["decoder"], frozen=True)}

gives the groups adapters (5 x the learning rate) and default (all others), each with and without decay. With
`optim.optimizer=muon` the weights listed in `roles.py` form a separate group, for example default.muon.
"""

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from pixel_sail import dist
from pixel_sail.config import DEFAULT_GROUP, ConfigError, GroupConfig, OptimConfig, matching
from pixel_sail.training.muon import ORTHOGONAL, MuonAdamW, mark
from pixel_sail.training.roles import is_orthogonal

logger = logging.getLogger(__name__)


def group_of_parameters(model: nn.Module, groups: Mapping[str, GroupConfig]) -> dict[str, str]:
    """Return the group of every parameter by name: the first that matches, else the default group.

    Raises: ConfigError if a pattern matches no parameter or a group is empty.
    """
    names = [name for name, _ in model.named_parameters()]
    group_of: dict[str, str] = {}
    for group, settings in groups.items():
        matched = [
            found for pattern in settings.match for found in matching(f"optim.groups.{group}.match", pattern, names)
        ]
        new = {name: group for name in matched if name not in group_of}
        if not new:
            earlier = sorted({group_of[name] for name in matched})
            raise ConfigError(
                f"optim.groups.{group}: all {len(set(matched))} parameters it matches belong to earlier groups "
                f"{earlier}; the first match wins, so name it before them"
            )
        group_of |= new
    return {name: group_of.get(name, DEFAULT_GROUP) for name in names}


def freeze(model: nn.Module, config: OptimConfig) -> None:
    """Disable gradients of frozen groups. Raises: ConfigError if no parameter is left to train."""
    for name, group in group_of_parameters(model, config.groups).items():
        if group != DEFAULT_GROUP and config.groups[group].frozen:
            model.get_parameter(name).requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"optim.groups: every parameter is frozen by {sorted(config.groups)}; leave some to train")


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Return the optimizer's groups; every parameter with a gradient is in exactly one."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    group_of = group_of_parameters(model, config.groups)
    is_muon = config.optimizer == "muon"
    groups: list[dict[str, Any]] = []
    for name in (*config.groups, DEFAULT_GROUP):
        own = config.groups.get(name, GroupConfig(match=[".*"]))
        orthogonal: list[nn.Parameter] = []
        decayed: list[nn.Parameter] = []
        kept: list[nn.Parameter] = []
        for full_name, parameter in model.named_parameters():
            if group_of[full_name] != name or not parameter.requires_grad:
                continue
            decays = config.decay_all or (parameter.ndim > 1 and id(parameter) not in embeddings)
            if is_muon and is_orthogonal(full_name, parameter.shape):
                orthogonal.append(parameter)
            else:
                (decayed if decays else kept).append(parameter)
        decay = config.weight_decay if own.weight_decay is None else own.weight_decay
        settings = {"name": name, "lr_scale": own.lr_scale}
        for parameters, weight_decay in ((decayed, decay), (kept, 0.0)):
            if parameters:
                groups.append({"params": parameters, **settings, "weight_decay": weight_decay})
        if orthogonal:
            groups.append({"params": orthogonal, **muon_settings(settings, config), "weight_decay": decay})
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert len(grouped) == len(set(grouped)) and set(grouped) == trainable, "parameter groups must partition the model"
    return groups


def muon_settings(settings: Mapping[str, Any], config: OptimConfig) -> dict[str, Any]:
    """Return the settings of a group's Muon part, derived from those of its other parts."""
    muon = config.muon
    own = {"name": f"{settings['name']}.muon", "lr_scale": settings["lr_scale"] * muon.lr_scale}
    return own | {ORTHOGONAL: True, "momentum": muon.momentum, "ns_steps": muon.ns_steps}


def build_optimizer(model: nn.Module, config: OptimConfig) -> AdamW:
    """Return the optimizer of the parameters that are not frozen; `set_learning_rate` sets the rate of every step."""
    freeze(model, config)
    groups = parameter_groups(model, config)
    for group in groups if dist.rank() == 0 else ():
        own = {key: value for key, value in group.items() if key != "params"}
        logger.info("training %d parameters with %s", sum(parameter.numel() for parameter in group["params"]), own)
    betas = (config.betas[0], config.betas[1])
    if config.optimizer == "adamw":
        return AdamW(groups, lr=config.lr, betas=betas, eps=config.eps)
    mark(parameter for group in groups if ORTHOGONAL in group for parameter in group["params"])
    return MuonAdamW([{ORTHOGONAL: False} | group for group in groups], lr=config.lr, betas=betas, eps=config.eps)


def set_learning_rate(optimizer: Optimizer, lr: float) -> dict[str, float]:
    """Set every group's learning rate to `lr` times its scale; return the rates for the log."""
    rates = {"optim/lr": lr}
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        if group["lr_scale"] != 1.0 or group.get(ORTHOGONAL, False):
            rates[f"optim/lr/{group['name']}"] = group["lr"]
    return rates
