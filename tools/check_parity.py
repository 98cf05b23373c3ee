"""Compare the model with recorded outputs of the released model, for single examples and for one packed sequence.

    python tools/check_parity.py DIR [DIR ...] [--named-weights] [--tolerance 1e-4]

A folder contains `config.json` (sizes and special tokens; `image_placeholder` marks an EVE-type model),
`reference_state.safetensors` (weights with the release's names) and `cases.safetensors` (tensors `<example>.<name>`).
Without the weights file, or with --named-weights, every tensor of `shapes.json` is sampled from a generator seeded with
its name. Prints the largest absolute error per recorded tensor. Exit status 1 if one exceeds the tolerance or a
greedily decoded token differs, 2 if a folder cannot be checked.
"""

import argparse
import json
import logging
import math
import sys
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from pixel_sail.losses.distill import distill_loss
from pixel_sail.losses.mask import full_map_losses
from pixel_sail.model.configuration_pixel_sail import Architecture, PixelSailConfig
from pixel_sail.model.convert import convert_release_state
from pixel_sail.model.distill_head import DistillSite, linear_name
from pixel_sail.model.generation import encode_images, generate
from pixel_sail.model.image_layout import image_span
from pixel_sail.model.modeling_pixel_sail import PixelSailForSegmentation, PixelSailOutput
from pixel_sail.model.tokenization import IMAGE_TOKENS
from pixel_sail.types import IGNORE_LABEL

BCE_WEIGHT, DICE_WEIGHT, COUNT_EPSILON = 2.0, 0.5, 1e-4
"""Loss weights of the release, and the constant it adds to the number of masks."""

DISTILL_WEIGHT, DISTILL_TOLERANCE = 0.5, 1e-5
"""Weight of the recorded distillation losses, and their tolerance, independent of --tolerance."""

DISTILL_SITES = {"mask2former": "pixel_map", "sam2": "patch_states", "radio": "patch_states"}

Case = dict[str, Tensor]


@dataclass(kw_only=True)
class Report:
    """Largest absolute error per tensor name, over all examples of a folder."""

    errors: dict[str, float] = field(default_factory=dict)
    greedy_mismatches: list[str] = field(default_factory=list)

    def compare(self, name: str, found: Tensor, expected: Tensor) -> None:
        """Record the error of one tensor; a different shape counts as infinite."""
        same_shape = found.shape == expected.shape
        error = (found.double() - expected.double()).abs().max().item() if same_shape else math.inf
        # NaN compares false with everything, so it must not slip through `max`.
        self.errors[name] = max(self.errors.get(name, 0.0), math.inf if math.isnan(error) else error)


def named_weights(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Return tensors that depend only on their names, scaled to keep activations of order one."""
    state = {}
    for name, shape in shapes.items():
        values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, dtype="float32")
        if len(shape) == 1:
            values = values * np.float32(0.1) + np.float32(1.0 if "norm" in name or ".ln.weight" in name else 0.0)
        else:
            values = values * np.float32(0.6 / math.sqrt(math.prod(shape[1:])))
        state[name] = torch.from_numpy(values)
    return state


def load_reference(folder: Path, use_named_weights: bool) -> PixelSailForSegmentation:
    """Return our model with the folder's sizes and weights, in evaluation mode."""
    config = json.loads((folder / "config.json").read_text())
    is_eve = "image_placeholder" in config
    if "upsample_blocks" not in config or not (is_eve or "mrope_section" in config):
        raise ValueError(
            f"{folder}/config.json: neither a SAIL-type case (mrope_section) nor an EVE-type one (image_placeholder); "
            f"keys {sorted(config)}"
        )
    tokens = config["special_tokens"]
    stride = config["patch_size"] / 2 ** config["upsample_blocks"]
    eve_fields: dict[str, Any] = {}
    if is_eve:
        parts = [part for part in config["experts"].split("-") if part]
        eve_fields = {"base": "eve", "attention": "causal", "modality_experts": parts}
        eve_fields["patch_hidden_size"] = config["patch_hidden_size"]
    model_config = PixelSailConfig.from_architecture(
        Architecture(
            **{name: config[name] for name in RECORDED_SIZES},
            **eve_fields,
            mask_stride=max(1, math.ceil(stride)),
            num_visual_prompts=config["num_visual_prompts"],
            token_ids=tokens,
        )
    )
    quarter = model_config.head_dim // 4
    if not is_eve and config["mrope_section"] != [0, quarter, quarter]:
        raise ValueError(
            f"{folder}/config.json: mrope_section {config['mrope_section']}, expected {[0, quarter, quarter]}"
        )
    model = PixelSailForSegmentation(model_config)
    weights = folder / "reference_state.safetensors"
    if use_named_weights or not weights.is_file():
        shapes = json.loads((folder / "shapes.json").read_text())
        if config["tie_word_embeddings"]:
            shapes.pop("single_transformer.lm_head.weight", None)
        released = named_weights(shapes)
    else:
        released = load_file(weights)
    model.load_state_dict(convert_release_state(released, model, source_tokens=tokens, target_tokens=tokens))
    return model.eval()


RECORDED_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "patch_size",
    "mask_dim",
    "tie_word_embeddings",
    "rope_theta",
    "rms_norm_eps",
)


def load_cases(folder: Path) -> list[Case]:
    """Return the examples of a folder in order, each a dict of tensor name to tensor."""
    cases: dict[str, Case] = {}
    for key, tensor in load_file(folder / "cases.safetensors").items():
        case, name = key.split(".", 1)
        cases.setdefault(case, {})[name] = tensor
    ordered = [cases[key] for key in sorted(cases, key=int)]
    config = json.loads((folder / "config.json").read_text())
    if "image_placeholder" not in config:
        return ordered
    image_ids = [config["special_tokens"][token] for token in IMAGE_TOKENS]
    return [expanded(case, config["image_placeholder"], image_ids, config["patch_size"]) for case in ordered]


def expanded(case: Case, placeholder: int, image_ids: list[int], patch_size: int) -> Case:
    """Return an EVE-type example with the inputs of a SAIL-type one: the image as tokens and patches."""
    ids, labels = case["input_ids"][0], case["labels"][0]
    lead = int((ids == placeholder).nonzero()[0])
    rows, columns = case["grid"].tolist()
    span = image_span("eve", (rows, columns), image_ids, ids[:lead].tolist())
    num_text = len(ids) - lead - 1
    length = len(span.token_ids_S) + num_text
    prompts = F.pad(case["visual_prompt_indexes"], (lead, num_text), value=-1)
    tiles = case["pixel_values"].unflatten(2, (columns, patch_size)).unflatten(1, (rows, patch_size))
    return case | {
        "input_ids": torch.cat((span.token_ids_S, ids[lead + 1 :]))[None],
        "labels": F.pad(labels[lead + 1 :], (len(span.token_ids_S), 0), value=IGNORE_LABEL)[None],
        "vision_patches": tiles.permute(1, 3, 0, 2, 4).flatten(0, 1),
        "vision_patch_indices": F.pad(span.patch_index_S, (0, num_text), value=-1)[None],
        "vp_token_indices": prompts[None],
        "position_ids": torch.arange(length).expand(3, 1, -1),
    }


def pack_inputs(cases: list[Case], config: PixelSailConfig) -> dict[str, Any]:
    """Return the forward arguments of one packed sequence of all examples."""
    parts: dict[str, list[Tensor]] = {name: [] for name in PACKED_NAMES}
    patch_offset, patches, grids, masks_per_image = 0, [], [], []
    for index, case in enumerate(cases):
        ids, patch_index = case["input_ids"][0], case["vision_patch_indices"][0]
        span = torch.arange(len(ids))
        start, end = (int((ids == config.token_id(t)).nonzero()[place]) for t, place in IMAGE_ENDS)
        parts["input_ids_BT"].append(ids)
        parts["position_ids_2BT"].append(case["position_ids"][1:, 0])
        parts["sample_index_BT"].append(torch.full_like(ids, index))
        parts["branch_ids_BT"].append((span > end).long())
        # To causal attention, an image is the same as text.
        parts["in_image_BT"].append((span >= start) & (span <= end) & (config.attention == "prefix"))
        parts["patch_index_BT"].append(torch.where(patch_index >= 0, patch_index + patch_offset, -1))
        parts["prompt_ids_BT"].append(case["vp_token_indices"][0].clamp_min(-1))
        patches.append(case["vision_patches"].flatten(1))
        patch_offset += len(case["vision_patches"])
        grids.append(tuple(case["grid"].tolist()))
        masks_per_image.append(int((ids == config.token_id("[SEG]")).sum()))
    inputs: dict[str, Any] = {name: torch.cat(values, dim=-1)[None] for name, values in parts.items()}
    inputs["position_ids_2BT"] = torch.cat(parts["position_ids_2BT"], dim=-1)[:, None]
    inputs["patches_SK"] = torch.cat(patches)
    seg_positions = (inputs["input_ids_BT"] == config.token_id("[SEG]")).nonzero()
    return inputs | {"grids": grids, "masks_per_image": masks_per_image, "seg_positions_N2": seg_positions}


IMAGE_ENDS = (("<vision>", 0), ("</vision>", -1))
"""First and last token of an image, and its index in the sequence."""

PACKED_NAMES = (
    "input_ids_BT",
    "position_ids_2BT",
    "sample_index_BT",
    "branch_ids_BT",
    "in_image_BT",
    "patch_index_BT",
    "prompt_ids_BT",
)


def compare_forward(report: Report, cases: list[Case], model: PixelSailForSegmentation) -> None:
    """Run the examples as one sequence and compare every recorded tensor of every example."""
    inputs = pack_inputs(cases, model.config)
    with torch.no_grad():
        output = model(**inputs)
        # The model skips the mask head for images without masks; the recording contains their features, too.
        every_image = [max(count, 1) for count in inputs["masks_per_image"]]
        no_states = output.hidden_BTD[0, :0]
        _, features, _, _ = model.embed_masks(
            output.hidden_BTD, inputs["patch_index_BT"], inputs["grids"], every_image, no_states
        )
    start = 0
    for index, case in enumerate(cases):
        stop = start + case["input_ids"].shape[1]
        compare_text(report, case, output, slice(start, stop))
        (rows, columns), is_patch = inputs["grids"][index], case["vision_patch_indices"][0] >= 0
        hidden = output.hidden_BTD[0, start:stop]
        report.compare("feature_low", hidden[is_patch].view(rows, columns, -1), case["feature_low"])
        feature = features[index]
        assert feature is not None
        report.compare("feature_high", feature, case["feature_high"])
        if "mask_logits" in case:
            compare_masks(report, case, output, index, inputs["masks_per_image"])
        compare_distill(report, case, index, model, inputs)
        start = stop


def compare_distill(
    report: Report, case: Case, image: int, model: PixelSailForSegmentation, inputs: dict[str, Any]
) -> None:
    """Compare the recorded distillation losses of one example, using its linear layers in the model."""
    names = [name for name in DISTILL_SITES if f"distill.{name}.loss" in case]
    if not names:
        return
    sites = {name: DistillSite(site=DISTILL_SITES[name], channels=len(case[f"distill.{name}.bias"])) for name in names}
    model.add_distill_head(sites, seed=0)
    assert model.distill_head is not None
    for name in names:
        state = {part: case[f"distill.{name}.{part}"] for part in ("weight", "bias")}
        model.distill_head[linear_name(name)].load_state_dict(state)
    with torch.no_grad():
        predicted = model(**inputs, distilled_images={name: [image] for name in names}).distilled
    model.distill_head = None
    for name in names:
        loss = DISTILL_WEIGHT * distill_loss(predicted[name][0], case[f"distill.{name}.teacher"][0])
        report.compare(f"distill.{name}", loss, case[f"distill.{name}.loss"])


def compare_text(report: Report, case: Case, output: PixelSailOutput, span: slice) -> None:
    """Compare states, logits and the text loss of one example."""
    assert output.hidden_BTD is not None and output.logits is not None
    logits, labels = output.logits[0, span], case["labels"][0]
    report.compare("hidden_last", output.hidden_BTD[0, span], case["hidden_last"])
    report.compare("logits", logits, case["logits"])
    report.compare("llm_loss", F.cross_entropy(logits[:-1].float(), labels[1:]), case["llm_loss"])


def compare_masks(report: Report, case: Case, output: PixelSailOutput, index: int, masks_per_image: list[int]) -> None:
    """Compare queries, mask logits and full-map mask losses of one example."""
    assert output.seg_queries_ND is not None
    assert output.mask_logits is not None
    logits = output.mask_logits[index]
    assert isinstance(logits, Tensor)
    report.compare("seg_query", output.seg_queries_ND.split(masks_per_image)[index], case["seg_query"])
    report.compare("mask_logits", logits, case["mask_logits"])
    sums = full_map_losses(logits, case["gt_masks"])
    share = 1.0 / (sums.count + COUNT_EPSILON)
    report.compare("total_loss_mask", BCE_WEIGHT * sums.bce * share, case["total_loss_mask"])
    report.compare("total_loss_dice", DICE_WEIGHT * sums.dice * share, case["total_loss_dice"])


def compare_greedy(report: Report, cases: list[Case], model: PixelSailForSegmentation) -> None:
    """Decode after the prompt of each example with the image cached, and compare the tokens."""
    for index, case in enumerate(cases):
        ids = case["input_ids"][0]
        if "greedy_ids" not in case:
            continue
        end = int((ids == model.config.token_id("</vision>")).nonzero()[-1]) + 1
        prefix = encode_images(
            model,
            case["vision_patches"].flatten(1)[None],
            tuple(case["grid"].tolist()),
            case["position_ids"][1:, 0, :end],
            case["vp_token_indices"][:1, :end].clamp_min(-1),
        )
        question = ids[end : int(case["prompt_len"])].tolist()
        expected = case["greedy_ids"].tolist()
        ((answer,),) = generate(model, prefix, [[question]], max_new_tokens=len(expected), end_ids=())
        if answer.token_ids != expected:
            report.greedy_mismatches.append(f"case {index}: found {answer.token_ids}, expected {expected}")


def print_report(title: str, report: Report, tolerance: float) -> bool:
    """Print one table; return whether all errors are within the tolerance."""
    print(title)
    passed = True
    for name, error in report.errors.items():
        allowed = min(tolerance, DISTILL_TOLERANCE) if name.startswith("distill.") else tolerance
        passed &= error <= allowed
        print(f"  {name:16s} {error:.3e}{'' if error <= allowed else '   ABOVE ' + format(allowed, '.0e')}")
    return passed


def check_folder(folder: Path, *, use_named_weights: bool, tolerance: float) -> bool:
    """Check one folder and print its tables; return whether it passed."""
    model, cases = load_reference(folder, use_named_weights), load_cases(folder)
    alone, packed = Report(), Report()
    for case in cases:
        compare_forward(alone, [case], model)
    compare_forward(packed, cases, model)
    compare_greedy(alone, cases, model)
    passed = print_report(f"{folder}: {len(cases)} cases, each alone", alone, tolerance)
    if any("greedy_ids" in case for case in cases):
        print(f"  {'greedy_ids':16s} {'agree' if not alone.greedy_mismatches else 'DIFFER'}")
    for line in alone.greedy_mismatches:
        print(f"    {line}")
    passed &= print_report(f"{folder}: {len(cases)} cases packed into one sequence", packed, tolerance)
    return passed and not alone.greedy_mismatches


def main(arguments: Iterable[str] | None = None) -> int:
    """Check every folder named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    parser.add_argument(
        "--named-weights", action="store_true", help="sample weights by name even if a weights file exists"
    )
    parser.add_argument("--tolerance", type=float, default=1e-4)
    options = parser.parse_args(None if arguments is None else list(arguments))
    logging.basicConfig(level=logging.WARNING)
    passed = True
    for folder in options.folders:
        try:
            passed &= check_folder(folder, use_named_weights=options.named_weights, tolerance=options.tolerance)
        except (ValueError, OSError, KeyError, SafetensorError) as error:
            print(f"{folder}: cannot be checked: {error}", file=sys.stderr)
            return 2
    print("parity holds" if passed else "parity FAILS")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
