"""What the demo accepts, and how it refuses the rest.

`server.py` checks bytes and texts with it, `sessions.py` the number of images. A refusal is an HTTP status and one
sentence that the page shows as it is:

    Refusal(413, "The file has more than 20 MB. Choose a smaller one.")
"""

import io
import warnings

from PIL import Image, UnidentifiedImageError

from pixel_sail.config import DemoLimits
from pixel_sail.data.images import open_image, rgb_image
from pixel_sail.types import DataError, SizeHW

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""Formats that are read; others of Pillow's, some of which start programs, are not even tried."""


MOST_SIDE_PX = 65_500
"""Longest side of a JPEG that can be written, as which images are shown (libjpeg)."""

MOST_MASK_PX = 200_000_000
"""Pixels of all masks of an answer: each needs about 12 bytes while they are made. A model that says [SEG] over and
over about a large image would fill the memory."""


class Refusal(Exception):
    """What a user asked for and does not get."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


def decode_image(content: bytes, limits: DemoLimits) -> Image.Image:
    """Return uploaded bytes as an upright RGB image. Raises: Refusal for what is no image within limits."""
    if not content:
        raise Refusal(400, "The file is empty. Choose an image.")
    try:
        with warnings.catch_warnings():
            # Pillow warns of large images; here their size is checked before a pixel is decoded.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = open_image(io.BytesIO(content), FORMATS)
    except Image.DecompressionBombError as error:
        raise Refusal(413, f"The image has more than {limits.megapixels:g} million pixels. Make it smaller.") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError) as error:
        raise Refusal(415, f"This is no image that can be read. Expected one of {', '.join(FORMATS)}.") from error
    width, height = opened.size
    if width * height > limits.megapixels * 1e6:
        raise Refusal(
            413, f"The image has {width} x {height} pixels, more than {limits.megapixels:g} million. Make it smaller."
        )
    if max(width, height) > MOST_SIDE_PX:
        raise Refusal(413, f"The image has {width} x {height} pixels, a side of more than {MOST_SIDE_PX}. Cut it.")
    try:
        return rgb_image(opened, where="The image")
    except DataError as error:
        raise Refusal(415, "The image is damaged and cannot be decoded. Choose another one.") from error


def most_masks(image_hw: SizeHW) -> int:
    """Return how many masks an answer about an image of this size may have, one at least."""
    return max(1, MOST_MASK_PX // (image_hw[0] * image_hw[1]))


def check_text(text: object, limits: DemoLimits) -> str:
    """Return the text of a question. Raises: Refusal for another type, and for one that is too long."""
    if not isinstance(text, str) or not text.strip():
        raise Refusal(400, "There is no question. Type one.")
    if len(text) > limits.text_characters:
        raise Refusal(413, f"The question has {len(text)} characters. Use at most {limits.text_characters}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refusal(400, "The question holds a broken character. Type it anew.") from error
    return text.strip()
