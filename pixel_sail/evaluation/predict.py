"""The only inference path: questions about one image in, text and masks at image size out.

Place in the flow: `evaluation/engine.py`, `scripts/predict.py` and validation during training call `Predictor.ask`.
The image is encoded once, all questions about it run as one batch over its cache, pixel features are made once and
only when an answer holds a [SEG]. Visual prompts change the image's own states, so that questions about other regions
need another prefix: `ask_overlays` encodes them one after another and answers them as one batch.

    predictor.ask(image, ["Please segment the cat."])[0]
        -> Reply(text="It is [SEG].", masks=<bool 1x427x640>, scores=(0.93,))
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pixel_sail.config import PredictConfig
from pixel_sail.model.generation import Answer, ImagePrefix, encode_image, generate, stack_prefixes
from pixel_sail.model.mask_head import mask_logits
from pixel_sail.model.modeling_pixel_sail import PixelSailForSegmentation, load_model
from pixel_sail.model.processing_pixel_sail import PixelSailProcessor, image_positions
from pixel_sail.types import BoolMask, SizeHW, VisualPrompt

FORCED_ANSWER = "It is [SEG]."
"""The answer that is put into the model's mouth with `predict.answer=forced` (released retry)."""

SHORT_ANSWER_TOKENS = 32
"""Longest answer where nothing else is said: enough for masks alone."""

Overlay = tuple[tuple[VisualPrompt, ...], Sequence[str]]
"""Visual prompts, and the questions that are asked with them painted on the image."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What the model says about one question."""

    text: str
    """Answer with special tokens, without the ending token."""
    masks_NHW: NDArray[np.bool_]
    """One mask per [SEG] at image size."""
    scores: tuple[float, ...]
    """Per mask, mean probability of its pixels (0 for an empty one)."""

    def merged(self, rule: str) -> BoolMask | None:
        """Return the `union` of all masks or the `first`, None when the answer held no [SEG]."""
        if len(self.masks_NHW) == 0:
            return None
        merged: BoolMask = self.masks_NHW[0] if rule == "first" else np.asarray(self.masks_NHW.any(axis=0))
        return merged


class Predictor:
    """A model and its processor, ready to answer."""

    def __init__(
        self, model: PixelSailForSegmentation, processor: PixelSailProcessor, config: PredictConfig | None = None
    ) -> None:
        self.model = model
        self.processor = processor
        self.config = config if config is not None else PredictConfig()

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, config: PredictConfig | None = None, precision: str = "fp32", device: str = "cpu"
    ) -> "Predictor":
        """Load an exported folder."""
        model = load_model(folder, dtype=DTYPES[precision])
        model.to(torch.device(device))  # type: ignore[arg-type]
        return cls(model, PixelSailProcessor.from_pretrained(folder), config)

    def changed(self, **settings: Any) -> "Predictor":
        """Return the same model with other settings."""
        return Predictor(self.model, self.processor, replace(self.config, **settings))

    def ask(
        self, image: Image.Image | None, questions: Sequence[str], prompts: tuple[VisualPrompt, ...] = ()
    ) -> list[Reply]:
        """Answer every question about one image (None: a text-only question), each independently of the others.

        Raises: DataError for a visual prompt the model has no token for.
        """
        return self.ask_overlays(image, [(prompts, questions)])[0]

    @torch.no_grad()
    def ask_overlays(self, image: Image.Image | None, overlays: Sequence[Overlay]) -> list[list[Reply]]:
        """Answer the questions of every overlay of one image, as `ask` would answer them one overlay at a time.

        Raises: DataError for a visual prompt the model has no token for.
        """
        rows = [(index, question) for index, (_, questions) in enumerate(overlays) for question in questions]
        patches = None if image is None else self.processor.image_patches(image)
        image_hw = (0, 0) if image is None else (image.height, image.width)
        replies: list[list[Reply]] = [[] for _ in overlays]
        prefixes: dict[int, ImagePrefix] = {}
        for start in range(0, len(rows), self.config.batch_size):
            batch = rows[start : start + self.config.batch_size]
            owners = [index for index, _ in batch]
            if patches is not None:
                # The last overlay of the batch before may go on in this one.
                prefixes = {i: prefixes.get(i) or self._encode(*patches, overlays[i][0]) for i in dict.fromkeys(owners)}
            answers = self._generate([question for _, question in batch], [prefixes[i] for i in owners if prefixes])
            for index in dict.fromkeys(owners):
                own = [answer for owner, answer in zip(owners, answers, strict=True) if owner == index]
                replies[index] += self._replies(own, prefixes.get(index), image_hw)
        return replies

    def _generate(self, questions: Sequence[str], prefixes: Sequence[ImagePrefix]) -> list[Answer]:
        """Return the answers; there is one prefix per question, often the same one, or none at all."""
        prefix = None
        if prefixes:
            is_shared = all(other is prefixes[0] for other in prefixes)
            prefix = prefixes[0] if is_shared else stack_prefixes(prefixes)
        limit = SHORT_ANSWER_TOKENS if self.config.max_new_tokens is None else self.config.max_new_tokens
        return generate(
            self.model,
            prefix,
            [self._question_ids(question) for question in questions],
            max_new_tokens=limit if self.config.answer == "generated" else 0,
            end_ids=(self.processor.end_id, self.processor.turn_end_id),
        )

    def _question_ids(self, question: str) -> list[int]:
        """Return the tokens of a question, with the forced answer behind it where one is configured."""
        ids = self.processor.question_ids(question)
        return ids + self.processor.text_ids(FORCED_ANSWER) if self.config.answer == "forced" else ids

    def _encode(self, patches: Tensor, grid: SizeHW, prompts: tuple[VisualPrompt, ...]) -> ImagePrefix:
        """Encode the patches of an image with its visual prompts."""
        painted = self.processor.paint_prompts(prompts, grid, "question")
        device = self.model.device
        return encode_image(self.model, patches.to(device), grid, image_positions(grid).to(device), painted.to(device))

    def _replies(self, answers: Sequence[Answer], prefix: ImagePrefix | None, image_hw: tuple[int, int]) -> list[Reply]:
        """Turn tokens and [SEG] states into text and masks."""
        counts = [len(answer.seg_states_ND) for answer in answers]
        probabilities = None
        if prefix is not None and any(counts):
            head = self.model.mask_head
            features = head.pixel_features(prefix.patch_states()[None])[0]
            queries = head.seg_queries(torch.cat([answer.seg_states_ND for answer in answers]))
            probabilities = resize_logits(mask_logits(queries, features), image_hw).sigmoid()
        replies, first = [], 0
        for answer, number in zip(answers, counts, strict=True):
            masks = np.zeros((0, *image_hw), dtype=bool)
            scores: tuple[float, ...] = ()
            if probabilities is not None:
                own = probabilities[first : first + number]
                on = own > 0.5
                masks = on.cpu().numpy()
                scores = tuple(((own * on).sum((1, 2)) / on.sum((1, 2)).clamp_min(1)).tolist())
            first += number
            forced = FORCED_ANSWER if self.config.answer == "forced" else ""
            text = (forced + self.processor.decode(answer.token_ids)).strip()
            replies.append(Reply(text=text, masks_NHW=masks, scores=scores))
        return replies


def resize_logits(logits_NYX: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Return logits at image size [N, H, W], float32, bilinear as in the release."""
    return F.interpolate(logits_NYX[:, None].float(), size=size_hw, mode="bilinear", align_corners=False)[:, 0]
