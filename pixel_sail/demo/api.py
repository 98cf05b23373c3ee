"""The JSON format of requests and responses between page and server.

`server.py` parses questions and formats answers with it. A question and the last line of its answer:

    {"session": "Jt0Z...", "text": "What is <Prompt0>?", "regions": [{"box": [10, 20, 200, 180]}, {"point": [5, 7]},
     {"png": "iVBORw0K..."}]}
    {"result": {"answer": "It is [SEG].", "text": "It is.", "masks": [...], "goes_on": false, "wait_s": 0.0, ...}}
"""

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

from pixel_sail.config import DemoLimits
from pixel_sail.demo.limits import Refusal, decode_image
from pixel_sail.predictor import Region
from pixel_sail.predictor_io import Box, Point, PredictorOutput
from pixel_sail.types import BoolMask, SizeHW


def read_regions(value: object, image_hw: SizeHW, most: int, limits: DemoLimits) -> list[Region]:
    """Return the regions of a question. Raises: Refusal for invalid ones."""
    if not isinstance(value, list):
        raise Refusal(400, "The marked regions are not a list.")
    if len(value) > most:
        raise Refusal(413, f"There are {len(value)} marks, but this model knows at most {most}. Remove some.")
    return [_read_region(item, index, image_hw, limits) for index, item in enumerate(value)]


def _read_region(item: object, index: int, image_hw: SizeHW, limits: DemoLimits) -> Region:
    if isinstance(item, dict) and len(item) == 1:
        ((kind, value),) = item.items()
        if kind == "box" and _are_numbers(value, 4):
            return Box(*value)
        if kind == "point" and _are_numbers(value, 2):
            return Point(*value)
        if kind == "png" and isinstance(value, str):
            return _read_mask(value, index, image_hw, limits)
    raise Refusal(400, f"Mark {index} is not a box, point or mask of this image. Draw it again.")


def _read_mask(text: str, index: int, image_hw: SizeHW, limits: DemoLimits) -> BoolMask:
    """Return a painted mask, sent as a PNG in base64: white is marked."""
    try:
        content = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise Refusal(400, f"Mark {index} cannot be read. Draw it again.") from error
    painted = decode_image(content, limits)
    if (painted.height, painted.width) != image_hw:
        raise Refusal(400, f"Mark {index} has another size than the image. Draw it again.")
    return np.asarray(painted.convert("L")) > 127


def _are_numbers(value: object, length: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == length
        and all(isinstance(number, int | float) and not isinstance(number, bool) for number in value)
        # No image is that large, and the comparison is false for NaN.
        and all(-1e9 < number < 1e9 for number in value)
    )


def result_record(result: PredictorOutput, *, goes_on: bool, wait_s: float) -> dict[str, Any]:
    """Return an answer for the page, with the seconds that its question waited in the queue."""
    pngs = [mask_text(mask) for mask in result.masks_NHW]
    return {**result.to_json(), "pngs": pngs, "goes_on": goes_on, "wait_s": wait_s}


def jpeg_bytes(image: Image.Image) -> bytes:
    """Return an image as JPEG for the page."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=92)
    return buffer.getvalue()


def mask_text(mask: BoolMask) -> str:
    """Return a mask as a black and white PNG in base64."""
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
