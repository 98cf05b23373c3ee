"""The only inference path: questions about one image in, text and masks at image size out.

Place in the flow: `evaluation/refer_seg.py`, `scripts/predict.py` and validation during training call `Predictor.ask`.
The image is encoded once, all questions about it run as one batch over its cache, pixel features are made once and
only when an answer holds a [SEG].

    predictor.ask(image, ["Please segment the cat."])[0]
        -> Reply(text="It is [SEG].", masks=<bool 1x427x640>, scores=(0.93,))
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pixel_sail.config import PredictConfig
from pixel_sail.model.generation import Answer, ImagePrefix, encode_image, generate
from pixel_sail.model.mask_head import mask_logits
from pixel_sail.model.modeling_pixel_sail import PixelSailForSegmentation, load_model
from pixel_sail.model.processing_pixel_sail import PixelSailProcessor, image_positions
from pixel_sail.types import BoolMask, VisualPrompt

FORCED_ANSWER = "It is [SEG]."
"""The answer that is put into the model's mouth with `predict.answer=forced` (released retry)."""

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

    @torch.no_grad()
    def ask(
        self, image: Image.Image | None, questions: Sequence[str], prompts: tuple[VisualPrompt, ...] = ()
    ) -> list[Reply]:
        """Answer every question about one image (None: a text-only question), each independently of the others.

        Raises: DataError for a visual prompt the model has no token for.
        """
        prefix = None if image is None else self._encode(image, prompts)
        image_hw = (0, 0) if image is None else (image.height, image.width)
        replies: list[Reply] = []
        for start in range(0, len(questions), self.config.batch_size):
            texts = [self._question_ids(question) for question in questions[start : start + self.config.batch_size]]
            answers = generate(
                self.model,
                prefix,
                texts,
                max_new_tokens=self.config.max_new_tokens if self.config.answer == "generated" else 0,
                end_ids=(self.processor.end_id, self.processor.turn_end_id),
            )
            replies += self._replies(answers, prefix, image_hw)
        return replies

    def _question_ids(self, question: str) -> list[int]:
        """Return the tokens of a question, with the forced answer behind it where one is configured."""
        ids = self.processor.question_ids(question)
        return ids + self.processor.text_ids(FORCED_ANSWER) if self.config.answer == "forced" else ids

    def _encode(self, image: Image.Image, prompts: tuple[VisualPrompt, ...]) -> ImagePrefix:
        """Encode the image with its visual prompts."""
        patches, grid = self.processor.image_patches(image)
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
