"""Limits on inputs of the demo.

`server.py` checks uploads and texts, `sessions.py` the number of images. A `Refusal` is an HTTP status and one sentence
that the page shows:

    Refusal(413, "The file has more than 20 MB. Choose a smaller one.")
"""

import io
import warnings

from PIL import Image, UnidentifiedImageError

from pixel_sail.config import DemoLimits
from pixel_sail.data.images import open_image, rgb_image
from pixel_sail.types import DataError, SizeHW

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""Accepted formats. Pillow's others are not tried, since some of them start programs."""


MOST_SIDE_PX = 65_500
"""Maximum side of a JPEG (libjpeg). Images are shown as JPEG."""

MOST_MASK_PX = 200_000_000
"""Maximum number of pixels of all masks of an answer, at about 12 bytes each. Otherwise a model that repeats [SEG]
could exhaust memory."""


class Refusal(Exception):
    """A rejected request."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


def decode_image(content: bytes, limits: DemoLimits) -> Image.Image:
    """Return uploaded bytes as an upright RGB image. Raises: Refusal unless it is an image within limits."""
    if not content:
        raise Refusal(400, "The file is empty. Choose an image.")
    try:
        with warnings.catch_warnings():
            # Pillow warns about large images. Here the size is checked before decoding.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = open_image(io.BytesIO(content), FORMATS)
    except Image.DecompressionBombError as error:
        raise Refusal(413, f"The image has more than {limits.megapixels:g} million pixels. Make it smaller.") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError) as error:
        raise Refusal(415, f"This is not a readable image. Expected one of {', '.join(FORMATS)}.") from error
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
    """Return the maximum number of masks of an answer about an image of this size, at least one."""
    return max(1, MOST_MASK_PX // (image_hw[0] * image_hw[1]))


def check_text(text: object, limits: DemoLimits) -> str:
    """Return the text of a question. Raises: Refusal for a wrong type or a text that is too long."""
    if not isinstance(text, str) or not text.strip():
        raise Refusal(400, "There is no question. Type one.")
    if len(text) > limits.text_characters:
        raise Refusal(413, f"The question has {len(text)} characters. Use at most {limits.text_characters}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refusal(400, "The question contains an invalid character. Type it again.") from error
    return text.strip()
