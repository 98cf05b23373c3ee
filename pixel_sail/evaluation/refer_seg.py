"""Referring segmentation: ask every expression once, over any number of processes, and score what was answered.

Place in the flow: `scripts/evaluate.py` and validation call `evaluate`. Images are dealt to ranks in turn; each rank
writes its predictions as they come into a file of its own, there is no communication before the end, and a run that
was killed goes on with the expressions that no file holds yet.

    <output>/protocol.json                what asked the questions: checkpoint hash, settings, eval
    <output>/part-0.jsonl part-1.jsonl    predictions of each rank, one line per expression
    <output>/predictions.jsonl            all of them in the order of the annotations, written at the end

An eval in a config is `{_target_: pixel_sail.evaluation.refer_seg.load, root: ..., dataset: refcoco, split: val}`.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pixel_sail import dist
from pixel_sail.config import ConfigError, PredictConfig
from pixel_sail.data.images import load_image
from pixel_sail.data.sources import hidden
from pixel_sail.data.sources.refer import expressions, load_refer
from pixel_sail.data.wording.referring import PAPER_REFER_PROMPT, SHORT_REFER_PROMPT, STANDARD_REFER_PROMPT
from pixel_sail.evaluation.predict import Predictor
from pixel_sail.evaluation.predictions import PredictionWriter, read_predictions, score_predictions
from pixel_sail.metrics.iou import IoUSums
from pixel_sail.rle import encode_mask
from pixel_sail.types import Expression, Prediction

PROMPTS = {"standard": STANDARD_REFER_PROMPT, "paper": PAPER_REFER_PROMPT, "short": SHORT_REFER_PROMPT}

ImageGroup = list[Expression]
"""All expressions about one image."""


def load(
    *,
    root: str | Path,
    dataset: str | Sequence[str],
    split: str,
    split_by: str | None = None,
    image_dir: str | Path | None = None,
    text_field: str = "sent",
    hide: str = "none",
) -> list[Expression]:
    """Return the expressions of one split: the `_target_` of an eval; `hide` takes text or image away from the
    model."""
    annotations = load_refer(root, dataset, split, split_by=split_by, image_dir=image_dir)
    return expressions(hidden.hide(annotations, hide), text_field=text_field)


def by_image(items: Sequence[Expression]) -> list[ImageGroup]:
    """Return the expressions grouped by image, in order."""
    ordered = sorted(items, key=lambda e: (e.image_id, e.ref_id, e.sent_id))
    return [list(group) for _, group in groupby(ordered, key=lambda e: e.image_id)]


def first_images(items: Sequence[Expression], max_images: int) -> list[Expression]:
    """Return the expressions of the first `max_images` images, of all where it is 0."""
    groups = by_image(items)
    return [item for group in groups[: max_images or None] for item in group]


def predict_image(predictor: Predictor, group: ImageGroup) -> Iterator[Prediction]:
    """Answer all expressions about one image."""
    image = load_image(group[0].image_path, where=f"image {group[0].image_id}", expected_hw=group[0].image_hw)
    prompt = PROMPTS[predictor.config.prompt]
    replies = predictor.ask(image, [prompt.format(sent=expression.text) for expression in group])
    for expression, reply in zip(group, replies, strict=True):
        mask = reply.merged(predictor.config.mask)
        yield Prediction(
            ref_id=expression.ref_id,
            sent_id=expression.sent_id,
            image_id=expression.image_id,
            text=expression.text,
            segmentation=None if mask is None else encode_mask(mask),
            answer=reply.text,
        )


def score_in_memory(predictor: Predictor, items: Sequence[Expression]) -> tuple[IoUSums, list[Prediction]]:
    """Return the scores over all ranks and this rank's predictions, without files: validation during training."""
    groups = by_image(items)[dist.rank() :: dist.world_size()]
    predictions = [prediction for group in groups for prediction in predict_image(predictor, group)]
    sums = score_predictions([item for group in groups for item in group], predictions) if groups else IoUSums()
    return sum_over_ranks(sums), predictions


def evaluate(
    predictor: Predictor, items: Sequence[Expression], output: Path, *, protocol: dict[str, Any], progress: bool = True
) -> IoUSums:
    """Answer and score every expression exactly once, continuing what `output` already holds; the sums on every rank.

    Raises: ConfigError when `output` was made with another protocol; RuntimeError when an expression stayed unanswered.
    """
    _claim(output, protocol)
    done = {(p.ref_id, p.sent_id) for part in sorted(output.glob("part-*.jsonl")) for p in read_predictions(part)}
    # Every rank has read what is done before any rank adds to it, so that all deal out the same remainder.
    dist.barrier()
    remaining = by_image([item for item in items if (item.ref_id, item.sent_id) not in done])
    own = remaining[dist.rank() :: dist.world_size()]
    with PredictionWriter(output / f"part-{dist.rank()}.jsonl") as writer:
        for group in _progress(own, output.name, progress):
            for prediction in predict_image(predictor, group):
                writer.write(prediction)
    dist.barrier()
    merged = [p for part in sorted(output.glob("part-*.jsonl")) for p in read_predictions(part)]
    answered = {(p.ref_id, p.sent_id): p for p in merged}
    unanswered = [item for item in items if (item.ref_id, item.sent_id) not in answered]
    if unanswered or len(merged) != len(items):
        raise RuntimeError(
            f"{output}: {len(merged)} predictions for {len(items)} expressions, {len(unanswered)} unanswered; "
            "remove the folder and run again"
        )
    ordered = [answered[(item.ref_id, item.sent_id)] for item in items]
    if dist.rank() == 0:
        _write_merged(output / "predictions.jsonl", ordered)
    dist.barrier()
    return score_predictions(items, ordered)


def sum_over_ranks(sums: IoUSums) -> IoUSums:
    """Return the sums of all ranks."""
    integers = torch.tensor(sums.integers(), dtype=torch.int64, device=dist.local_device())
    ratios = torch.tensor([sums.iou_sum], dtype=torch.float64, device=dist.local_device())
    return IoUSums.from_integers(dist.sum_over_ranks(integers).tolist(), iou_sum=float(dist.sum_over_ranks(ratios)[0]))


def protocol_of(predictor: PredictConfig, *, checkpoint: str, weights_sha256: str, eval_node: Any) -> dict[str, Any]:
    """Return what a prediction file depends on."""
    return {
        "checkpoint": checkpoint,
        "weights_sha256": weights_sha256,
        "predict": vars(predictor) | {"batch_size": None},
        "eval": eval_node,
    }


def _claim(output: Path, protocol: dict[str, Any]) -> None:
    """Create the folder, or check that what it holds was made with the same protocol."""
    file = output / "protocol.json"
    text = json.dumps(protocol, indent=1, sort_keys=True) + "\n"
    if dist.rank() == 0:
        output.mkdir(parents=True, exist_ok=True)
        if file.is_file() and file.read_text() != text:
            raise ConfigError(
                f"{file}: found predictions of another protocol (checkpoint, settings or eval changed); "
                "expected the same one. Choose another output folder, or remove this one"
            )
        file.write_text(text)
    dist.barrier()


def _progress(groups: Iterable[ImageGroup], name: str, shown: bool) -> Iterator[ImageGroup]:
    """Yield the groups, with a progress bar on rank 0."""
    return iter(tqdm(groups, desc=name, unit="image", disable=not shown or dist.rank() != 0))


def _write_merged(path: Path, predictions: Sequence[Prediction]) -> None:
    """Write all predictions into one file, complete or not at all."""
    working = path.with_name(f".{path.name}")
    working.unlink(missing_ok=True)
    with PredictionWriter(working) as writer:
        for prediction in predictions:
            writer.write(prediction)
    os.replace(working, path)
