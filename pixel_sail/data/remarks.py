"""What is odd in the data and can be used all the same: told once in the log, listed in full by the data check.

Readers call `remark`; `evaluation/data_check.py` listens while it samples items. Without a listener a line goes to the
log for the first of each topic and file, as a training run reads the same record again and again:

    remark("short polygon", "refcoco/instances.json", "annotation 12: left out polygon 1 of 2 points")
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

STATED_AREA = "stated area"
"""Topic of the remarks about masks whose pixels are not those of the area beside them."""

AREA_TOLERANCE = 0.15
"""Largest difference, as a fraction of the stated area, that is not remarked."""

MIN_AREA_DIFFERENCE_PX = 30
"""Differences below are not remarked: of small objects much is outline, which area and pixels count differently."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Remark:
    """One odd thing."""

    topic: str
    where: str
    message: str


_HEARD: ContextVar[dict[Remark, None] | None] = ContextVar("remarks", default=None)
_logged: set[tuple[str, str]] = set()
"""Topics and files of this process that the log knows."""


_MOST_AREA = 1 << 60


def areas_differ(num_pixels: int, stated: float) -> bool:
    """Say whether the pixels of a mask are too many or too few for the area a file states."""
    # A number of hundreds of digits does not become a float.
    stated = min(max(stated, -_MOST_AREA), _MOST_AREA)
    return not abs(num_pixels - stated) <= max(MIN_AREA_DIFFERENCE_PX, AREA_TOLERANCE * abs(stated))


def remark(topic: str, file: str, where: str, message: str) -> None:
    """Pass on a remark to whoever listens, else log the first of this topic about this file or folder."""
    heard = _HEARD.get()
    if heard is not None:
        heard[Remark(topic=topic, where=where, message=message)] = None
    elif (topic, file) not in _logged:
        _logged.add((topic, file))
        logger.warning("%s: %s; further ones are not logged, tools/check_data.py lists them", where, message)


@contextmanager
def collect_remarks() -> Iterator[dict[Remark, None]]:
    """Collect what is remarked inside the block, each thing once."""
    heard: dict[Remark, None] = {}
    token = _HEARD.set(heard)
    try:
        yield heard
    finally:
        _HEARD.reset(token)
