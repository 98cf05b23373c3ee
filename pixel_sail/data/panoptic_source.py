"""Base class of the training sources over a panoptic file: selects the usable images and names their samples.

`coco_panoptic`, `coco_semantic`, `coco_vp`, `pix2cap_seg` and `pix2cap_vp` extend it with their turns. The first sample
of COCO is Sample(sample_id="coco_vp/train2017/image=9", ...).
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from pixel_sail.data.panoptic import PanopticFile, PanopticImage, Segment
from pixel_sail.types import DataError, Sample, Turn


class PanopticSource:
    """A source over a panoptic file: one item per image with usable segments."""

    def __init__(
        self,
        file: PanopticFile,
        *,
        name: str,
        split: str,
        has_content: Callable[[Sequence[Segment]], bool],
        content: str,
    ) -> None:
        """Select the images, see `PanopticFile.usable`. Raises: DataError."""
        self.name = name
        self._file = file
        self._split = split
        self._numbers = file.usable(has_content, source=name, content=content)

    def __len__(self) -> int:
        """Return the number of usable images."""
        return len(self._numbers)

    def image_path(self, index: int) -> Path:
        """Return the image path of an item."""
        return self._image(index).image_path

    def _image(self, index: int) -> PanopticImage:
        """Return the record of an item. Raises: DataError."""
        return self._file.image(int(self._numbers[index]))

    def _sample_id(self, image: PanopticImage) -> str:
        return f"{self.name}/{self._split}/image={image.image_id}"

    def _sample(self, image: PanopticImage, turns: Sequence[Turn]) -> Sample:
        """Return the sample of an image with these turns."""
        return Sample(
            sample_id=self._sample_id(image),
            source=self.name,
            image_path=image.image_path,
            image_hw=image.image_hw,
            turns=tuple(turns),
        )


def check_at_least(source: str, smallest: int, **settings: int) -> None:
    """Raise DataError with the first setting of a source that is too small."""
    for setting, value in settings.items():
        if value < smallest:
            raise DataError(
                f"source {source}: found {setting} {value}, expected at least {smallest}; correct the config"
            )
