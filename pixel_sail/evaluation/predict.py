"""Batched inference: questions about images in, text and masks at image size out.

`evaluation/engine.py`, `scripts/predict.py` and validation during training call `BatchPredictor`. An image is encoded
once for all questions with the same visual prompts, which change the image's states. Images of one patch grid and all
their questions run as one batch of up to `max_batch_tokens`. Pixel features are computed once per image, and only if an
answer contains a [SEG].

    predictor.ask(image, ["Please segment the cat."])[0]
        -> PredictorOutput(answer="It is [SEG].", masks_NHW=<bool 1x427x640>, scores=(0.93,))
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pixel_sail.config import PredictConfig
from pixel_sail.model.generation import GenerationOutput, ImagePrefixes, NotFiniteError, encode_images, generate
from pixel_sail.model.mask_head import mask_logits
from pixel_sail.model.modeling_pixel_sail import PixelSailForSegmentation, first_not_finite, load_model
from pixel_sail.model.processing_pixel_sail import PixelSailProcessor
from pixel_sail.predictor_io import PredictorOutput
from pixel_sail.types import DTYPES, DataError, SizeHW, VisualPrompt

FORCED_ANSWER = "It is [SEG]."
"""The prefilled answer with `predict.answer=forced` (released retry)."""

SHORT_ANSWER_TOKENS = 32
"""Default maximum answer length, enough for masks alone."""


@dataclass(frozen=True, kw_only=True)
class PreparedImage:
    """A preprocessed image."""

    patches_PK: Tensor
    """uint8"""
    grid_hw: SizeHW
    size_hw: SizeHW


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """Independent questions about the same image (None: no image) with the same visual prompts."""

    image: PreparedImage | None
    questions: Sequence[str]
    prompts: tuple[VisualPrompt, ...] = ()

    @property
    def grid_hw(self) -> SizeHW | None:
        """Return the patch grid of the image."""
        return None if self.image is None else self.image.grid_hw


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Some of the questions of one request, tokenized."""

    request: int
    texts: Sequence[list[int]]
    first: int
    """Index of the first one among the questions of the request."""


class BatchPredictor:
    """A model and its processor for inference."""

    def __init__(
        self, model: PixelSailForSegmentation, processor: PixelSailProcessor, config: PredictConfig | None = None
    ) -> None:
        self.model = model
        self.processor = processor
        self.config = config if config is not None else PredictConfig()

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, config: PredictConfig | None = None, precision: str = "fp32", device: str = "cpu"
    ) -> "BatchPredictor":
        """Load an exported folder. Raises: DataError if its files are damaged or inconsistent."""
        model = load_model(folder, dtype=DTYPES[precision])
        processor = PixelSailProcessor.from_pretrained(folder)
        vocabulary = processor.tokenizer.get_vocab()
        wanted = model.config.token_ids
        if others := {
            name: (vocabulary.get(name), wanted[name]) for name in wanted if vocabulary.get(name) != wanted[name]
        }:
            raise DataError(
                f"{folder}: (tokenizer, config.json) differ in the ids of {dict(list(others.items())[:5])}; the files "
                "are of two models; copy or export them again"
            )
        model.to(torch.device(device))  # type: ignore[arg-type]
        return cls(model, processor, config)

    @property
    def end_ids(self) -> tuple[int, int]:
        """Return the end tokens."""
        return self.processor.end_id, self.processor.turn_end_id

    def changed(self, **settings: Any) -> "BatchPredictor":
        """Return the same model with other settings."""
        return BatchPredictor(self.model, self.processor, replace(self.config, **settings))

    def prepare(self, image: Image.Image) -> PreparedImage:
        """Return an opened image as patches."""
        patches, grid = self.processor.image_patches(image)
        return PreparedImage(patches_PK=patches, grid_hw=grid, size_hw=(image.height, image.width))

    def ask(
        self, image: Image.Image | None, questions: Sequence[str], prompts: tuple[VisualPrompt, ...] = ()
    ) -> list[PredictorOutput]:
        """Answer every question about one image (None: a text-only question), each independently of the others.

        Raises: DataError for a visual prompt the model has no token for; NotFiniteError.
        """
        prepared = None if image is None else self.prepare(image)
        return self.ask_many([GenerationRequest(image=prepared, questions=questions, prompts=prompts)])[0]

    @torch.no_grad()
    def ask_many(self, requests: Sequence[GenerationRequest]) -> list[list[PredictorOutput]]:
        """Answer the questions of every request, as `ask` would answer them one by one.

        Raises: DataError for a visual prompt the model has no token for; NotFiniteError with the first question whose
        numbers are not finite.
        """
        texts = [
            [self.question_ids(question, follows_image=request.image is not None) for question in request.questions]
            for request in requests
        ]
        outputs: list[list[PredictorOutput]] = [[] for _ in requests]
        for batch in self._batches(requests, texts):
            try:
                self._answer_batch(requests, batch, outputs)
            except NotFiniteError as error:
                part = batch[error.request]
                raise NotFiniteError(
                    f"{error}; {self.why_not_finite()}", request=part.request, question=part.first + error.question
                ) from None
        return outputs

    def _answer_batch(
        self, requests: Sequence[GenerationRequest], batch: Sequence[_Part], outputs: list[list[PredictorOutput]]
    ) -> None:
        """Add the outputs of a batch. Raises: NotFiniteError with indices within the batch."""
        generated, prefixes = self._generate([requests[part.request] for part in batch], batch)
        for index, (part, own) in enumerate(zip(batch, generated, strict=True)):
            image = requests[part.request].image
            states = None if prefixes is None else prefixes.patch_states(index)
            outputs[part.request] += self.outputs(
                own, states, (0, 0) if image is None else image.size_hw, request=index
            )

    def why_not_finite(self) -> str:
        """Return an explanation of non-finite outputs after checking all weights."""
        name = first_not_finite(self.model)
        if name is None:
            return (
                "all weights are finite, so activations overflowed; the training diverged, or this precision is too "
                "coarse for the model: try precision=fp32, otherwise use an earlier checkpoint"
            )
        return f"the weights hold NaN or infinite numbers, first in {name}; use an earlier checkpoint"

    def _batches(
        self, requests: Sequence[GenerationRequest], texts: Sequence[Sequence[list[int]]]
    ) -> Iterator[list[_Part]]:
        """Yield batches: questions about images of one grid, within `max_batch_tokens` if possible.

        A request that exceeds the limit is split, and its image is encoded once per part.
        """
        by_grid: dict[SizeHW | None, list[int]] = {}
        for index, request in enumerate(requests):
            if request.questions:
                by_grid.setdefault(request.grid_hw, []).append(index)
        for grid, members in by_grid.items():
            image_tokens = 0 if grid is None else span_length(grid)
            batch: list[_Part] = []
            for index in members:
                # The cost of a batch depends on its longest text and on the image with most texts.
                per_text = max(map(len, texts[index])) + self.max_new_tokens
                step = max(1, (self.config.max_batch_tokens - image_tokens) // per_text)
                for start in range(0, len(texts[index]), step):
                    part = _Part(request=index, texts=texts[index][start : start + step], first=start)
                    if batch and self._cost([*batch, part], image_tokens) > self.config.max_batch_tokens:
                        yield batch
                        batch = []
                    batch.append(part)
            if batch:
                yield batch

    def _cost(self, batch: Sequence[_Part], image_tokens: int) -> int:
        """Return the number of tokens of a batch including padding."""
        longest = max(len(text) for part in batch for text in part.texts) + self.max_new_tokens
        return len(batch) * (image_tokens + max(len(part.texts) for part in batch) * longest)

    @property
    def max_new_tokens(self) -> int:
        """Return the length limit of generated answers."""
        if self.config.answer == "forced":
            return 0
        return SHORT_ANSWER_TOKENS if self.config.max_new_tokens is None else self.config.max_new_tokens

    @torch.no_grad()
    def encode(self, requests: Sequence[GenerationRequest]) -> ImagePrefixes | None:
        """Return the encoded images of requests of one grid, with visual prompts; None without images.

        Raises: DataError for a visual prompt the model has no token for.
        """
        images = [request.image for request in requests if request.image is not None]
        if not images:
            return None
        grid = images[0].grid_hw
        painted = [self.processor.paint_prompts(request.prompts, grid, "question") for request in requests]
        return encode_images(
            self.model,
            torch.stack([image.patches_PK for image in images]).to(self.model.device),
            grid,
            self.processor.image_span(grid).position_ids_2S.to(self.model.device),
            torch.stack(painted).to(self.model.device),
            self.processor.lead_ids,
        )

    def _generate(
        self, requests: Sequence[GenerationRequest], batch: Sequence[_Part]
    ) -> tuple[list[list[GenerationOutput]], ImagePrefixes | None]:
        """Return the generated output of every part, and the encoded images. `requests`: those of the parts."""
        prefixes = self.encode(requests)
        generated = generate(
            self.model,
            prefixes,
            [part.texts for part in batch],
            max_new_tokens=self.max_new_tokens,
            end_ids=self.end_ids,
            compiled=self.config.compile == "decode",
        )
        return generated, prefixes

    def question_ids(self, question: str, *, follows_image: bool) -> list[int]:
        """Return the tokens of a question, followed by the forced answer if configured."""
        ids = self.processor.question_ids(question, follows_image=follows_image)
        return ids + self.processor.text_ids(FORCED_ANSWER) if self.config.answer == "forced" else ids

    @torch.no_grad()
    def outputs(
        self, generated: Sequence[GenerationOutput], states_hwD: Tensor | None, image_hw: SizeHW, *, request: int = 0
    ) -> list[PredictorOutput]:
        """Convert tokens and [SEG] states of one image to text and masks.

        Raises: NotFiniteError with the index `request` for non-finite masks.
        """
        counts = [len(one.seg_states_ND) for one in generated]
        probabilities = None
        if states_hwD is not None and any(counts):
            head = self.model.mask_head
            features = head.pixel_features(states_hwD[None])[0]
            queries = head.seg_queries(torch.cat([one.seg_states_ND for one in generated]))
            logits_NYX = mask_logits(queries, features)
            is_finite_N = logits_NYX.isfinite().all(2).all(1).tolist()
            probabilities = resize_logits(logits_NYX, image_hw).sigmoid()
            owners = [index for index, number in enumerate(counts) for _ in range(number)]
            for index, is_finite in zip(owners, is_finite_N, strict=True):
                if not is_finite:
                    raise NotFiniteError("the logits of a mask are not finite", request=request, question=index)
        outputs, first = [], 0
        for one, number in zip(generated, counts, strict=True):
            masks = np.zeros((0, *image_hw), dtype=bool)
            scores: tuple[float, ...] = ()
            if probabilities is not None:
                own = probabilities[first : first + number]
                on = own > 0.5
                masks = on.cpu().numpy()
                scores = tuple(((own.float() * on).sum((1, 2)) / on.sum((1, 2)).clamp_min(1)).tolist())
            first += number
            forced = FORCED_ANSWER if self.config.answer == "forced" else ""
            text = (forced + self.processor.decode(one.token_ids)).strip()
            outputs.append(PredictorOutput(answer=text, masks_NHW=masks, scores=scores))
        return outputs


def span_length(grid_hw: SizeHW) -> int:
    """Return the number of tokens of an image: its patches and two delimiters."""
    return grid_hw[0] * grid_hw[1] + 2


def resize_logits(logits_NYX: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Return logits at image size [N, H, W], bilinear and in their own precision, as in the release."""
    return F.interpolate(logits_NYX[:, None], size=size_hw, mode="bilinear", align_corners=False)[:, 0]
