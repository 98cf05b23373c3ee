"""The web server of the demo.

`scripts/demo.py` starts it. The model answers one question at a time in one thread; others wait in a queue of limited
length. Nothing is written to disk and only the files in `PAGE_FILES` are read:

    POST /api/images?replaces=...  bytes of an image          -> {"session": "Jt0Z...", "height": 427, "width": 640}
    POST /api/examples/0           {}                        -> the same
    GET  /api/images/Jt0Z...                                 -> the image, upright, as JPEG
    POST /api/ask                  see `api.py`             -> lines of JSON: {"piece": "It"} ... {"result": {...}}
    POST /api/forget               {"session": "Jt0Z..."}    -> {}; the next question begins a new conversation
"""

import asyncio
import json
import logging
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any, TypeVar

from PIL import Image
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pixel_sail.config import DemoLimits
from pixel_sail.demo.api import jpeg_bytes, read_regions, result_record
from pixel_sail.demo.limits import Refusal, check_text, decode_image, most_masks
from pixel_sail.demo.sessions import Session, Sessions
from pixel_sail.evaluation.overlay import PALETTE
from pixel_sail.model.generation import NotFiniteError
from pixel_sail.model.tokenization import SEG_TOKEN
from pixel_sail.predictor import Predictor
from pixel_sail.types import DataError

log = logging.getLogger(__name__)
T = TypeVar("T")

PAGE_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/marks.js": ("marks.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
}
"""All files of the page, by address."""

HEADERS = {
    # The page loads nothing from other sites and runs no inline scripts.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
LOCAL_NAMES = ("127.0.0.1", "localhost")
QUESTION_BYTES = 8_000_000
"""Maximum size of a question with its painted masks."""


@dataclass(frozen=True, kw_only=True)
class DemoExample:
    """An example image with a question."""

    image: Image.Image
    text: str


class _Queue:
    """The single thread that runs the model, and the number of waiting questions."""

    def __init__(self, limits: DemoLimits) -> None:
        self.limits = limits
        self.waiting = 0
        self.pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")

    def take_place(self) -> None:
        """Enter the queue; leave it with `waiting -= 1`. Raises: Refusal if it is full."""
        if self.waiting >= self.limits.waiting:
            raise Refusal(503, "Too many questions are waiting. Try again in a moment.")
        self.waiting += 1

    def lines_of(self, work: Callable[[], Iterator[T]]) -> AsyncIterator[T]:
        """Yield the values of `work`, which runs in the model's thread. Enter the queue before.

        The thread does not wait for the reader, and stops early if the reader is gone.
        """
        loop, lines, abandoned = asyncio.get_running_loop(), asyncio.Queue[T | None](), threading.Event()

        def end() -> None:
            # Before the reader sees the end, so that a client that asks again at once finds its place free.
            self.waiting -= 1
            lines.put_nowait(None)

        def run() -> None:
            try:
                for line in () if abandoned.is_set() else work():
                    loop.call_soon_threadsafe(lines.put_nowait, line)
                    if abandoned.is_set():
                        break
            finally:
                # In the event loop's thread, the only one that changes the count.
                loop.call_soon_threadsafe(end)

        async def read() -> AsyncIterator[T]:
            try:
                while (line := await lines.get()) is not None:
                    yield line
            finally:
                abandoned.set()

        self.pool.submit(run)
        reader = read()
        # If a user leaves before the first line is read, `read` never runs, not even its `finally`.
        weakref.finalize(reader, abandoned.set)
        return reader


class _AddHeaders:
    """Adds security headers to every response."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward the request."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    *((name.encode(), value.encode()) for name, value in HEADERS.items()),
                ]
            await send(message)

        await self.app(scope, receive, send_with_headers)


class _Demo:
    """Request handlers."""

    def __init__(self, predictor: Predictor, name: str, examples: Sequence[DemoExample], limits: DemoLimits) -> None:
        self.name = name
        self.examples = examples
        self.limits = limits
        self.num_prompts = predictor.batch.processor.settings.num_visual_prompts
        self.sessions = Sessions(predictor, limits)
        self.queue = _Queue(limits)
        # Few at a time: a decoded image can be a hundred times larger than its file.
        self.decoders = ThreadPoolExecutor(max_workers=2, thread_name_prefix="decode")

    async def _decoded(self, work: Callable[..., T], *arguments: Any) -> T:
        """Run `work` in another thread without blocking other requests."""
        return await asyncio.get_running_loop().run_in_executor(self.decoders, work, *arguments)

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            *(Route(address, _page(name, kind)) for address, (name, kind) in PAGE_FILES.items()),
            Route("/api/info", self.info),
            Route("/api/images", self.upload, methods=["POST"]),
            Route("/api/examples/{index}", self.example, methods=["POST"]),
            Route("/api/examples/{index}", self.example_image),
            Route("/api/images/{session}", self.image),
            Route("/api/ask", self.ask, methods=["POST"]),
            Route("/api/forget", self.forget, methods=["POST"]),
        ]

    async def info(self, request: Request) -> Response:
        """Return model name, limits and examples."""
        return JSONResponse(
            {
                "model": self.name,
                "prompts": self.num_prompts,
                "limits": asdict(self.limits),
                "examples": [example.text for example in self.examples],
                "colours": ["#{:02x}{:02x}{:02x}".format(*colour) for colour in PALETTE],
            }
        )

    async def upload(self, request: Request) -> Response:
        """Accept an uploaded image."""
        kind = _content_type(request)
        if not kind.startswith("image/") and kind != "application/octet-stream":
            raise Refusal(415, "This is not an image. Choose an image file.")
        most_mb = self.limits.upload_mb
        content = await _body(
            request, int(most_mb * 1e6), f"The file has more than {most_mb:g} MB. Choose a smaller one."
        )
        # Not in the model's thread, so that an upload does not wait for a long answer.
        image = await self._decoded(decode_image, content, self.limits)
        return self._opened(image, request)

    async def example(self, request: Request) -> Response:
        """Open one of the examples."""
        await _json(request)
        return self._opened(self._example(request).image, request)

    async def example_image(self, request: Request) -> Response:
        """Return the image of one of the examples."""
        return Response(jpeg_bytes(self._example(request).image), media_type="image/jpeg")

    def _example(self, request: Request) -> DemoExample:
        # Compared as text: int() rejects numbers with thousands of digits.
        found = {str(index): example for index, example in enumerate(self.examples)}.get(request.path_params["index"])
        if found is None:
            raise Refusal(404, "There is no such example.")
        return found

    def _opened(self, image: Image.Image, request: Request) -> Response:
        """Begin a session. `?replaces=` names the user's previous one, so that it does not displace other users'."""
        session = self.sessions.open(image, replaces=request.query_params.get("replaces"))
        size = {"height": session.image.height, "width": session.image.width}
        return JSONResponse({"session": session.name, **size})

    async def image(self, request: Request) -> Response:
        """Return an image as the model sees it: upright."""
        session = self.sessions.get(request.path_params["session"])
        content = await self._decoded(jpeg_bytes, session.image)
        return Response(content, media_type="image/jpeg")

    async def forget(self, request: Request) -> Response:
        """Start a new conversation."""
        question = await _json(request)
        session = self.sessions.get(question.get("session"))
        session.forget()
        return JSONResponse({})

    async def ask(self, request: Request) -> Response:
        """Answer a question, line by line."""
        question = await _json(request)
        session = self.sessions.get(question.get("session"))
        text = check_text(question.get("text"), self.limits)
        size_hw = (session.image.height, session.image.width)
        given = question.get("regions", [])
        asked = time.monotonic()
        # Rejected before the response starts, so that the status is correct, and before regions take memory.
        self.queue.take_place()
        try:
            regions = await self._decoded(read_regions, given, size_hw, self.num_prompts, self.limits)
        except BaseException:
            self.queue.waiting -= 1
            raise
        lines = self.queue.lines_of(lambda: self._answer(session, text, regions, asked))
        return StreamingResponse((json.dumps(line) + "\n" async for line in lines), media_type="application/x-ndjson")

    def _answer(self, session: Session, text: str, regions: list[Any], asked: float) -> Iterator[dict[str, Any]]:
        """Yield the pieces of an answer, then the result. Runs in the model's thread."""
        begun = time.monotonic()
        try:
            chat, goes_on = session.chat_with(regions)
            if len(chat.results) >= self.limits.turns:
                yield {"error": f"There were {self.limits.turns} questions about this image. Begin a new conversation."}
                return
            said, most = "", most_masks((session.image.height, session.image.width))
            for piece in chat.stream(text):
                said += piece
                # Checked before masks are made, after the last piece.
                if said.count(SEG_TOKEN) > most:
                    yield {
                        "error": f"The answer has more than {most} masks, too many for an image of this size. "
                        "Make it smaller."
                    }
                    return
                yield {"piece": piece}
                if time.monotonic() - begun > self.limits.answer_s:
                    yield {"error": f"The answer took more than {self.limits.answer_s:g} s and was stopped."}
                    return
            yield {"result": result_record(chat.results[-1], goes_on=goes_on, wait_s=begun - asked)}
        except NotFiniteError as error:
            log.error("a question could not be answered: %s", error)
            yield {"error": "The model is broken: its outputs are not finite. See the server log."}
        except DataError as error:
            yield {"error": str(error)}
        except Exception:
            log.exception("a question could not be answered")
            yield {"error": "Internal server error; see the server log. Other questions still work."}


def _page(name: str, kind: str) -> Callable[[Request], Response]:
    content = (files("pixel_sail.demo") / "page" / name).read_bytes()

    def respond(request: Request) -> Response:
        return Response(content, headers={"content-type": kind})

    return respond


async def _body(request: Request, most: int, too_long: str) -> bytes:
    """Return the body, up to a maximum length. Raises: Refusal."""
    parts, length = [], 0
    async for part in request.stream():
        length += len(part)
        if length > most:
            raise Refusal(413, too_long)
        parts.append(part)
    return b"".join(parts)


def _content_type(request: Request) -> str:
    """Return the content type of the body. Browsers send the types required here from other sites only after a CORS
    preflight, which the server does not allow."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _json(request: Request) -> dict[str, Any]:
    """Return the body as a JSON object. Raises: Refusal."""
    if _content_type(request) != "application/json":
        raise Refusal(415, "Expected a question as application/json.")
    content = await _body(request, QUESTION_BYTES, "The question with its marks is too long. Remove some.")
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, "The question is not JSON.") from error
    if not isinstance(value, dict):
        raise Refusal(400, "The question is not a JSON object.")
    return value


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return JSONResponse({"error": error.message}, status_code=error.status)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=400)


def _as_called(name: str) -> str:
    """Return a host name as in browser requests: IPv6 addresses in brackets."""
    return f"[{name}]" if ":" in name and not name.startswith("[") else name


def build_app(
    predictor: Predictor,
    *,
    name: str,
    examples: Sequence[DemoExample] = (),
    limits: DemoLimits | None = None,
    names: Sequence[str] = (),
) -> Starlette:
    """Return the application.

    names: accepted host names besides those of this machine. Others are rejected to prevent DNS rebinding, where a
    foreign page resolves its own name to this machine's address.
    """
    demo = _Demo(predictor, name, examples, limits if limits is not None else DemoLimits())
    return Starlette(
        routes=demo.routes(),
        middleware=[
            Middleware(_AddHeaders),
            Middleware(
                TrustedHostMiddleware, allowed_hosts=[*LOCAL_NAMES, *map(_as_called, names)], www_redirect=False
            ),
        ],
        exception_handlers={Refusal: _refused, ClientDisconnect: _gone},
    )
