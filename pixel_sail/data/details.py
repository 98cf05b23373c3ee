"""Checks the options in which training data can follow the release or this project's defaults.

The `load` of a source calls `is_released` for each such option. The configs in `configs/source/` set all of them to
`${data.details}`, so `data.details=released` switches all and

    data.sources.coco_vp.candidates=released

one. From Python, an option not given is `ours`.
"""

from pixel_sail.types import DataError

OURS, RELEASED = "ours", "released"
DETAIL_CHOICES = (OURS, RELEASED)


def is_released(source: str, option: str, value: str) -> bool:
    """Return whether an option selects the released behavior. Raises: DataError for an unknown value."""
    if value not in DETAIL_CHOICES:
        raise DataError(
            f"source {source}: found {option} {value!r}, expected one of {DETAIL_CHOICES}; correct the config"
        )
    return value == RELEASED
