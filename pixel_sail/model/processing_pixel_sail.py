"""The processor: images and text to tokens, the same for training and inference.

`data/packing.py` uses it to turn a `Sample` into an `Example`; the predictor uses it to encode images and questions.
The layout of a sample with one question (grid 2 x 3):

    <vision> <vpatch>x6 </vision> | <|im_start|>user\\n{question}<|im_end|>\\n | {answer}<|endoftext|>
    positions (row, column): (0,0) (1,1) (1,2) (1,3) (2,1) (2,2) (2,3) (4,4) (5,5) ...
    labels: the answer's tokens only

Base eve places the image inside the first question, in the chat template of its language model:

    <|im_start|>user\\n <image> | \\n{question}<|im_end|>\\n<|im_start|>assistant\\n | {answer}<|im_end|>
"""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pixel_sail.files import check_fields, read_json
from pixel_sail.model.configuration_pixel_sail import Architecture
from pixel_sail.model.image_layout import ImageSpan, image_span
from pixel_sail.model.patches import RESAMPLING, covered_patches, grid_size, image_to_patches, visible_owners
from pixel_sail.model.tokenization import END_TOKEN, IMAGE_TOKENS, SEG_TOKEN, TURN_END, load_tokenizer
from pixel_sail.types import IGNORE_LABEL, BoolMask, DataError, Example, Sample, SizeHW, VisualPrompt

SETTINGS_FILE = "processor_config.json"
MOST_PROMPTS = 10_000
"""Maximum number of visual prompts, a limit for damaged files."""
QUESTION_TEMPLATE = "<|im_start|>user\n{question}<|im_end|>\n"
"""Neither a system prompt nor an assistant header, as in the release."""
CHAT_LEAD, CHAT_QUESTION = "<|im_start|>user\n", "{question}<|im_end|>\n<|im_start|>assistant\n"
"""The template of base eve. The image is inserted between both, followed by a line break."""


@dataclass(frozen=True, kw_only=True)
class ProcessorSettings:
    """Settings that the processor shares with the model."""

    patch_size: int
    max_long_side: int
    num_visual_prompts: int
    base: str = "sail"
    """Determines layout, template and resizing, see `Architecture`."""
    attention: str = "prefix"
    sizing: str = "long_side"


def _read_settings(file: Path) -> ProcessorSettings:
    """Return the settings of an exported folder. Raises: DataError."""
    remedy = "expected an exported Pixel-SAIL folder; copy or export it again"
    if not file.is_file():
        raise DataError(f"{file.parent}: no {SETTINGS_FILE}; {remedy}")
    sizes = ("patch_size", "max_long_side", "num_visual_prompts")
    found = read_json(file, dict.fromkeys(sizes, int), fail=DataError, remedy=remedy)
    texts = {name: str for name in found if name not in sizes}
    check_fields(found, str(file), texts, fail=DataError, remedy=remedy)
    known = {field.name for field in fields(ProcessorSettings)}
    if unknown := sorted(found.keys() - known):
        raise DataError(f"{file}: found {unknown}, expected {sorted(known)}; {remedy}")
    if not (
        found["patch_size"] > 0 and found["max_long_side"] > 0 and 0 <= found["num_visual_prompts"] <= MOST_PROMPTS
    ):
        raise DataError(
            f"{file}: found {found}, expected sizes above 0 and at most {MOST_PROMPTS} visual prompts; {remedy}"
        )
    if found.get("sizing", "long_side") not in RESAMPLING:
        raise DataError(
            f"{file}: found sizing {found['sizing']!r:.100}, expected one of {sorted(RESAMPLING)}; {remedy}"
        )
    return ProcessorSettings(**found)


class PixelSailProcessor:
    """Tokenizer, image patching and token layout."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: ProcessorSettings) -> None:
        self.tokenizer = tokenizer
        self.settings = settings
        vocabulary = tokenizer.get_vocab()
        self.is_chat = settings.base == "eve"
        self.end_token = TURN_END if self.is_chat else END_TOKEN
        self.seg_id, self.end_id = vocabulary[SEG_TOKEN], vocabulary[self.end_token]
        self.image_ids = [vocabulary[token] for token in IMAGE_TOKENS]
        self.turn_end_id = vocabulary[TURN_END]
        self.lead_ids = self.text_ids(CHAT_LEAD) if self.is_chat else []

    @classmethod
    def for_model(cls, tokenizer: PreTrainedTokenizerBase, config: Architecture) -> "PixelSailProcessor":
        """Return the processor of a model."""
        return cls(
            tokenizer,
            ProcessorSettings(
                patch_size=config.patch_size,
                max_long_side=config.max_long_side,
                num_visual_prompts=config.num_visual_prompts,
                base=config.base,
                attention=config.attention,
                sizing=config.sizing,
            ),
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer and settings into a folder."""
        self.tokenizer.save_pretrained(str(folder))
        (Path(folder) / SETTINGS_FILE).write_text(json.dumps(asdict(self.settings), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "PixelSailProcessor":
        """Read what `save_pretrained` wrote. Raises: DataError."""
        settings = _read_settings(Path(folder) / SETTINGS_FILE)
        tokenizer = load_tokenizer(folder, num_visual_prompts=settings.num_visual_prompts)
        return cls(tokenizer, settings)

    def text_ids(self, text: str) -> list[int]:
        """Return the tokens of a text without special tokens added."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def question_ids(self, question: str, *, follows_image: bool = False) -> list[int]:
        """Return the tokens of a user turn. `follows_image`: the turn continues directly after the image span.

        Raises: DataError for a question that contains an image token, if the base distinguishes images by these.
        """
        if not self.is_chat:
            return self.text_ids(QUESTION_TEMPLATE.format(question=question))
        ids = self.text_ids(("\n" if follows_image else CHAT_LEAD) + CHAT_QUESTION.format(question=question))
        self._check_no_image_token(ids, "question")
        return ids

    def _check_no_image_token(self, ids: list[int], where: str) -> None:
        """Raise DataError for a text with an image token."""
        if set(ids) & set(self.image_ids):
            raise DataError(f"{where}: one of {IMAGE_TOKENS} found in the text, expected none; remove it from the text")

    def decode(self, token_ids: list[int]) -> str:
        """Return generated tokens as text, including special tokens except the end token."""
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=False)).replace(self.end_token, "").strip()

    def grid_of(self, size_hw: SizeHW) -> SizeHW:
        """Return the patch grid of an image of this size."""
        return grid_size(size_hw, self.settings.patch_size, self.settings.max_long_side, self.settings.sizing)

    def image_patches(self, image: Image.Image) -> tuple[Tensor, SizeHW]:
        """Return the patches [P, K], uint8, and the grid of an opened image."""
        settings = self.settings
        return image_to_patches(image, settings.patch_size, settings.max_long_side, settings.sizing)

    def image_span(self, grid_hw: SizeHW) -> ImageSpan:
        """Return the tokens of an image, preceded by the text of the template."""
        return image_span(self.settings.base, grid_hw, self.image_ids, self.lead_ids)

    def paint_prompts(self, prompts: tuple[VisualPrompt, ...], grid_hw: SizeHW, where: str) -> Tensor:
        """Return the prompt id of every token of the image span, -1 for none: in the sail layout [1 + h * w + 1].

        Larger prompts are painted first, equally large ones by id. A prompt that is completely hidden by others gets
        one patch back, so that every prompt is visible.
        Raises: DataError for an id without a token in the model, for an empty mask, and for more prompts than covered
        patches.
        """
        order = sorted(prompts, key=lambda prompt: (-int(prompt.mask.sum()), prompt.prompt_id))
        for prompt in order:
            self._check_prompt(prompt, where)
        painted = np.full(grid_hw, -1, dtype=np.int64)
        if order:
            covered = [covered_patches(prompt.mask, grid_hw) for prompt in order]
            owners = visible_owners(covered)
            if owners is None:
                raise DataError(
                    f"{where}: {len(order)} visual prompts found on {int(np.any(covered, axis=0).sum())} patches in "
                    "all, expected a patch for each; use fewer prompts or a larger image"
                )
            painted = np.where(owners >= 0, np.array([prompt.prompt_id for prompt in order])[owners], -1)
        patch_index_S = self.image_span(grid_hw).patch_index_S
        return torch.where(patch_index_S >= 0, torch.from_numpy(painted.ravel())[patch_index_S], -1)

    def _check_prompt(self, prompt: VisualPrompt, where: str) -> None:
        """Raise DataError unless the prompt has a token and a pixel."""
        if not 0 <= prompt.prompt_id < self.settings.num_visual_prompts:
            raise DataError(
                f"{where}: visual prompt {prompt.prompt_id} found, expected 0 .. "
                f"{self.settings.num_visual_prompts - 1}; use fewer prompts or raise model.num_visual_prompts"
            )
        if not prompt.mask.any():
            raise DataError(f"{where}: the mask of <Prompt{prompt.prompt_id}> marks no pixel; remove the prompt")

    def encode_sample(self, sample: Sample, image: Image.Image | None, *, independent_turns: bool) -> Example:
        """Return a sample as tokens.

        With `independent_turns` every turn is a separate branch that attends to the image and itself, at the positions
        it would have alone. Otherwise the turns form one conversation.
        Raises: DataError if masks and [SEG] tokens do not match, an answer is missing or a prompt cannot be painted.
        """
        size_hw = None if image is None else (image.height, image.width)
        example = self.lay_out(sample, size_hw, independent_turns=independent_turns)
        return example if image is None else replace(example, patches_PK=self.image_patches(image)[0])

    def lay_out(self, sample: Sample, size_hw: SizeHW | None, *, independent_turns: bool) -> Example:
        """Like `encode_sample`, from the image size only and without pixels (P is 0).

        Raises: DataError as `encode_sample`.
        """
        parts, grid = _TokenParts(), None
        if size_hw is not None:
            self._check_mask_sizes(sample, size_hw)
            grid = self.grid_of(size_hw)
            parts.add_image(self, grid, self.paint_prompts(sample.prompts, grid, sample.sample_id))
        elif sample.prompts or any(turn.masks for turn in sample.turns):
            raise DataError(f"{sample.sample_id}: masks or visual prompts found, but the sample has no image")
        if not sample.turns:
            raise DataError(f"{sample.sample_id}: no question found, expected at least one turn")
        masks: list[BoolMask] = []
        ignored: list[BoolMask | None] = []
        start = parts.next_position
        for index, turn in enumerate(sample.turns):
            answer_ids = [*self.text_ids(turn.answer), self.end_id]
            first = size_hw is not None and (index == 0 or independent_turns)
            question_ids = self.question_ids(turn.question, follows_image=first)
            if self.is_chat:
                self._check_no_image_token(answer_ids, sample.sample_id)
            self._check_masks(sample, index, question_ids, answer_ids)
            if independent_turns:
                parts.next_position = start
            parts.add_text(question_ids, answer_ids, branch=index + 1 if independent_turns else 1)
            masks.extend(turn.masks)
            ignored.extend([turn.ignored] * len(turn.masks))
        patches = torch.zeros(0, 3 * self.settings.patch_size**2, dtype=torch.uint8)
        return parts.example(sample, patches, grid, tuple(masks), tuple(ignored))

    @staticmethod
    def _check_mask_sizes(sample: Sample, size_hw: SizeHW) -> None:
        """Raise DataError unless every mask has the size of the image."""
        masks = [mask for turn in sample.turns for mask in turn.masks] + [prompt.mask for prompt in sample.prompts]
        masks += [turn.ignored for turn in sample.turns if turn.ignored is not None]
        for mask in masks:
            if mask.shape != size_hw:
                raise DataError(
                    f"{sample.sample_id}: a mask of {mask.shape} (height, width) found, expected the image's "
                    f"{size_hw}; the annotations belong to another image"
                )

    def _check_masks(self, sample: Sample, index: int, question_ids: list[int], answer_ids: list[int]) -> None:
        """Raise DataError unless a turn has as many masks as [SEG] tokens, all in the answer."""
        found, expected = answer_ids.count(self.seg_id), len(sample.turns[index].masks)
        if self.seg_id in question_ids:
            raise DataError(f"{sample.sample_id}: turn {index} has [SEG] in its question; only answers may hold it")
        if found != expected:
            raise DataError(
                f"{sample.sample_id}: turn {index} has {found} [SEG] in its answer and {expected} masks; "
                "every mask needs exactly one [SEG]"
            )


class _TokenParts:
    """Builder of the token arrays of one sample."""

    def __init__(self) -> None:
        self.ids: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.positions: list[Tensor] = []
        self.branches: list[Tensor] = []
        self.prompts: list[Tensor] = []
        self.patch_index: list[Tensor] = []
        self.in_image: list[Tensor] = []
        self.next_position = 0

    def add_image(self, processor: PixelSailProcessor, grid_hw: SizeHW, prompt_ids: Tensor) -> None:
        """Append the image span."""
        span = processor.image_span(grid_hw)
        length = len(span.token_ids_S)
        self.ids.append(span.token_ids_S)
        self.labels.append(torch.full((length,), IGNORE_LABEL))
        self.branches.append(torch.zeros(length, dtype=torch.int64))
        self.positions.append(span.position_ids_2S)
        self.prompts.append(prompt_ids)
        self.patch_index.append(span.patch_index_S)
        # Causal attention treats image tokens like any others.
        self.in_image.append(torch.full((length,), processor.settings.attention == "prefix"))
        self.next_position = span.next_position

    def add_text(self, question_ids: list[int], answer_ids: list[int], *, branch: int) -> None:
        """Append one turn at the next position."""
        length = len(question_ids) + len(answer_ids)
        self.ids.append(torch.tensor(question_ids + answer_ids))
        self.labels.append(torch.tensor([IGNORE_LABEL] * len(question_ids) + answer_ids))
        self.branches.append(torch.full((length,), branch))
        self.positions.append(torch.arange(self.next_position, self.next_position + length).expand(2, -1))
        self.prompts.append(torch.full((length,), -1))
        self.patch_index.append(torch.full((length,), -1))
        self.in_image.append(torch.zeros(length, dtype=torch.bool))
        self.next_position += length

    def example(
        self,
        sample: Sample,
        patches: Tensor,
        grid: SizeHW | None,
        masks: tuple[BoolMask, ...],
        ignored: tuple[BoolMask | None, ...],
    ) -> Example:
        """Return the arrays as tensors."""
        return Example(
            sample_id=sample.sample_id,
            source=sample.source,
            input_ids_T=torch.cat(self.ids),
            labels_T=torch.cat(self.labels),
            position_ids_2T=torch.cat(self.positions, dim=1),
            branch_ids_T=torch.cat(self.branches),
            in_image_T=torch.cat(self.in_image),
            patch_index_T=torch.cat(self.patch_index),
            prompt_ids_T=torch.cat(self.prompts),
            patches_PK=patches,
            grid_hw=grid,
            masks=masks,
            ignored=ignored,
        )
