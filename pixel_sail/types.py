"""Shared data types, from annotation files to scores.

All other modules import this one; it imports only `errors.py` and `texts.py`. Read it first, then
`data/sources/refer.py`, `data/collate.py`, `model/modeling_pixel_sail.py`, `losses/`, `training/loop.py`.

    TRAIN  annotations --sources--> Sample --processor--> Example --packing, collate--> Batch --model--> losses
    EVAL   annotations --sources--> Expression --predictor--> Prediction --metrics--> sums and counts --> ratios

One sample of a referring-segmentation source, as an example of the data:

    Sample(sample_id="refcoco/train/image=581857", source="refcoco", image_path=Path(".../COCO_..581857.jpg"),
           image_hw=(427, 640), turns=(Turn(question="Please segment the lady in blue in this image.",
           answer="It is [SEG].", masks=(<bool 427x640>,)),), prompts=())

Axis letters: B rows of a packed batch, T tokens, P patches of one image, S patches of the whole batch, K values of one
flattened patch (3 * patch_size ** 2), N masks, H W pixels. Sizes are always (height, width).
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pixel_sail.errors import ExpectedError
from pixel_sail.texts import has_lone_surrogate, limited, shown

BoolMask = NDArray[np.bool_]
"""A binary mask [H, W] at the resolution of its image. Always a union of its parts, never a sum."""

RLE = dict[str, Any]
"""COCO run-length encoding: {"size": [height, width], "counts": str}."""

Json = dict[str, Any]
"""A JSON object as read from a file."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Name of a precision in settings -> its dtype."""

PROTOCOLS = ("standard", "paper")
"""How a benchmark is scored: as its authors define it, or as the paper's code does."""

SizeHW = tuple[int, int]

IGNORE_LABEL = -100
"""Label of tokens without text loss (the default of torch's cross-entropy)."""


class DataError(ExpectedError, ValueError):
    """A file, annotation or sample is invalid. The message says where, what was found and expected, and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(limited(message))


class MissingDataError(DataError):
    """A file or folder of a dataset does not exist, for example because it was not downloaded."""


def check_texts(texts: Iterable[str], where: str) -> None:
    """Raise DataError for a text that cannot be tokenized. Called for all texts of samples and evaluations."""
    for text in texts:
        if has_lone_surrogate(text):
            raise DataError(
                f"{where}: found an unpaired surrogate in {shown(text)}, expected Unicode text; the program that wrote "
                "the file split a character, repair or remove the record"
            )


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One question about an image and its answer, with one mask per [SEG] of the answer, in order."""

    question: str
    answer: str
    masks: tuple[BoolMask, ...] = ()
    ignored: BoolMask | None = None
    """Pixels excluded from the loss, neither target nor background, for all masks of the turn. None: no pixel."""


@dataclass(frozen=True, kw_only=True)
class VisualPrompt:
    """A marked region: `<Prompt{prompt_id}>` in the text; its embedding is added to the patches under `mask`."""

    prompt_id: int
    mask: BoolMask


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One item of a source: raw text, an image path and masks at image resolution, not tokenized or resized."""

    sample_id: str
    """Unique name used in every error message and log line about this sample."""
    source: str
    image_path: Path | None
    """None for a text-only sample."""
    image_hw: SizeHW | None
    """Size in the annotation file; the image file must have the same size."""
    turns: tuple[Turn, ...]
    prompts: tuple[VisualPrompt, ...] = ()
    part_choice: float | None = None
    """If the turns together exceed a sequence: which of the parts that fit is kept, from 0 (first) to 1 (see
    data/turn_parts.py). None: a sample that is too long is an error."""

    def __post_init__(self) -> None:
        """Check the texts. Raises: DataError."""
        check_texts((text for turn in self.turns for text in (turn.question, turn.answer)), self.sample_id)


class Source(Protocol):
    """A training dataset: a fixed number of items, each a pure function of (index, rng)."""

    name: str

    def __len__(self) -> int:
        """Return the number of items of one epoch."""
        ...

    def get(self, index: int, rng: np.random.Generator) -> Sample:
        """Return item `index`; every random choice (sentences, templates, prompt ids) is sampled from `rng`."""
        ...

    def image_path(self, index: int) -> Path | None:
        """Return the image file of an item without opening it, None for a text-only item.

        Used by the decontamination and the data check, which iterate over all items.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Expression:
    """One referring expression to be scored: text, image and the target mask as RLE (None: nothing is referred to)."""

    ref_id: int
    sent_id: int
    image_id: int
    image_path: Path
    image_hw: SizeHW
    text: str
    target: RLE | None
    ignored: RLE | None = None
    """Pixels that are not scored."""
    released_target: RLE | None = None
    """Target mask of the released scripts if it differs: overlapping polygons summed, crowds omitted."""

    def __post_init__(self) -> None:
        """Check the texts. Raises: DataError."""
        check_texts((self.text,), f"{self.image_path.name}: ref_id {self.ref_id}, sent_id {self.sent_id}")


@dataclass(frozen=True, kw_only=True)
class RegionCaption:
    """One marked region to be described, with reference captions by annotators."""

    item_id: str
    image_path: Path
    image_hw: SizeHW
    region: RLE
    references: tuple[str, ...]

    def __post_init__(self) -> None:
        """Check the texts. Raises: DataError."""
        check_texts(self.references, f"item {self.item_id}")


@dataclass(frozen=True, kw_only=True)
class RegionChoice:
    """One multiple-choice question about a marked region."""

    item_id: str
    image_path: Path
    image_hw: SizeHW
    region: RLE
    question: str
    """Text of the file, options included."""
    answer: str
    """Correct option, as in the file."""

    def __post_init__(self) -> None:
        """Check the texts. Raises: DataError."""
        check_texts((self.question, self.answer), f"item {self.item_id}")


@dataclass(frozen=True, kw_only=True)
class VisualReferring:
    """One question about marked regions whose answer has masks."""

    item_id: str
    image_path: Path
    image_hw: SizeHW
    question: str
    """Text with `<Prompt{k}>` for each region."""
    regions: tuple[RLE, ...]
    prompt_ids: tuple[int, ...]
    """k of each region: its index among all tags of the item, so there may be gaps."""
    answer: str
    targets: tuple[RLE, ...]

    def __post_init__(self) -> None:
        """Check the texts. Raises: DataError."""
        check_texts((self.question, self.answer), f"item {self.item_id}")


@dataclass(frozen=True, kw_only=True)
class GroundedCaption:
    """One image to be described, with a mask for every visible phrase."""

    image_id: str
    image_path: Path
    image_hw: SizeHW
    captions: tuple[str, ...]
    phrases: tuple[str, ...]
    masks: tuple[RLE, ...]
    """One per phrase."""

    def __post_init__(self) -> None:
        """Check the texts. Raises: DataError."""
        check_texts((*self.captions, *self.phrases), f"image {self.image_id}")


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Prediction for one expression: generated text and mask as RLE (None: no [SEG] was generated)."""

    ref_id: int
    sent_id: int
    image_id: int
    text: str
    segmentation: RLE | None
    answer: str = ""
    first_segmentation: RLE | None = None
    """Mask of the first [SEG], if `segmentation` is the union of several."""


@dataclass(frozen=True, kw_only=True)
class TeacherTarget:
    """Distillation target of one image from one teacher."""

    teacher: str
    features_EYX: Tensor | None
    """Cached features, float16 or int8. None: the teacher computes them from the image."""
    scales_E: Tensor | None = None
    """float32: quantization step of each channel of int8 features."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One tokenized sample before packing. An image comes first, after at most a template's text."""

    sample_id: str
    source: str
    input_ids_T: Tensor
    """int64."""
    labels_T: Tensor
    """int64: token id for tokens of an answer, IGNORE_LABEL elsewhere (not shifted)."""
    position_ids_2T: Tensor
    """int64: (row, column) rotary positions; equal for text."""
    branch_ids_T: Tensor
    """int64: 0 for the shared image prefix; text of branch k attends to branch 0 and its own branch only."""
    in_image_T: Tensor
    """bool: the image span with its two delimiters, which has bidirectional attention; all false if attention is
    causal."""
    patch_index_T: Tensor
    """int64: row of `patches_PK` of this token, -1 for text."""
    prompt_ids_T: Tensor
    """int64: id of the visual prompt that covers this patch, -1 for none."""
    patches_PK: Tensor
    """uint8: pixels, each patch flattened channel first; P is 0 for a text-only sample."""
    grid_hw: SizeHW | None
    masks: tuple[BoolMask, ...]
    """One per [SEG] in `input_ids_T`, in token order."""
    ignored: tuple[BoolMask | None, ...]
    """Aligned with `masks`: pixels excluded from the loss."""
    point_seed: int = 0
    """Seed of the points sampled for the mask loss, so they depend on the sample and not on its rank."""
    teacher_targets: tuple[TeacherTarget, ...] = ()
    image_HW3: Tensor | None = None
    """uint8: the original image, if a teacher needs it."""

    def __len__(self) -> int:
        """Return the number of tokens."""
        return int(self.input_ids_T.shape[0])


@dataclass(frozen=True, kw_only=True)
class SampleSpan:
    """The tokens of one sample in its row: an image, then text shared by all branches, then the branches."""

    row: int
    start: int
    image: int
    """Tokens of the image with its delimiters, 0 for a text-only sample; a causal image counts as shared."""
    shared: int
    branches: tuple[int, ...]

    @property
    def length(self) -> int:
        """Return the number of tokens."""
        return self.image + self.shared + sum(self.branches)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Packed sequences: B rows of T tokens. Each row holds several samples that do not attend to each other.

    Ragged data are flat with an index: patches with `patch_index_BT`, masks with `masks_per_image`.
    """

    sample_ids: tuple[str, ...]
    """Name of every sample; `sample_index_BT` indexes it."""
    sources: tuple[str, ...]
    input_ids_BT: Tensor
    position_ids_2BT: Tensor
    sample_index_BT: Tensor
    """int64: sample of each token, -1 for padding."""
    branch_ids_BT: Tensor
    in_image_BT: Tensor
    patch_index_BT: Tensor
    """int64 into `patches_SK`, -1 for text."""
    prompt_ids_BT: Tensor
    patches_SK: Tensor
    grids: tuple[SizeHW, ...]
    """Patch grid of each image, in the order of their patches."""
    image_samples: tuple[int, ...]
    """Index into `sample_ids` of each image."""
    seg_positions_N2: Tensor
    """int64: (row, token) of every [SEG] that yields a mask, ordered by image, then token."""
    masks_per_image: tuple[int, ...]
    """Number of masks of each image, aligned with `grids`."""
    logit_positions_M2: Tensor
    """int64: (row, token) of every position whose next token is supervised."""
    targets_M: Tensor
    """int64: that next token."""
    target_samples_M: Tensor
    """int64: its sample, an index into `sample_ids`."""
    point_seeds: tuple[int, ...]
    """Per image, seed of the points sampled for its mask losses."""
    masks: tuple[Tensor, ...]
    """N bool tensors [H, W] at image resolution."""
    ignored: tuple[Tensor | None, ...]
    """Aligned with `masks`: bool [H, W], pixels excluded from the loss, or None."""
    teacher_names: tuple[str, ...] = ()
    """Teacher of each distilled (teacher, image) pair."""
    teacher_images: tuple[int, ...] = ()
    """Index into `grids` of the image of each pair."""
    teacher_maps: tuple[Tensor | None, ...] = ()
    """Cached features [E, Y, X] of each pair, float16 or int8. None: the teacher computes them from the image."""
    teacher_scales: tuple[Tensor | None, ...] = ()
    """float32 [E] of each pair with int8 features."""
    original_image_index: tuple[int, ...] = ()
    """Index into `grids` of each original image."""
    original_images: tuple[Tensor, ...] = ()
    """uint8 [H, W, 3]: original images that a teacher needs."""
    spans: tuple[SampleSpan, ...] | None = None
    """Token spans of every sample. None: derived from the tensors."""

    def __post_init__(self) -> None:
        """Check that shapes and counts agree; a mistake in collate would otherwise stay silent."""
        shape = self.input_ids_BT.shape
        for name in ("sample_index_BT", "branch_ids_BT", "in_image_BT", "patch_index_BT", "prompt_ids_BT"):
            assert getattr(self, name).shape == shape, f"{name} is {getattr(self, name).shape}, expected {shape}"
        assert self.position_ids_2BT.shape == (2, *shape), self.position_ids_2BT.shape
        num_patches = sum(h * w for h, w in self.grids)
        assert self.patches_SK.shape[0] == num_patches, f"{self.patches_SK.shape[0]} patches, grids hold {num_patches}"
        assert len(self.image_samples) == len(self.grids) == len(self.point_seeds), (
            "every image needs exactly one owner"
        )
        assert len(self.logit_positions_M2) == len(self.targets_M) == len(self.target_samples_M), "supervision differs"
        assert len(self.masks_per_image) == len(self.grids), "every image needs its number of masks"
        counts = (len(self.masks), len(self.seg_positions_N2), sum(self.masks_per_image), len(self.ignored))
        assert len(set(counts)) == 1, f"masks, [SEG] positions, the sum over images and ignored masks differ: {counts}"
        pairs = (len(self.teacher_names), len(self.teacher_images), len(self.teacher_maps), len(self.teacher_scales))
        assert len(set(pairs)) == 1, f"names, images, maps and scales of teachers differ: {pairs}"
        assert len(self.original_image_index) == len(self.original_images), "every original image needs its index"

    def model_inputs(self) -> dict[str, Any]:
        """Return the keyword arguments of the model's forward that this batch provides."""
        tokens = ["input_ids_BT", "position_ids_2BT", "sample_index_BT", "branch_ids_BT", "in_image_BT"]
        images = ["patch_index_BT", "prompt_ids_BT", "patches_SK", "grids", "seg_positions_N2", "masks_per_image"]
        inputs = {name: getattr(self, name) for name in (*tokens, *images, "logit_positions_M2", "spans")}
        return inputs | {"distilled_images": self.distilled_images()} if self.teacher_names else inputs

    def training_inputs(self) -> dict[str, Any]:
        """Return `model_inputs` and the targets, with which the model can return text losses instead of logits."""
        return self.model_inputs() | {"targets_M": self.targets_M}

    def distilled_images(self) -> dict[str, tuple[int, ...]]:
        """Return the distilled images of each teacher, as indices into `grids`."""
        images: dict[str, tuple[int, ...]] = {}
        for name, image in zip(self.teacher_names, self.teacher_images, strict=True):
            images[name] = (*images.get(name, ()), image)
        return images

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch with every tensor on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        for name in ("masks", "ignored", "teacher_maps", "teacher_scales", "original_images"):
            moved[name] = tuple(
                None if tensor is None else tensor.to(device, non_blocking=True) for tensor in getattr(self, name)
            )
        return replace(self, **moved)
