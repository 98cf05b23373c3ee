"""Maps names in public files of earlier versions to the current ones.

An old name on a command line or in a YAML file is an error that gives the new one. In files of earlier versions
(config.json, state.json, log.jsonl) old names are translated on reading:

    renamed_override("data.packs_per_step=32")             ->  "data.global_batch_size=32"
    current_config({"data": {"packs_per_step": 32}})       ->  {"data": {"global_batch_size": 32}}
    current_log_line({"step": 10, "total": 1.2})           ->  {"step": 10, "loss/total": 1.2}

`*` in a key matches one name, which is inserted at the `*` of the new key.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

CONFIG_KEYS: dict[str, str] = {
    "data.packs_per_step": "data.global_batch_size",
    "data.packs_per_micro_batch": "data.micro_batch_size",
    "data.lane_rounds": "data.stream_rounds",
    "data.packing.token_budget": "data.packing.seq_len",
    "data.packing.lookahead": "data.packing.packing_buffer",
    "data.max_skipped_share": "data.max_skipped_fraction",
    "data.leakage": "data.decontamination",
    "data.sources.*.wording": "data.sources.*.templates",
    "data.sources.*.draws": "data.sources.*.expression_sampling",
    "data.sources.*.hide": "data.sources.*.blind_baseline",
    "data.sources.*.absent_share": "data.sources.*.absent_fraction",
    "data.sources.*.others_share": "data.sources.*.others_fraction",
    "data.sources.*.prompt_shares": "data.sources.*.prompt_fractions",
    "evals.*.hide": "evals.*.blind_baseline",
    "experts.drawn_states.share": "distillation.attribute_states.fraction",
    "experts.drawn_pixels.share": "distillation.attribute_pixels.fraction",
    "experts.*.share": "distillation.*.fraction",
    "experts.drawn_states": "distillation.attribute_states",
    "experts.drawn_pixels": "distillation.attribute_pixels",
    "experts": "distillation",
    "allow_random_experts": "allow_random_teachers",
    "speed.elementwise": "kernels.recompute_elementwise",
    "speed": "kernels",
    "predict.token_budget": "predict.max_batch_tokens",
    "checkpoint.rewinds": "checkpoint.max_rollbacks",
    "corridor": "metric_bounds",
}
"""Old key of a configuration -> new key. A group is moved with all its settings."""
CONFIG_GROUPS: dict[str, str] = {"experts": "distillation", "leakage": "decontamination"}
"""Old name of a config group (`group=choice`) -> new name."""
CONFIG_CHOICES: dict[tuple[str, str], str] = {
    ("experts", "drawn"): "attributes",
    ("evals", "refshapes_val_text_hidden"): "refshapes_val_language_blind",
    ("evals", "refshapes_val_image_hidden"): "refshapes_val_image_blind",
}
"""(old group, old choice) -> new choice."""
TARGETS: dict[str, str] = {
    "pixel_sail.experts.drawn.": "pixel_sail.distillation.attributes.",
    "pixel_sail.experts.": "pixel_sail.distillation.",
}
"""Prefix of an old `_target_` -> prefix of the new one."""
LOG_KEYS: dict[str, str] = {
    **{name: f"loss/{name}" for name in ("total", "text", "bce", "dice")},
    **{name: f"data/{name}" for name in ("tokens", "supervised_tokens", "masks", "samples", "epoch", "skipped")},
    **{name: f"perf/{name}" for name in ("tokens_per_s", "samples_per_s", "mfu", "memory_gb")},
    "padding_frac": "data/padding_fraction",
    "lr": "optim/lr",
    "lr/*": "optim/lr/*",
    "grad_norm": "optim/grad_norm",
    "step_s": "time/step_s",
    "data_wait_s": "time/data_s",
    "distill/drawn_states_images": "data/distill/attribute_states_images",
    "distill/drawn_pixels_images": "data/distill/attribute_pixels_images",
    "distill/drawn_states": "loss/distill/attribute_states",
    "distill/drawn_pixels": "loss/distill/attribute_pixels",
    "*/distill/drawn_states": "*/distill/attribute_states",
    "*/distill/drawn_pixels": "*/distill/attribute_pixels",
    "distill/*_images": "data/distill/*_images",
    "distill/*": "loss/distill/*",
    "corridor": "metric_bounds",
}
"""Old key of a line of log.jsonl -> new key. The first match counts."""
CONFIG_VALUES: dict[str, dict[Any, Any]] = {
    "kernels.recompute_elementwise": {"recomputed": True, "plain": False},
    "data.sources.*.blind_baseline": {"text": "language"},
    "evals.*.blind_baseline": {"text": "language"},
    "metric_bounds.*.metric": {old: new for old, new in LOG_KEYS.items() if "*" not in old},
}
"""New key -> old value -> new value."""
STATE_KEYS: dict[str, str] = {"lanes": "streams"}
"""Old field of a checkpoint's train_state and of rollback records -> new field."""

_FULL_KEY = re.compile(r"full_key: (\S+)")
_QUOTED = re.compile(r"['\"`]/?([\w@./]+)['\"`]")


def current_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration of an earlier version (nested, plain values) with current keys and values.

    If a key exists under both names, the value of the new one is kept.
    """
    result = _copied(config)
    for old in sorted(CONFIG_KEYS, key=lambda key: -key.count(".")):
        for names in list(_matches(result, old.split("."))):
            _put(result, _filled(CONFIG_KEYS[old], old, names), _taken(result, names))
    for key, values in CONFIG_VALUES.items():
        for *parents, name in list(_matches(result, key.split("."))):
            holder = _at(result, parents)
            if isinstance(holder[name], str | int | float | bool) and holder[name] in values:
                holder[name] = values[holder[name]]
    return result


def current_log_line(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line of log.jsonl with current keys. If a key exists under both names, the new one's value is kept."""
    moved = {_renamed(key, LOG_KEYS) or key: value for key, value in line.items()}
    return moved | {key: value for key, value in line.items() if key in moved}


def current_state(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of a run from a checkpoint or a rollback record, with current fields."""
    return {STATE_KEYS.get(name, name): value for name, value in fields.items()}


def with_old_log_keys(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line of log.jsonl with its numbers also under the keys of earlier versions."""
    names = {new: old for old, new in LOG_KEYS.items()}
    return {**line, **{old: value for key, value in line.items() if (old := _renamed(key, names))}}


def renamed_log_key(key: str) -> str | None:
    """Return the current name of an old key of log.jsonl, None for any other key."""
    return _renamed(key, LOG_KEYS)


def renamed_key(key: str) -> str | None:
    """Return today's name of an old configuration key or group, or of one below it; None for any other."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        if new := _renamed(".".join(parts[:length]), CONFIG_KEYS):
            return ".".join([new, *parts[length:]])
    return None


def renamed_target(name: str) -> str | None:
    """Return today's name of an old `_target_`, None for any other."""
    return next((new + name.removeprefix(old) for old, new in TARGETS.items() if name.startswith(old)), None)


def renamed_override(override: str) -> str | None:
    """Return how an override with an old name is written today, None for an override without one."""
    key, separator, value = override.partition("=")
    sign = key[: len(key) - len(key.lstrip("+~"))]
    group, at, place = key.lstrip("+~").partition("@")
    if group in CONFIG_GROUPS and (at or "." not in group) and not value.startswith("{"):
        new = CONFIG_GROUPS[group] + (f"@{renamed_key(place) or place}" if at else "")
        return f"{sign}{new}{separator}{CONFIG_CHOICES.get((group, value), value)}"
    if at:
        return None
    new_key = renamed_key(group) or group
    values = next((own for star, own in CONFIG_VALUES.items() if _stands_for(star, new_key)), {})
    new_value = _written(values[value]) if value in values else value
    if new_key.rpartition(".")[2] == "_target_":
        new_value = renamed_target(value) or value
    return None if (new_key, new_value) == (group, value) else f"{sign}{new_key}{separator}{new_value}"


def hint(message: str, where: str = "") -> str:
    """Return what to add to Hydra's message about a file with an old key or group: "; x was renamed to y", or "".

    `where`: the key below which the names of the message are.
    """
    for name in [*_FULL_KEY.findall(message), *_QUOTED.findall(message)]:
        group, at, place = name.partition("@")
        new = CONFIG_GROUPS.get(group) if "." not in group else None
        new = CONFIG_CHOICES.get((group.rpartition("/")[0], group.rpartition("/")[2]), new)
        if new and at:
            new += f"@{renamed_key(place) or place}"
        if new := new or renamed_key(f"{where}.{name}" if where else name):
            return f"; {name} was renamed to {new}"
    return ""


def _written(value: Any) -> str:
    """Return a value in command-line syntax."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _renamed(key: str, table: Mapping[str, str]) -> str | None:
    """Return the new name of a key, None if the table has none."""
    if key in table:
        return table[key]
    for old, new in table.items():
        if "*" in old and (found := _stands_for(old, key)):
            return new.replace("*", found[1])
    return None


def _stands_for(star: str, key: str) -> re.Match[str] | None:
    """Match a key with one with `*`: text without a dot in a configuration key, without a slash in a log."""
    return re.fullmatch(re.escape(star).replace(r"\*", "([^/]+)" if "/" in star else "([^.]+)"), key)


def _matches(node: Any, parts: list[str], before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the paths below a node that match a key with `*`."""
    if not parts:
        yield before
    elif isinstance(node, dict):
        for name in list(node) if parts[0] == "*" else [parts[0]]:
            if name in node:
                yield from _matches(node[name], parts[1:], (*before, name))


def _filled(new: str, old: str, names: tuple[str, ...]) -> list[str]:
    """Return the names of a new key, with `*` replaced by the match in the old one."""
    stars = iter([name for part, name in zip(old.split("."), names, strict=True) if part == "*"])
    return [next(stars) if part == "*" else part for part in new.split(".")]


def _at(node: dict[str, Any], names: list[str]) -> dict[str, Any]:
    for name in names:
        node = node[name]
    return node


def _taken(node: dict[str, Any], names: tuple[str, ...]) -> Any:
    """Remove and return the value at a path."""
    return _at(node, list(names[:-1])).pop(names[-1])


def _put(node: dict[str, Any], names: list[str], value: Any) -> None:
    """Set the value at a path; existing values are kept, dictionaries are merged."""
    for name in names[:-1]:
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            return
    there = node.get(names[-1])
    if isinstance(there, dict) and isinstance(value, dict):
        for name, own in value.items():
            _put(there, [name], own)
    elif names[-1] not in node:
        node[names[-1]] = value


def _copied(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of nested dictionaries and lists with current `_target_`s. No recursion: files may nest deeply."""
    result: dict[str, Any] = {}
    waiting: list[tuple[Any, Any]] = [(config, result)]
    while waiting:
        node, copy = waiting.pop()
        for key, value in node.items() if isinstance(node, Mapping) else enumerate(node):
            if key == "_target_":
                own = renamed_target(str(value)) or value
            elif isinstance(value, Mapping | list | tuple):
                own = {} if isinstance(value, Mapping) else []
                waiting.append((value, own))
            else:
                own = value
            if isinstance(node, Mapping):
                copy[key] = own
            else:
                copy.append(own)
    return result
