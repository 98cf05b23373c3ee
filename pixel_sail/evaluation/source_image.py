"""The image that an evaluation item is about, and how it is opened.

Questions and examples of reports name a `SourceImage`; `open` returns it as the annotators saw it. An example:

    SourceImage(path=Path("data/lisa_reasoning/val/62.jpg"), size_hw=(4000, 3000), is_upright=True)

is stored as 3000 x 4000 pixels with the EXIF note to turn it. COCO's annotations count pixels as stored instead; which
of the two is meant cannot be told from the size where an image is square or upside down, so the dataset says it.
"""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pixel_sail.data.images import load_image
from pixel_sail.types import DataError, SizeHW


@dataclass(frozen=True, kw_only=True)
class SourceImage:
    """An image file and the size its annotations state."""

    path: Path
    size_hw: SizeHW
    is_upright: bool = False
    """Annotations count pixels of the image turned by its EXIF orientation, not as stored."""

    def open(self, where: str) -> Image.Image:
        """Return the RGB image. Raises: DataError when it is missing, damaged or of another size."""
        if not self.is_upright:
            return load_image(self.path, where=where, expected_hw=self.size_hw)
        image = load_image(self.path, where=where)
        if (image.height, image.width) != tuple(self.size_hw):
            raise DataError(
                f"{where}: {self.path}: the image held upright is {(image.height, image.width)} (height, width), "
                f"annotations say {tuple(self.size_hw)}; the image folder does not belong to these annotations"
            )
        return image
