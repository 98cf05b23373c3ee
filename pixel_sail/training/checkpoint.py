"""Checkpoints: everything a run needs to continue as if it had never stopped.

Place in the flow: `training/loop.py` starts with `latest`; `checkpoint_writer.py` writes what `collect` returns. A
checkpoint does not depend on the number of processes or the ZeRO stage: parameters and Adam moments are whole float32
tensors under the model's own names; frozen parameters have no moments. With a moving average of the weights that is a
third entry beside the moments.

    runs/<name>/checkpoints/step_00000500/
        model.safetensors  optimizer.safetensors  state.json  manifest.json (sha256 of each)  COMPLETE

It is written under another name, hashed, marked complete and renamed last, so a folder of the final name is always
whole.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from pixel_sail import dist
from pixel_sail.data.packing import LanePosition
from pixel_sail.files import sha256
from pixel_sail.model.distill_head import PREFIX as DISTILL_HEAD
from pixel_sail.model.lora import fold_lora
from pixel_sail.training.average import AVERAGE, update_average

MARKER, MANIFEST, STATE = "COMPLETE", "manifest.json", "state.json"
MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
_GO_BACK = "Delete this checkpoint folder to continue from the one before"
MOMENTS = ("exp_avg", "exp_avg_sq")
GIVEN = "given_value"
"""Attribute of a frozen parameter of rank 0: its float32 value, where training works with a rounded one."""
DATA_FILES = "data_files"
"""Where a configuration holds what `prepare.data_identity` returns."""

logger = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint is damaged or belongs to another run."""


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Where a run stands."""

    step: int = 0
    """Finished optimizer steps."""
    lanes: tuple[LanePosition, ...] = ()
    """Where each lane of the data stands."""
    num_skipped: int = 0
    """Samples left out so far."""
    source_sums: tuple[tuple[float, ...], ...] = ()
    """Per source, sums of `source_columns` since the last log line."""

    @classmethod
    def start(cls, *, num_lanes: int, num_sources: int, num_columns: int) -> "TrainState":
        """Return where every run begins."""
        return cls(lanes=(LanePosition(),) * num_lanes, source_sums=((0.0,) * num_columns,) * num_sources)


def collect(
    model: nn.Module, optimizer: Optimizer, accelerator: Accelerator
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return whole float32 parameters and, of trained ones, Adam moments (and average) by name, on the CPU of rank 0
    (empty elsewhere).

    Every rank must call it: sharded tensors are gathered one by one.
    """
    _link_sharded_states(optimizer)
    parameters: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    keys = _state_keys(optimizer)
    for name, parameter in accelerator.unwrap_model(model).named_parameters():
        whole = {"": _whole_parameter(parameter)}
        if parameter.requires_grad:
            whole |= {key: _whole_moment(parameter, key, optimizer) for key in keys}
        if dist.rank() == 0:
            copies = {key: _host_copy(value) for key, value in whole.items()}
            parameters[name] = copies.pop("")
            moments |= {f"{key}.{name}": copy for key, copy in copies.items()}
    return parameters, moments


def latest(folder: Path) -> Path | None:
    """Return the newest complete checkpoint, None where there is none."""
    found = complete_checkpoints(folder)
    return found[-1] if found else None


def latest_step(folder: Path) -> int:
    """Return the step of the newest complete checkpoint, 0 where there is none."""
    found = latest(folder)
    return 0 if found is None else int(found.name.removeprefix("step_"))


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("step_*") if is_complete(path))


def is_complete(path: Path) -> bool:
    """Return whether a checkpoint was written to its end."""
    return (path / MARKER).is_file()


def read(
    path: Path,
    config: dict[str, Any],
    *,
    defaults: Mapping[str, Any] = MappingProxyType({}),
    allow_changed_data: bool = False,
) -> tuple[TrainState, dict[str, Tensor], dict[str, Tensor]]:
    """Return state, parameters and moments of a checkpoint.

    `defaults`: what a key counts as that a configuration lacks, as that of a run does which is older than the key.
    Raises: CheckpointError when a file differs from its hash, the run was configured otherwise, or (unless allowed)
    had other data.
    """
    verify(path)
    saved = json.loads((path / STATE).read_text())
    then, now = (with_defaults(given, defaults) for given in (saved["config"], config))
    differing = dict(differing_leaves(then, json.loads(json.dumps(now))))
    changed = {key: differing.pop(key) for key in list(differing) if key.split(".")[0] == DATA_FILES}
    if changed and not allow_changed_data:
        raise CheckpointError(
            f"{path}: the run was started with other data; (saved, now): {changed}. Put the files back, choose another "
            "run_dir, or set checkpoint.allow_changed_data=true"
        )
    if changed:
        logger.warning("the data changed, which checkpoint.allow_changed_data lets pass; (saved, now): %s", changed)
    if differing:
        raise CheckpointError(
            f"{path}: the run was started with another configuration; (saved, now): {differing}. "
            "Choose another run_dir, or go back to the saved values"
        )
    fields = saved["train_state"]
    lanes = tuple(LanePosition(next=lane["next"], waiting=tuple(lane["waiting"])) for lane in fields["lanes"])
    state = TrainState(
        step=fields["step"],
        lanes=lanes,
        num_skipped=fields["num_skipped"],
        source_sums=tuple(tuple(row) for row in fields["source_sums"]),
    )
    return state, load_file(path / MODEL), load_file(path / OPTIMIZER)


def verify(path: Path) -> None:
    """Compare every file of a checkpoint with its hash. Raises: CheckpointError for one that differs or is missing."""
    for name, expected in _manifest(path).items():
        found = sha256(path / name)
        if found != expected:
            raise CheckpointError(
                f"{path / name}: sha256 {found[:12]}.. found, {expected[:12]}.. expected from {MANIFEST}; the file was "
                f"damaged or changed. {_GO_BACK}"
            )


def _manifest(path: Path) -> dict[str, str]:
    """Return the hash of each file of a checkpoint. Raises: CheckpointError when one of them is not there."""
    names = {MODEL, OPTIMIZER, STATE}
    missing = sorted(name for name in {MANIFEST, *names} if not (path / name).is_file())
    try:
        manifest = {} if missing else json.loads((path / MANIFEST).read_text())
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path / MANIFEST}: {error}; {_GO_BACK}") from error
    if missing or set(manifest) != names:
        raise CheckpointError(
            f"{path}: files {missing} are missing, {MANIFEST} has hashes of {sorted(manifest)}, expected all of "
            f"{sorted(names)}; {_GO_BACK}"
        )
    return manifest


def load_parameters(model: nn.Module, parameters: dict[str, Tensor]) -> None:
    """Copy saved parameters into a model that is not wrapped yet; names must agree exactly."""
    own = dict(model.named_parameters())
    if own.keys() != parameters.keys():
        raise CheckpointError(f"parameters differ: {sorted(own.keys() ^ parameters.keys())[:10]}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(parameters[name])


def keep_given_values(model: nn.Module) -> None:
    """Note the frozen weights on rank 0 before DeepSpeed rounds them, so that they are saved as they were given."""
    for parameter in model.parameters():
        if dist.rank() == 0 and not parameter.requires_grad:
            setattr(parameter, GIVEN, parameter.detach().float().cpu().clone())


def restore_optimizer(
    model: nn.Module,
    optimizer: Optimizer,
    accelerator: Accelerator,
    *,
    state: TrainState,
    parameters: dict[str, Tensor],
    moments: dict[str, Tensor],
) -> None:
    """Put Adam's moments and step count, and the float32 master weights, into the wrapped model and optimizer."""
    base = list(_optimizer_chain(optimizer))[-1]
    keys = tuple(dict.fromkeys(name.split(".")[0] for name in moments))
    for parameter in _owned_by(base, optimizer):
        base.state[parameter] = {"step": torch.tensor(float(state.step))}
        base.state[parameter] |= {key: torch.zeros_like(parameter) for key in keys}
    _link_sharded_states(optimizer)
    for name, parameter in accelerator.unwrap_model(model).named_parameters():
        if parameter.requires_grad:
            _set_master(parameter, parameters[name])
            for key in keys:
                _set_moment(parameter, key, moments[f"{key}.{name}"], base)


def average_weights(optimizer: Optimizer, *, decay: float, step: int) -> None:
    """Take the weights after a step into their moving average; `step`: finished steps before it."""
    base = list(_optimizer_chain(optimizer))[-1]
    update_average(_owned_by(base, optimizer), base.state, decay=decay, step=step)


def export(folder: Path, model: nn.Module, optimizer: Optimizer, accelerator: Accelerator, processor: Any) -> None:
    """Write a plain Hugging Face folder (weights as safetensors, config, tokenizer), complete or not at all.

    The weights are averaged where the run averages them, and low-rank adapters are part of the weights they adapt. The
    linear layers towards experts stay behind: nothing but training uses them.
    """
    state = _plain_weights(model, optimizer, accelerator)
    if dist.rank() == 0:
        working = folder.with_name(f".writing_{folder.name}")
        shutil.rmtree(working, ignore_errors=True)
        plain = accelerator.unwrap_model(model)
        plain.config.averaged_weights = AVERAGE in _state_keys(optimizer)
        plain.save_pretrained(working, state_dict={name: _host_copy(tensor) for name, tensor in state.items()})
        processor.save_pretrained(working)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(working, folder)
    dist.barrier()


def _plain_weights(model: nn.Module, optimizer: Optimizer, accelerator: Accelerator) -> dict[str, Tensor]:
    """Return the whole weights of a model that is used and not trained; every rank must call it."""
    _link_sharded_states(optimizer)
    is_averaged = AVERAGE in _state_keys(optimizer)
    plain = accelerator.unwrap_model(model)
    whole = {
        name: _whole_moment(parameter, AVERAGE, optimizer)
        if is_averaged and parameter.requires_grad
        else _whole_parameter(parameter)
        for name, parameter in plain.named_parameters()
    }
    whole = fold_lora(plain, {name: tensor.detach().clone() for name, tensor in whole.items()})
    return {name: tensor for name, tensor in whole.items() if not name.startswith(DISTILL_HEAD)}


def with_defaults(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return a nested configuration with the defaults of keys that it lacks."""
    both = {key: default for key, default in defaults.items() if key not in config}
    for key, value in config.items():
        default = defaults.get(key)
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            value = with_defaults(value, default)
        both[key] = value
    return both


def differing_leaves(saved: Any, now: Any, path: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Yield (dotted key, (saved value, present value)) for every leaf in which two nested dicts differ."""
    if isinstance(saved, dict) and isinstance(now, dict):
        for key in sorted(saved.keys() | now.keys()):
            yield from differing_leaves(saved.get(key), now.get(key), f"{path}.{key}" if path else key)
    elif saved != now:
        yield path, (saved, now)


def plain_copy(model: nn.Module, optimizer: Optimizer, accelerator: Accelerator) -> Any:
    """Return the model itself, or a whole copy of it where ZeRO-3 shards its parameters or their average is wanted;
    every rank must call it.

    A sharded model gathers parameters at each call of a module, so that ranks may not answer different questions.
    """
    plain = accelerator.unwrap_model(model)
    is_sharded = any(hasattr(parameter, "ds_id") for parameter in plain.parameters())
    if not is_sharded and AVERAGE not in _state_keys(optimizer):
        return plain
    copy = type(plain)(plain.config).to(accelerator.device, plain.dtype)
    load_parameters(copy, _plain_weights(model, optimizer, accelerator))
    return copy


def _state_keys(optimizer: Optimizer) -> tuple[str, ...]:
    """Return the entries of the optimizer's state that are as large as the weights."""
    states = list(_optimizer_chain(optimizer))[-1].state.values()
    return (*MOMENTS, AVERAGE) if any(AVERAGE in own for own in states) else MOMENTS


def _owned_by(base: Optimizer, optimizer: Optimizer) -> list[Tensor]:
    """Return the tensors whose state torch's optimizer keeps.

    ZeRO-3 hands them to it one after another within a step, so that its groups are empty in between.
    """
    for wrapper in _optimizer_chain(optimizer):
        if hasattr(wrapper, "fp32_partitioned_groups_flat"):
            return list(wrapper.fp32_partitioned_groups_flat)
    return [parameter for group in base.param_groups for parameter in group["params"]]


def _optimizer_chain(optimizer: Any) -> Iterator[Any]:
    """Yield the optimizer and everything it wraps: accelerate's, DeepSpeed's, torch's."""
    while optimizer is not None:
        yield optimizer
        optimizer = getattr(optimizer, "optimizer", None)


def _link_sharded_states(optimizer: Optimizer) -> None:
    """Tie every parameter to its slice of DeepSpeed's flat optimizer state.

    DeepSpeed 0.19 does it once, after stepping the first parameter group, when later groups have no state yet; those
    would stay without moments for good. Doing it again is harmless.
    """
    for wrapper in _optimizer_chain(optimizer):
        if hasattr(wrapper, "_lazy_init_hp_params_optimizer_state"):
            wrapper._hp_optimizer_states_linked = False
            wrapper._lazy_init_hp_params_optimizer_state()


def _host_copy(tensor: Tensor) -> Tensor:
    """Return a float32 copy in host memory that training does not touch any more."""
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


def _whole_parameter(parameter: nn.Parameter) -> Tensor:
    """Return the float32 value of a parameter, gathered where DeepSpeed shards it."""
    if not parameter.requires_grad:
        return _whole_frozen(parameter)
    if _is_sharded(parameter):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)
    return parameter


def _whole_frozen(parameter: nn.Parameter) -> Tensor:
    """Return the value of a frozen parameter as it was given, or as it is where nothing was noted."""
    value: Tensor = parameter
    if hasattr(parameter, "ds_id"):
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        with GatheredParameters([parameter]):
            value = parameter.detach().clone()
    return getattr(parameter, GIVEN, value)


def _whole_moment(parameter: nn.Parameter, key: str, optimizer: Optimizer) -> Tensor:
    """Return one Adam moment of a parameter, gathered where DeepSpeed shards it."""
    if _is_sharded(parameter):
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(parameter, key)
    return list(_optimizer_chain(optimizer))[-1].state[parameter][key]


def _set_master(parameter: nn.Parameter, value: Tensor) -> None:
    """Set the float32 master value of a parameter that DeepSpeed shards; a plain one was loaded before."""
    if _is_sharded(parameter):
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, value.to(parameter.device))


def _set_moment(parameter: nn.Parameter, key: str, value: Tensor, base: Optimizer) -> None:
    """Set one Adam moment of a parameter."""
    if _is_sharded(parameter):
        from deepspeed.utils import safe_set_full_optimizer_state

        safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)
    else:
        base.state[parameter][key].copy_(value)


def _is_sharded(parameter: nn.Parameter) -> bool:
    """Return whether DeepSpeed keeps the optimizer state of this parameter in flat slices."""
    return hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id")


def merge_lanes(
    before: Sequence[LanePosition], own: dict[int, LanePosition], lookahead: int, device: torch.device
) -> tuple[LanePosition, ...]:
    """Return the positions of all lanes after a step, each rank knowing only its own."""
    # One row per lane: whether it moved, next, how many wait, which. Only its owner fills it, so that the sum over
    # ranks is the table; lanes whose round it was not stay where they are.
    mine = torch.zeros(len(before), 3 + lookahead, dtype=torch.int64)
    for lane, position in own.items():
        row = (1, position.next, len(position.waiting), *position.waiting)
        mine[lane, : len(row)] = torch.tensor(row)
    rows = dist.sum_over_ranks(mine.to(device)).tolist()
    return tuple(
        LanePosition(next=row[1], waiting=tuple(row[3 : 3 + row[2]])) if row[0] else position
        for row, position in zip(rows, before, strict=True)
    )
