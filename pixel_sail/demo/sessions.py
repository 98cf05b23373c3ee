"""Sessions of the demo: one image with its conversation each.

`server.py` keeps one `Sessions`. A session begins with an image. Its name is a random secret, so that users cannot
guess each other's. Everything is in memory, nothing on disk:

    sessions.open(image).name  ->  "Jt0Zr3...";   sessions.get("Jt0Zr3...").chat_with([Box(1, 2, 30, 40)]).ask("...")
"""

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from pixel_sail.config import DemoLimits
from pixel_sail.demo.limits import Refusal
from pixel_sail.predictor import Chat, Predictor, Region


@dataclass(kw_only=True)
class Session:
    """One image and its conversation."""

    name: str
    image: Image.Image
    predictor: Predictor
    used: float
    regions: list[Region] = field(default_factory=list)
    chat: Chat | None = None

    def chat_with(self, regions: Sequence[Region]) -> tuple[Chat, bool]:
        """Return the conversation with these regions, and whether it continues the previous one.

        Additional regions extend the conversation. If a region was changed or removed, old answers no longer apply and
        a new conversation begins. Raises: DataError for a region that cannot be marked.
        """
        same = len(regions) >= len(self.regions) and all(
            _equal(new, old) for new, old in zip(regions, self.regions, strict=False)
        )
        # Read once: another thread may call `forget` meanwhile.
        chat, marked = self.chat, len(self.regions)
        goes_on = chat is not None and same
        if chat is None or not same:
            chat = self.predictor.chat(self.image, regions)
        elif len(regions) > marked:
            chat.mark(*regions[marked:])
        self.chat, self.regions = chat, list(regions)
        return chat, goes_on

    def forget(self) -> None:
        """Start a new conversation with the next question."""
        self.chat, self.regions = None, []


def _equal(one: Region, other: Region) -> bool:
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return isinstance(one, np.ndarray) and isinstance(other, np.ndarray) and np.array_equal(one, other)
    return one == other


class Sessions:
    """All sessions, most recently used last. Thread-safe."""

    def __init__(self, predictor: Predictor, limits: DemoLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self.predictor = predictor
        self.limits = limits
        self.clock = clock
        self._all: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Return the number of images in memory."""
        return len(self._all)

    def open(self, image: Image.Image, *, replaces: str | None = None) -> Session:
        """Begin a session that replaces the user's previous one. The oldest sessions are dropped above the limit."""
        now = self.clock()
        session = Session(name=secrets.token_urlsafe(16), image=image, predictor=self.predictor, used=now)
        with self._lock:
            self._drop_idle(now)
            if replaces is not None:
                self._all.pop(replaces, None)
            while len(self._all) >= self.limits.images:
                self._all.popitem(last=False)
            self._all[session.name] = session
        return session

    def get(self, name: object) -> Session:
        """Return a session. Raises: Refusal if it does not exist any more."""
        now = self.clock()
        with self._lock:
            self._drop_idle(now)
            session = self._all.get(name) if isinstance(name, str) else None
            if session is None:
                raise Refusal(404, "This image is no longer in memory. Load it again.")
            session.used = now
            self._all.move_to_end(session.name)
        return session

    def _drop_idle(self, now: float) -> None:
        while self._all and now - next(iter(self._all.values())).used > self.limits.idle_s:
            self._all.popitem(last=False)
