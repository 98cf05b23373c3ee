"""Connection timeouts of the demo, so that slow clients cannot block others.

`scripts/demo.py` passes `connection_options` to uvicorn, which creates one object per connection. Uvicorn rejects
requests above a limit of open connections, so a few dozen slow clients could block the demo. Here every phase of a
connection has a timeout. If there are too many connections, the one that has kept the server waiting longest is closed:

    phase       what the server waits for                  ends after
    headers     the first, or the next, request            limits.header_s
    body        the rest of it, such as an image            limits.transfer_s
    reading     that the client takes what was sent        limits.transfer_s
    answer      the model, not the client                  (see limits.answer_s)
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from pixel_sail.config import DemoLimits

MOST_CONNECTIONS = 64


class _Connection(H11Protocol):
    """One connection."""

    limits: DemoLimits
    most: int

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._phase = ""
        self._since = 0.0
        self._is_ended = False
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timeout, and close the slowest connection if there are too many."""
        super().connection_made(transport)
        self._enter("headers")
        others = [one for one in self.connections if isinstance(one, _Connection) and not one._is_ended]
        if len(others) > self.most:
            waiting = [one for one in others if one is not self and one.awaits() != "answer"]
            if waiting:
                min(waiting, key=lambda one: one._since).end()

    def data_received(self, data: bytes) -> None:
        """Process received data and update the phase."""
        super().data_received(data)
        if (phase := self.awaits()) != self._phase:
            self._enter(phase)

    def pause_writing(self) -> None:
        """Start the timeout for a client that does not read the response."""
        super().pause_writing()
        self._enter("reading")

    def resume_writing(self) -> None:
        """Update the phase after the client reads again."""
        super().resume_writing()
        self._enter(self.awaits())

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the timeout."""
        super().connection_lost(exc)
        self._is_ended = True
        self._enter("answer")

    def end(self) -> None:
        """Close immediately and discard unsent data."""
        self._is_ended = True
        self.transport.abort()

    def awaits(self) -> str:
        """Return the phase, see the module docstring."""
        if self.flow.write_paused or self.transport.is_closing():
            return "reading"
        if self.cycle is None or self.cycle.response_complete:
            return "headers"
        return "body" if self.cycle.more_body else "answer"

    def _enter(self, phase: str) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._phase, self._since, self._timer = phase, self.loop.time(), None
        seconds = {"headers": self.limits.header_s, "answer": None}.get(phase, self.limits.transfer_s)
        if seconds is not None:
            self._timer = self.loop.call_later(seconds, self._give_up)

    def _give_up(self) -> None:
        """Close unless the request arrived meanwhile. A complete request changes the phase with its last bytes."""
        if self.awaits() == self._phase:
            self.end()


def connection_options(limits: DemoLimits, most: int = MOST_CONNECTIONS) -> dict[str, Any]:
    """Return the uvicorn options that install these connections."""
    own = type("Connection", (_Connection,), {"limits": limits, "most": most})
    # Uvicorn's own limit covers questions that wait for the model and connections that are closing.
    return {"http": own, "limit_concurrency": 2 * most}
