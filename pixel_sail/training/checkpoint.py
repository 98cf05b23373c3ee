"""Checkpoints: the full training state, from which a run resumes with the same results.

`training/prepare.py` reads the `latest`; `checkpoint_writer.py` writes the result of `collect`. A checkpoint does not
depend on the number of processes or the ZeRO stage: parameters and the optimizer's moments (two for AdamW, one for
Muon) are unsharded float32 tensors under the model's own names. Frozen parameters have no moments. A moving average of
the weights is stored like another moment.

    runs/<name>/checkpoints/step_00000500/
        model.safetensors  optimizer.safetensors  state.json  manifest.json (sha256 of each)  COMPLETE

It is written under a temporary name, hashed, marked complete and renamed last, so a folder with the final name is
always complete.
"""

import json
import logging
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from pixel_sail import dist
from pixel_sail.data.packing import StreamState
from pixel_sail.errors import ExpectedError, WriteError
from pixel_sail.files import (
    WRITING,
    check_fields,
    read_json,
    reason_of,
    recover_folder,
    replace_folder,
    sha256,
    writing,
)
from pixel_sail.model.distill_head import PREFIX as DISTILL_HEAD
from pixel_sail.model.lora import fold_lora
from pixel_sail.renamed import current_config, current_state
from pixel_sail.training.average import AVERAGE, update_average
from pixel_sail.training.muon import MOMENTUM, is_marked

MARKER, MANIFEST, STATE = "COMPLETE", "manifest.json", "state.json"
MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
_GO_BACK = "Delete this checkpoint folder to continue from the one before"
MOMENTS = ("exp_avg", "exp_avg_sq")
GIVEN = "given_value"
"""Attribute of a frozen parameter on rank 0: its float32 value, if training uses a rounded one."""
DATA_FILES = "data_files"
"""Key of a saved configuration with the result of `prepare.data_identity`."""

logger = logging.getLogger(__name__)


class CheckpointError(ExpectedError, RuntimeError):
    """A checkpoint is damaged or belongs to another run."""


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Progress of a run."""

    step: int = 0
    """Finished optimizer steps."""
    streams: tuple[StreamState, ...] = ()
    """Position of each data stream."""
    num_skipped: int = 0
    """Samples skipped so far."""
    source_sums: tuple[tuple[float, ...], ...] = ()
    """Per source, sums of `source_columns` since the last log line."""

    @classmethod
    def start(cls, *, num_streams: int, num_sources: int, num_columns: int) -> "TrainState":
        """Return the initial state of a run."""
        return cls(streams=(StreamState(),) * num_streams, source_sums=((0.0,) * num_columns,) * num_sources)


def collect(
    model: nn.Module, optimizer: Optimizer, accelerator: Accelerator
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return unsharded float32 parameters and the moments (and average) of trained ones by name, on the CPU of rank 0
    (empty elsewhere).

    Every rank must call it, as sharded tensors are gathered one by one.
    """
    _link_sharded_states(optimizer)
    parameters: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    is_averaged = _is_averaged(optimizer)
    for name, parameter in accelerator.unwrap_model(model).named_parameters():
        whole = {"": _whole_parameter(parameter)}
        if parameter.requires_grad:
            keys = state_keys(parameter, is_averaged=is_averaged)
            whole |= {key: _whole_moment(parameter, key, optimizer) for key in keys}
        if dist.rank() == 0:
            copies = {key: _host_copy(value) for key, value in whole.items()}
            parameters[name] = copies.pop("")
            moments |= {f"{key}.{name}": copy for key, copy in copies.items()}
    return parameters, moments


def latest(folder: Path) -> Path | None:
    """Return the newest complete checkpoint, None if there is none."""
    found = complete_checkpoints(folder)
    return found[-1] if found else None


def latest_step(folder: Path) -> int:
    """Return the step of the newest complete checkpoint, 0 if there is none."""
    found = latest(folder)
    return 0 if found is None else step_of(found.name)


def checkpoint_name(step: int) -> str:
    """Return the folder name of a step's checkpoint."""
    return f"step_{step:08d}"


def step_of(name: str) -> int:
    """Return the step of a checkpoint's name, -1 for any other name: copies kept under a name like
    `step_00000500_best` do not count as checkpoints of the run."""
    found = re.fullmatch(r"step_([0-9]{8,})", name)
    return int(found[1]) if found and checkpoint_name(int(found[1])) == name else -1


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("step_*") if step_of(path.name) >= 0 and is_complete(path)]
    return sorted(found, key=lambda path: step_of(path.name))


def is_complete(path: Path) -> bool:
    """Return whether a checkpoint was written completely."""
    return (path / MARKER).is_file()


def read(
    path: Path,
    config: dict[str, Any],
    *,
    defaults: Mapping[str, Any] = MappingProxyType({}),
    free: Collection[str] = (),
    allow_changed_data: bool = False,
) -> tuple[TrainState, dict[str, Tensor], dict[str, Tensor]]:
    """Return state, parameters and moments of a checkpoint.

    `defaults`: values of keys that a saved configuration lacks because the run is older than the key.
    `free`: dotted keys that may differ.
    Raises: CheckpointError if a file differs from its hash or has invalid content, the run had another configuration,
    or (unless allowed) other data.
    """
    verify(path)
    saved = read_json(path / STATE, {"config": dict, "train_state": dict}, fail=CheckpointError, remedy=_GO_BACK)
    state = _train_state(current_state(saved["train_state"]), path)
    then, now = (with_defaults(given, defaults) for given in (current_config(saved["config"]), config))
    differing = dict(differing_leaves(then, json.loads(json.dumps(now))))
    if freely := {key: differing.pop(key) for key in free if key in differing}:
        logger.info("%s: the run resumes with changed settings (saved, now): %s", path, freely)
    changed = {key: differing.pop(key) for key in list(differing) if key.split(".")[0] == DATA_FILES}
    if changed and not allow_changed_data:
        raise CheckpointError(
            f"{path}: the run was started with other data; (saved, now): {changed}. Restore the files, use another "
            "run_dir, or set checkpoint.allow_changed_data=true"
        )
    if changed:
        logger.warning("the data changed, which checkpoint.allow_changed_data permits; (saved, now): %s", changed)
    if differing:
        raise CheckpointError(
            f"{path}: the run was started with another configuration; (saved, now): {differing}. "
            "Use another run_dir, or restore the saved values"
        )
    return state, read_tensors(path / MODEL), read_tensors(path / OPTIMIZER)


def _train_state(fields: Any, path: Path) -> TrainState:
    """Return the state of a run from its checkpoint's fields. Raises: CheckpointError."""
    where = f"{path / STATE}: train_state"
    kinds = {"step": int, "streams": list, "num_skipped": int, "source_sums": list}
    check_fields(fields, where, kinds, fail=CheckpointError, remedy=_GO_BACK)
    if fields["step"] != step_of(path.name) or fields["num_skipped"] < 0:
        raise CheckpointError(
            f"{where}: found step {fields['step']} and {fields['num_skipped']} skipped samples, expected the step of "
            f"{path.name} and no negative number; {_GO_BACK}"
        )
    sums = fields["source_sums"]
    if not all(isinstance(row, list) and all(map(_is_number, row)) for row in sums):
        raise CheckpointError(f"{where}: found source_sums {str(sums)[:200]}, expected lists of numbers; {_GO_BACK}")
    return TrainState(
        step=fields["step"],
        streams=read_stream_states(fields["streams"], where, fail=CheckpointError, remedy=_GO_BACK),
        num_skipped=fields["num_skipped"],
        source_sums=tuple(tuple(row) for row in sums),
    )


def read_stream_states(
    streams: Sequence[Any], where: str, *, fail: type[ExpectedError], remedy: str
) -> tuple[StreamState, ...]:
    """Return positions of streams from JSON. Raises: `fail`."""
    for number, stream in enumerate(streams):
        own = f"{where}: stream {number}"
        check_fields(stream, own, {"next": int, "waiting": list}, fail=fail, remedy=remedy)
        numbers = [stream["next"], *stream["waiting"]]
        if not all(_is_number(value) and isinstance(value, int) and value >= 0 for value in numbers):
            raise fail(f"{own}: found {str(numbers)[:200]}, expected positions from 0; {remedy}")
    return tuple(StreamState(next=stream["next"], waiting=tuple(stream["waiting"])) for stream in streams)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_fits(path: Path, state: TrainState, start: TrainState) -> None:
    """Raise CheckpointError unless a state has as many streams, sources and columns as the run's initial state."""
    sizes = [(len(own.streams), [len(row) for row in own.source_sums]) for own in (state, start)]
    if sizes[0] != sizes[1]:
        raise CheckpointError(
            f"{path / STATE}: (streams, sums of each source) found {sizes[0]}, expected {sizes[1]}; {_GO_BACK}"
        )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint file, all float32 and finite. Raises: CheckpointError."""
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: found no safetensors ({reason_of(error)}); {_GO_BACK}") from error
    if others := {name: tensor.dtype for name, tensor in tensors.items() if tensor.dtype != torch.float32}:
        raise CheckpointError(f"{path}: found {str(others)[:300]}, expected float32; {_GO_BACK}")
    if broken := not_finite(tensors):
        raise CheckpointError(
            f"{path}: {len(broken)} tensors are not finite, among them {broken[:5]}; no run can resume from it. "
            f"{_GO_BACK}"
        )
    return tensors


def verify(path: Path) -> None:
    """Verify the hash of every file of a checkpoint. Raises: CheckpointError for one that differs or is missing."""
    for name, expected in _manifest(path).items():
        _verify_file(path / name, expected)


def _verify_file(file: Path, expected: str) -> None:
    found = sha256(file)
    if found != expected:
        raise CheckpointError(
            f"{file}: sha256 {found[:12]}.. found, {expected[:12]}.. expected from {MANIFEST}; the file was "
            f"damaged or changed. {_GO_BACK}"
        )


def saved_config(path: Path) -> dict[str, Any]:
    """Return the configuration of a checkpoint. Raises: CheckpointError as `verify`, for this file."""
    _verify_file(path / STATE, _manifest(path)[STATE])
    return current_config(json.loads((path / STATE).read_text())["config"])


def _manifest(path: Path) -> dict[str, str]:
    """Return the hash of each file of a checkpoint. Raises: CheckpointError if a file is missing."""
    names = {MODEL, OPTIMIZER, STATE}
    missing = sorted(name for name in {MANIFEST, *names} if not (path / name).is_file())
    manifest: dict[str, Any] = {}
    if not missing:
        manifest = read_json(path / MANIFEST, {}, fail=CheckpointError, remedy=_GO_BACK)
    if missing or set(manifest) != names:
        raise CheckpointError(
            f"{path}: files {missing} are missing, {MANIFEST} has hashes of {sorted(manifest)}, expected all of "
            f"{sorted(names)}; {_GO_BACK}"
        )
    check_fields(manifest, str(path / MANIFEST), dict.fromkeys(names, str), fail=CheckpointError, remedy=_GO_BACK)
    return manifest


def load_parameters(model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Copy saved parameters into a model that is not wrapped yet. Names and shapes must match exactly.

    Raises: CheckpointError.
    """
    own = dict(model.named_parameters())
    check_shapes("parameters", parameters, {name: parameter.shape for name, parameter in own.items()})
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(parameters[name])


def check_moments(model: nn.Module, moments: Mapping[str, Tensor], *, is_averaged: bool) -> None:
    """Raise CheckpointError unless saved moments (and averages) match a model that is not wrapped yet."""
    expected = {
        f"{key}.{name}": parameter.shape
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        for key in state_keys(parameter, is_averaged=is_averaged)
    }
    check_shapes("moments", moments, expected)


def state_keys(weight: Tensor, *, is_averaged: bool) -> tuple[str, ...]:
    """Return the entries of a trained tensor's optimizer state that have its shape."""
    moments = (MOMENTUM,) if is_marked(weight) else MOMENTS
    return (*moments, AVERAGE) if is_averaged else moments


def check_shapes(what: str, found: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> None:
    """Raise CheckpointError unless names and shapes match exactly; `copy_` alone would broadcast."""
    names = sorted(found.keys() ^ expected.keys())
    if names:
        raise CheckpointError(
            f"{what} differ in {len(names)} names, found alone or expected alone: {names[:10]}; the checkpoint is of "
            f"another model or damaged. {_GO_BACK}"
        )
    shapes = {name: (tuple(found[name].shape), tuple(expected[name])) for name in expected}
    if others := {name: pair for name, pair in shapes.items() if pair[0] != pair[1]}:
        raise CheckpointError(
            f"{what}: (found, expected) shapes differ in {len(others)}: {dict(list(others.items())[:5])}; the "
            f"checkpoint is of another model or damaged. {_GO_BACK}"
        )


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of tensors with a NaN or an infinite value."""
    # A finite sum proves that all elements are finite, at a twentieth of the cost; but a sum may overflow.
    suspects = [name for name, tensor in tensors.items() if not torch.isfinite(tensor.sum())]
    return [name for name in suspects if not torch.isfinite(tensors[name]).all()]


def condition(checkpoint: Path | None) -> str:
    """Return, after a failed step, whether the last checkpoint's values are finite and what to do with it."""
    if checkpoint is None:
        return "there is no checkpoint yet"
    highest, broken = 0.0, list[str]()
    try:
        for part in (MODEL, OPTIMIZER):
            with safe_open(checkpoint / part, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    tensor = file.get_tensor(name)
                    broken += not_finite({name: tensor})
                    if part == MODEL and tensor.numel():
                        highest = max(highest, float(tensor.abs().max()))
    except (SafetensorError, OSError) as error:
        return f"the last checkpoint, {checkpoint.name}, cannot be read ({reason_of(error)}). {_GO_BACK}"
    if broken:
        return f"the last checkpoint, {checkpoint.name}, is not finite in {broken[:5]} itself. {_GO_BACK}"
    return (
        f"the weights of the last checkpoint, {checkpoint.name}, are finite, the largest is {highest:.3g}. If the run "
        "fails again, these weights are the cause: delete this checkpoint folder to continue from the one before, or "
        "begin a new run with a lower optim.lr"
    )


def keep_given_values(model: nn.Module) -> None:
    """Keep float32 copies of the frozen weights on rank 0 before DeepSpeed rounds them, to save the exact values."""
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
    """Restore moments, step count and float32 master weights of the wrapped model and optimizer."""
    base = list(_optimizer_chain(optimizer))[-1]
    is_averaged = any(name.startswith(f"{AVERAGE}.") for name in moments)
    for owned in _owned_by(base, optimizer):
        base.state[owned] = {"step": torch.tensor(float(state.step))}
        base.state[owned] |= {key: torch.zeros_like(owned) for key in state_keys(owned, is_averaged=is_averaged)}
    _link_sharded_states(optimizer)
    for name, parameter in accelerator.unwrap_model(model).named_parameters():
        if parameter.requires_grad:
            _set_master(parameter, parameters[name])
            for key in state_keys(parameter, is_averaged=is_averaged):
                _set_moment(parameter, key, moments[f"{key}.{name}"], base)


def average_weights(optimizer: Optimizer, *, decay: float, step: int) -> None:
    """Update the moving average of the weights after a step; `step`: finished steps before it."""
    base = list(_optimizer_chain(optimizer))[-1]
    update_average(_owned_by(base, optimizer), base.state, decay=decay, step=step)


def export(folder: Path, model: nn.Module, optimizer: Optimizer, accelerator: Accelerator, processor: Any) -> None:
    """Write a Hugging Face folder (weights as safetensors, config, tokenizer) atomically.

    The weights are the moving average if the run has one. Low-rank adapters are merged into the weights they adapt, and
    distillation layers are dropped.
    """
    state = _plain_weights(model, optimizer, accelerator)
    if dist.rank() == 0:
        plain = accelerator.unwrap_model(model)
        plain.config.averaged_weights = _is_averaged(optimizer)
        write_export(folder, plain, processor, {name: _host_copy(tensor) for name, tensor in state.items()})
    dist.barrier()


def write_export(folder: Path, model: Any, processor: Any, weights: dict[str, Tensor]) -> None:
    """Write a Hugging Face folder, replacing an older one. Raises: WriteError, which leaves the older one intact."""
    recover_folder(folder)
    working = folder.with_name(f"{WRITING}{folder.name}")
    try:
        with writing(folder):
            model.save_pretrained(working, state_dict=weights)
            processor.save_pretrained(working)
        replace_folder(working, folder)
    except WriteError:
        # A partial folder would keep occupying disk space.
        shutil.rmtree(working, ignore_errors=True)
        raise


def _plain_weights(model: nn.Module, optimizer: Optimizer, accelerator: Accelerator) -> dict[str, Tensor]:
    """Return the unsharded weights for inference; every rank must call it."""
    _link_sharded_states(optimizer)
    is_averaged = _is_averaged(optimizer)
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
    """Return a nested configuration with missing keys set to their defaults."""
    both = {key: default for key, default in defaults.items() if key not in config}
    for key, value in config.items():
        default = defaults.get(key)
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            value = with_defaults(value, default)
        both[key] = value
    return both


def differing_leaves(saved: Any, now: Any, path: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Yield (dotted key, (saved value, current value)) for every leaf in which two nested dicts differ."""
    if isinstance(saved, dict) and isinstance(now, dict):
        for key in sorted(saved.keys() | now.keys()):
            yield from differing_leaves(saved.get(key), now.get(key), f"{path}.{key}" if path else key)
    elif saved != now:
        yield path, (saved, now)


def plain_copy(model: nn.Module, optimizer: Optimizer, accelerator: Accelerator) -> Any:
    """Return the model itself, or an unsharded copy if ZeRO-3 shards it or it is averaged; every rank must call it.

    A sharded model gathers parameters at each module call, so ranks could not process different questions with it.
    """
    plain = accelerator.unwrap_model(model)
    is_sharded = any(hasattr(parameter, "ds_id") for parameter in plain.parameters())
    if not is_sharded and not _is_averaged(optimizer):
        return plain
    copy = type(plain)(plain.config).to(accelerator.device, plain.dtype)
    load_parameters(copy, _plain_weights(model, optimizer, accelerator))
    return copy


def _is_averaged(optimizer: Optimizer) -> bool:
    """Return whether the optimizer's state holds averages of the weights."""
    return any(AVERAGE in own for own in list(_optimizer_chain(optimizer))[-1].state.values())


def _owned_by(base: Optimizer, optimizer: Optimizer) -> list[Tensor]:
    """Return the tensors whose state torch's optimizer keeps.

    ZeRO-3 passes them one after another within a step, so the optimizer's groups are empty between steps.
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

    DeepSpeed 0.19 does this once, after stepping the first parameter group, when later groups have no state yet, and
    their moments would remain inaccessible. Repeating it is harmless.
    """
    for wrapper in _optimizer_chain(optimizer):
        if hasattr(wrapper, "_lazy_init_hp_params_optimizer_state"):
            wrapper._hp_optimizer_states_linked = False
            wrapper._lazy_init_hp_params_optimizer_state()


def _host_copy(tensor: Tensor) -> Tensor:
    """Return a float32 copy in host memory that training does not modify."""
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


def _whole_parameter(parameter: nn.Parameter) -> Tensor:
    """Return the float32 value of a parameter, gathered if DeepSpeed shards it."""
    if not parameter.requires_grad:
        return _whole_frozen(parameter)
    if _is_sharded(parameter):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)
    return parameter


def _whole_frozen(parameter: nn.Parameter) -> Tensor:
    """Return the kept float32 value of a frozen parameter, or its current value if none was kept."""
    value: Tensor = parameter
    if hasattr(parameter, "ds_id"):
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        with GatheredParameters([parameter]):
            value = parameter.detach().clone()
    return getattr(parameter, GIVEN, value)


def _whole_moment(parameter: nn.Parameter, key: str, optimizer: Optimizer) -> Tensor:
    """Return one moment of a parameter, gathered if DeepSpeed shards it."""
    if _is_sharded(parameter):
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(parameter, key)
    return list(_optimizer_chain(optimizer))[-1].state[parameter][key]


def _set_master(parameter: nn.Parameter, value: Tensor) -> None:
    """Set the float32 master value of a parameter that DeepSpeed shards; others were loaded before."""
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


def gather_data_state(
    before: Sequence[StreamState], own: dict[int, StreamState], packing_buffer: int, device: torch.device
) -> tuple[StreamState, ...]:
    """Return the positions of all streams after a step; each rank knows only its own."""
    # One row per stream: whether it moved, next, number of waiting samples, waiting samples. Only its owner fills it,
    # so the sum over ranks is the table. Streams of other rounds keep their position.
    mine = torch.zeros(len(before), 3 + packing_buffer, dtype=torch.int64)
    for stream, position in own.items():
        row = (1, position.next, len(position.waiting), *position.waiting)
        mine[stream, : len(row)] = torch.tensor(row)
    rows = dist.sum_over_ranks(mine.to(device)).tolist()
    return tuple(
        StreamState(next=row[1], waiting=tuple(row[3 : 3 + row[2]])) if row[0] else position
        for row, position in zip(rows, before, strict=True)
    )
