"""Conversion of a checkpoint on disk to a new folder, in both directions.

`tools/convert_checkpoint.py` calls one of these:

    to_ours("base/Qwen2.5-0.5B", "qwen2", Path("runs/qwen2_5_0_5b"), ...)    a folder that `model.init_from` takes
    to_release("exports/step_00090000", Path("released"), ...)               the release's names, one token per row
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from pixel_sail.conversion.layouts import Layout, find_layout, layout_reason, released_key, renamed
from pixel_sail.conversion.plan import ConversionPlan, Rows, plan_conversion
from pixel_sail.conversion.released_limits import check_released, released_remarks
from pixel_sail.conversion.report import write_conversion_report
from pixel_sail.conversion.sizes import Chosen, base_architecture, decoder_remarks, read_base_config
from pixel_sail.conversion.sources import TensorSource, open_source
from pixel_sail.conversion.vocabulary import (
    UNUSED_PROMPT,
    add_release_tokens,
    check_has_prompts,
    check_rows,
    count_prompts,
    read_tokenizer,
)
from pixel_sail.conversion.writer import write_folder
from pixel_sail.model.configuration_pixel_sail import Architecture, PixelSailConfig
from pixel_sail.model.convert import TOKEN_ROWS
from pixel_sail.model.folder import MODEL_CONFIG, check_no_code
from pixel_sail.model.image_embedding import PatchEmbedding
from pixel_sail.model.mask_head import MaskHead
from pixel_sail.model.modeling_pixel_sail import PixelSailForSegmentation
from pixel_sail.model.processing_pixel_sail import PixelSailProcessor
from pixel_sail.model.tokenization import add_special_tokens, model_token_ids
from pixel_sail.types import DataError

SHARD_BYTES = 5_000_000_000
EMBEDDING, HEAD = TOKEN_ROWS


@dataclass(frozen=True, kw_only=True)
class Done:
    """Result of a conversion."""

    plan: ConversionPlan
    remarks: tuple[str, ...]


def to_ours(
    path: Path, layout_name: str, folder: Path, *, base: Path, chosen: Chosen, shard_bytes: int = SHARD_BYTES
) -> Done:
    """Convert a checkpoint to a folder for `from_pretrained` and `model.init_from`.

    base: folder of the language model's config.json and tokenizer. Raises: DataError, leaving no folder.
    """
    layout = find_layout(layout_name)
    source, settings = open_source(path), read_base_config(base)
    names = {renamed(layout, key): info for key, info in source.infos.items()}
    ours = {name: info for name, info in names.items() if name is not None}
    if EMBEDDING not in ours:
        raise DataError(
            f"{path}: found no token embedding among {sorted(source.infos)[:5]} .. , expected the keys of layout "
            f"{layout_name}; check --from"
        )
    source_rows = ours[EMBEDDING].shape[0]
    architecture = base_architecture(settings, ours, chosen)
    tokenizer = read_tokenizer(base)
    if layout_name == "release":
        add_release_tokens(base, tokenizer, rows=source_rows, num_visual_prompts=chosen.num_visual_prompts)
        architecture.num_visual_prompts = count_prompts(tokenizer)
        if chosen.num_visual_prompts and any("vp_embed." in key for key in source.infos):
            check_has_prompts(base, tokenizer)
    check_rows(base, tokenizer, source_rows)
    source_tokens = dict(tokenizer.get_vocab())
    add_special_tokens(tokenizer, num_visual_prompts=architecture.num_visual_prompts)
    architecture.vocab_size = -(-len(tokenizer) // chosen.vocab_multiple) * chosen.vocab_multiple
    architecture.token_ids = model_token_ids(tokenizer, num_visual_prompts=architecture.num_visual_prompts)
    plan = plan_to_ours(
        source,
        layout,
        architecture,
        source_tokens=source_tokens,
        target_tokens=tokenizer.get_vocab(),
        seed=chosen.seed,
        init=chosen.init,
    )
    config = PixelSailConfig.from_architecture(architecture)
    notes = tuple(decoder_remarks(settings)) + _image_remarks(layout, architecture.attention)
    facts = {
        **{"layout": layout_name, "source": str(path), "base": str(base)},
        **{"seed": chosen.seed, "init": chosen.init, "remarks": notes},
    }
    finish = partial(_finish_ours, config=config, tokenizer=tokenizer, plan=plan, facts=facts)
    write_folder(folder, plan.writes, shard_bytes=shard_bytes, finish=finish)
    return Done(plan=plan, remarks=notes)


def plan_to_ours(
    source: TensorSource,
    layout: Layout,
    architecture: Architecture,
    *,
    source_tokens: Mapping[str, int],
    target_tokens: Mapping[str, int],
    seed: int,
    init: str = "ours",
) -> ConversionPlan:
    """Return the conversion plan to our layout, see `plan.make_plan`."""
    expected = expected_shapes(architecture)
    keys = {renamed(layout, key): key for key in source.infos}
    rows = Rows.by_name(
        source_tokens,
        target_tokens,
        source_rows=source.infos[keys[EMBEDDING]].shape[0],
        target_rows=architecture.vocab_size,
        deviation=architecture.initializer_range,
        seed=seed,
    )
    tied = None
    if architecture.tie_word_embeddings:
        del expected[HEAD]
        tied = (keys[EMBEDDING], keys.get(HEAD, ""))
    return plan_conversion(
        source,
        expected,
        rename=partial(renamed, layout),
        dropped=lambda key: _why_dropped(layout, key, architecture),
        absent=starting_values(layout, expected, architecture, seed=seed, init=init),
        rows=rows,
        row_names=TOKEN_ROWS,
        tied=tied,
    )


def to_release(path: Path, folder: Path, *, shard_bytes: int = SHARD_BYTES) -> Done:
    """Convert an exported folder of ours to the release's layout. Raises: DataError, leaving no folder."""
    source, tokenizer = open_source(path), read_tokenizer(path)
    check_no_code(path, MODEL_CONFIG)
    config = PixelSailConfig.from_pretrained(path)
    tokens = dict(tokenizer.get_vocab())
    if config.num_visual_prompts and UNUSED_PROMPT not in tokens:
        tokens[UNUSED_PROMPT] = len(tokens)  # the release appends it at startup
    plan = plan_to_release(source, config, source_tokens=tokenizer.get_vocab(), target_tokens=tokens)
    notes = released_remarks(config)
    facts: dict[str, Any] = {"layout": "to release", "source": str(path), "remarks": notes}
    write_folder(
        folder,
        plan.writes,
        shard_bytes=shard_bytes,
        finish=partial(_finish_release, tokenizer=tokenizer, plan=plan, facts=facts),
    )
    return Done(plan=plan, remarks=notes)


def plan_to_release(
    source: TensorSource,
    config: Architecture,
    *,
    source_tokens: Mapping[str, int],
    target_tokens: Mapping[str, int],
    target_rows: int | None = None,
) -> ConversionPlan:
    """Return the conversion plan to the release's layout.

    The release has one row per token, unless `target_rows` is given, and stores a tied head separately.
    """
    check_released(source.path, config)
    rename = partial(released_key, base=config.base)
    count = len(target_tokens) if target_rows is None else target_rows
    shapes = {
        name: (count, *shape[1:]) if name in TOKEN_ROWS else shape for name, shape in expected_shapes(config).items()
    }
    rows = Rows.by_name(
        source_tokens,
        target_tokens,
        source_rows=config.vocab_size,
        target_rows=count,
        deviation=0.0,
        seed=0,
    )
    again: dict[str, tuple[Callable[[], Tensor], str]] = {}
    if config.tie_word_embeddings and HEAD not in source.infos:
        note = "the token embedding once more, because the release writes a tied head twice"
        again[rename(HEAD)] = (lambda: rows.place(source.read(EMBEDDING)).clone(), note)
    return plan_conversion(
        source,
        {rename(name): shape for name, shape in shapes.items()},
        rename=rename,
        dropped=lambda key: None,
        absent=again,
        rows=rows,
        row_names=[rename(name) for name in TOKEN_ROWS],
        tied=None,
    )


def expected_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every parameter of a model without allocating it."""
    with torch.device("meta"):
        model = PixelSailForSegmentation(PixelSailConfig.from_architecture(architecture_of(architecture)))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def architecture_of(config: Architecture) -> Architecture:
    """Return the architecture of a configuration, without Hugging Face's fields."""
    return Architecture(**{name: getattr(config, name) for name in Architecture.__dataclass_fields__})


def starting_values(
    layout: Layout, expected: Mapping[str, tuple[int, ...]], architecture: Architecture, *, seed: int, init: str
) -> dict[str, tuple[Callable[[], Tensor], str]]:
    """Return for each parameter that the layout may lack a function that initializes it from `seed`, and a note."""
    allowed = {name: why for name in expected if (why := layout_reason(layout.initialised, name)) is not None}
    if not allowed:
        return {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        initialized = nn.ModuleDict(
            {"patch_embedding": PatchEmbedding(architecture), "mask_head": MaskHead(architecture)}
        )
        for linear in initialized["patch_embedding"].children():
            assert isinstance(linear, nn.Linear)
            nn.init.normal_(linear.weight, std=architecture.initializer_range)
        head = initialized["mask_head"]
        assert isinstance(head, MaskHead)
        head.init_weights(init)
    values = initialized.state_dict()
    return {name: (values[name].clone, f"initialised because {why}") for name, why in allowed.items()}


def _why_dropped(layout: Layout, key: str, architecture: Architecture) -> str | None:
    """Return why a key of the source is dropped, None if it is kept."""
    name = renamed(layout, key)
    if (
        name is not None
        and name.startswith("patch_embedding.prompt_projection.")
        and not architecture.num_visual_prompts
    ):
        return "the model has no visual prompts"
    return layout_reason(layout.dropped, key)


def _image_remarks(layout: Layout, attention: str) -> tuple[str, ...]:
    """Return how the converted model treats images differently from the base."""
    if layout.name != "solo":
        return ()
    return (
        "images: SOLO was trained with causal attention, 1-D positions and a <vrow_sep> token between rows; here "
        f"attention is {attention}, positions are 2-D and there are no separators: text is unchanged, images need "
        "training",
    )


def _finish_ours(
    working: Path,
    hashes: dict[str, str],
    *,
    config: PixelSailConfig,
    tokenizer: PreTrainedTokenizerBase,
    plan: ConversionPlan,
    facts: dict[str, Any],
) -> None:
    """Write configuration, tokenizer and report."""
    config.architectures = [PixelSailForSegmentation.__name__]
    config.dtype = next(write.info.dtype for write in plan.writes if write.name == EMBEDDING)
    config.save_pretrained(working)
    PixelSailProcessor.for_model(tokenizer, config).save_pretrained(working)
    write_conversion_report(working, plan, hashes, facts)


def _finish_release(
    working: Path,
    hashes: dict[str, str],
    *,
    tokenizer: PreTrainedTokenizerBase,
    plan: ConversionPlan,
    facts: dict[str, Any],
) -> None:
    """Write tokenizer and report."""
    tokenizer.save_pretrained(str(working))
    write_conversion_report(working, plan, hashes, facts)
