"""Input and output of a predictor: an image with a text and marked regions; a text with masks.

`predictor.py` takes a `PredictorRequest`; `evaluation/predict.py` returns a `PredictorOutput`, for users and for every
evaluation task. An example:

    PredictorOutput(answer="It is [SEG].", masks_NHW=<bool 1x427x640>, scores=(0.93,), timing=Timing(...))
    .boxes     ((120, 48, 311, 402),)       .to_json()  {"answer": "It is [SEG].", "masks": [{"size": ...}], ...}
"""

from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pixel_sail.data.coordinates import check_pixels
from pixel_sail.metrics.answer_text import grounded_text
from pixel_sail.rle import BoxXYXY, bounding_box, check_mask, encode_mask
from pixel_sail.types import RLE, BoolMask, DataError, SizeHW, VisualPrompt


@dataclass(frozen=True)
class Box:
    """A marked rectangle in pixels of the image, x to the right and y downwards; x1 and y1 are exclusive."""

    x0: float
    y0: float
    x1: float
    y1: float


@dataclass(frozen=True)
class Point:
    """A marked pixel: x to the right, y downwards."""

    x: float
    y: float


ImageLike = str | Path | Image.Image | NDArray[np.uint8]
"""An image file, an opened image, or RGB pixels [H, W, 3]."""

Region = Box | Point | BoolMask
"""A marked region of an image; a mask is boolean and has the image's size."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Time of an answer by phase, in seconds."""

    encode_s: float
    """Encoding of the image; 0 if it is already encoded."""
    generate_s: float
    """Generation of the text."""
    mask_s: float
    """From [SEG] states to masks at image size."""

    @property
    def total_s(self) -> float:
        """Return the sum."""
        return self.encode_s + self.generate_s + self.mask_s


@dataclass(frozen=True, kw_only=True)
class PredictorRequest:
    """One question: an image (None: a question without one), a text, and regions called `<Prompt0>`, ..."""

    image: ImageLike | None
    text: str
    prompts: Sequence[Region] = ()


@dataclass(frozen=True, kw_only=True)
class PredictorOutput:
    """The answer to one question."""

    answer: str
    """As generated, with [SEG] and `<p>` marks, without the ending token."""
    masks_NHW: NDArray[np.bool_]
    """One mask per [SEG], at image size."""
    scores: tuple[float, ...]
    """Per mask, mean probability of its pixels (0 for an empty one)."""
    timing: Timing | None = None
    """None for answers that were computed in a batch."""
    is_retry: bool = False
    """True: the answer has no mask; the masks are those of a second answer that was forced to begin with one."""

    @property
    def text(self) -> str:
        """Return the answer as plain text, without marks."""
        return grounded_text(self.answer).caption

    @property
    def phrases(self) -> tuple[str, ...]:
        """Return the phrase of each mask, "" if the answer marks none."""
        return grounded_text(self.answer).phrases

    @property
    def mask(self) -> BoolMask | None:
        """Return the union of all masks, None when the answer holds no [SEG]."""
        return self.merged_mask("union")

    def merged_mask(self, rule: str) -> BoolMask | None:
        """Return the `union` of all masks or the `first`, None when the answer holds no [SEG]."""
        if len(self.masks_NHW) == 0:
            return None
        merged: BoolMask = self.masks_NHW[0] if rule == "first" else np.asarray(self.masks_NHW.any(axis=0))
        return merged

    @property
    def boxes(self) -> tuple[BoxXYXY | None, ...]:
        """Return the smallest box around each mask, None for an empty one."""
        return tuple(bounding_box(mask) for mask in self.masks_NHW)

    @property
    def rles(self) -> tuple[RLE, ...]:
        """Return the masks as COCO run-length encodings that fit into JSON."""
        return tuple(encode_mask(mask) for mask in self.masks_NHW)

    def to_json(self) -> dict[str, Any]:
        """Return all fields as JSON-compatible values."""
        return {
            "answer": self.answer,
            "text": self.text,
            "phrases": list(self.phrases),
            "masks": list(self.rles),
            "scores": list(self.scores),
            "boxes": [None if box is None else list(box) for box in self.boxes],
            "timing": None if self.timing is None else asdict(self.timing),
        }


def region_mask(region: Region, image_hw: SizeHW, where: str) -> BoolMask:
    """Return a marked region as a mask at image size; a box covers every pixel it touches.

    Raises: DataError for a region outside the image, numbers within 0 .. 1, which look like fractions of the image, a
    mask of another size or type, and any other type.
    """
    height, width = image_hw
    mask = np.zeros(image_hw, dtype=bool)
    if isinstance(region, Box | Point) and not all(isinstance(side, Real) for side in astuple(region)):
        raise DataError(f"{where}: found {region}, expected numbers, in pixels of the image")
    if isinstance(region, Box | Point) and not all(float(side).is_integer() for side in astuple(region)):
        # A box of whole numbers is taken as pixels, so that the corner pixel can be marked.
        check_pixels([float(side) for side in astuple(region)], image_hw, where)
    if isinstance(region, Box):
        if not (0 <= region.x0 < region.x1 <= width and 0 <= region.y0 < region.y1 <= height):
            raise DataError(
                f"{where}: found {region}, expected x0 < x1 and y0 < y1 inside the image of {width} x {height} pixels"
            )
        columns = slice(int(region.x0), int(np.ceil(region.x1)))
        mask[int(region.y0) : int(np.ceil(region.y1)), columns] = True
    elif isinstance(region, Point):
        if not (0 <= region.x < width and 0 <= region.y < height):
            raise DataError(f"{where}: found {region}, expected x, y inside the image of {width} x {height} pixels")
        mask[int(region.y), int(region.x)] = True
    elif isinstance(region, np.ndarray):
        check_mask(region, where)
        if region.shape != image_hw:
            raise DataError(
                f"{where}: a mask of {region.shape} (height, width) found, expected the image's {image_hw}; resize it"
            )
        mask = region
    else:
        raise DataError(f"{where}: found {type(region).__name__}, expected Box, Point or a boolean array at image size")
    return mask


def visual_prompts(
    regions: tuple[Region, ...], image_hw: SizeHW, *, first: int = 0, where: str = ""
) -> tuple[VisualPrompt, ...]:
    """Return regions as `<Prompt{first}>`, `<Prompt{first + 1}>`, ... Raises: DataError as `region_mask`."""
    return tuple(
        VisualPrompt(prompt_id=index, mask=region_mask(region, image_hw, f"{where}prompt {index}"))
        for index, region in enumerate(regions, start=first)
    )
