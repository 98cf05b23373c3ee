"""Collects oddities of the data that do not prevent its use: logged once, listed in full by the data check.

Readers call `remark`; `evaluation/data_check.py` collects the remarks while it samples items. Otherwise the first of
each topic and file is logged, as a training run reads the same record again and again:

    remark("short polygon", "refcoco/instances.json", "annotation 12: skipped polygon 1 of 2 points")
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

STATED_AREA = "stated area"
"""Topic of the remarks about masks whose number of pixels differs from the stated area."""

AREA_TOLERANCE = 0.15
"""Largest difference, as a fraction of the stated area, without a remark."""

MIN_AREA_DIFFERENCE_PX = 30
"""Smallest difference with a remark. Area and pixels count outlines differently, which matters for small objects."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Remark:
    """One oddity."""

    topic: str
    where: str
    message: str


_HEARD: ContextVar[dict[Remark, None] | None] = ContextVar("remarks", default=None)
_logged: set[tuple[str, str]] = set()
"""Topics and files that this process has logged."""


_MOST_AREA = 1 << 60


def areas_differ(num_pixels: int, stated: float) -> bool:
    """Return whether a mask has too many or too few pixels for the area stated by a file."""
    # An integer of hundreds of digits cannot be converted to a float.
    stated = min(max(stated, -_MOST_AREA), _MOST_AREA)
    return not abs(num_pixels - stated) <= max(MIN_AREA_DIFFERENCE_PX, AREA_TOLERANCE * abs(stated))


def remark(topic: str, file: str, where: str, message: str) -> None:
    """Add a remark to the collection, or log the first of this topic about this file or folder."""
    heard = _HEARD.get()
    if heard is not None:
        heard[Remark(topic=topic, where=where, message=message)] = None
    elif (topic, file) not in _logged:
        _logged.add((topic, file))
        logger.warning("%s: %s; further ones are not logged, use tools/check_data.py to list them", where, message)


@contextmanager
def collect_remarks() -> Iterator[dict[Remark, None]]:
    """Collect the remarks made inside the block, without repeats."""
    heard: dict[Remark, None] = {}
    token = _HEARD.set(heard)
    try:
        yield heard
    finally:
        _HEARD.reset(token)
