"""Details of the training data in which this project differs from the release, each an option of the source it is of.

The `load` of a source calls `is_released` for each such option; the files of `configs/source/` set all of them to
`${data.details}`, so that `data.details=released` switches all and

    data.sources.coco_vp.candidates=released

one. Called from Python without the option, a source does what it does by default, `ours`.
"""

from pixel_sail.types import DataError

OURS, RELEASED = "ours", "released"
DETAIL_CHOICES = (OURS, RELEASED)


def is_released(source: str, option: str, value: str) -> bool:
    """Say whether an option of a source asks for what the release does. Raises: DataError for an unknown value."""
    if value not in DETAIL_CHOICES:
        raise DataError(
            f"source {source}: found {option} {value!r}, expected one of {DETAIL_CHOICES}; correct the config"
        )
    return value == RELEASED
