"""Connections of slow clients are closed and do not block other clients of the demo."""

import io
import socket
import time
from contextlib import contextmanager, suppress

import httpx
import numpy as np
import pytest
from PIL import Image
from serving import served
from test_predict import predictor as batch  # noqa: F401, a fixture

from pixel_sail import Predictor
from pixel_sail.config import DemoLimits
from pixel_sail.demo.server import DemoExample
from pixel_sail.predictor import Chat

HOST = "Host: 127.0.0.1\r\n"
BODY = f"POST /api/images HTTP/1.1\r\n{HOST}Content-Type: image/png\r\nContent-Length: 1000\r\n\r\n"
SLOW = {
    "silent": "",
    "headers": f"GET / HTTP/1.1\r\n{HOST}X-Slow: ",
    "body": BODY + "a",
    # A whole request first: the next one must not have more time than the first.
    "second request": f"GET /api/info HTTP/1.1\r\n{HOST}\r\nGET / HTTP/1.1\r\nX-Slow: ",
}


@contextmanager
def connected(address, count, text):
    """Yield sockets that have sent the start of a request."""
    host, port = address.removeprefix("http://").split(":")
    opened = []
    try:
        for _ in range(count):
            opened.append(socket.create_connection((host, int(port)), timeout=10))
            opened[-1].sendall(text.encode())
        yield opened
    finally:
        for one in opened:
            one.close()


def seconds_until_ended(one, drip):
    """Return how long a connection stays open while bytes arrive slowly."""
    began = time.monotonic()
    one.settimeout(0.1)
    while time.monotonic() - began < 10:
        with suppress(TimeoutError):
            try:
                if not one.recv(65536):
                    break
            except ConnectionError:
                break
        if drip:
            with suppress(ConnectionError):
                one.sendall(b"a")
    return time.monotonic() - began


@pytest.mark.parametrize("kind", SLOW)
def test_a_request_that_exceeds_its_time_limit_is_ended(batch, kind):  # noqa: F811
    limits = DemoLimits(header_s=0.5, transfer_s=0.5)
    with served(Predictor(batch), limits=limits) as address, connected(address, 1, SLOW[kind]) as (slow,):
        assert 0.3 < seconds_until_ended(slow, drip=kind != "silent") < 4


@pytest.mark.parametrize("kind", SLOW)
def test_any_number_of_slow_clients_blocks_no_other(batch, kind):  # noqa: F811
    with served(Predictor(batch), most=8) as address, connected(address, 40, SLOW[kind]) as slow:
        for _ in range(5):
            for one in slow:
                with suppress(OSError):
                    one.sendall(b"a")
            began = time.monotonic()
            assert httpx.get(f"{address}/api/info", timeout=10).status_code == 200
            assert time.monotonic() - began < 3


def test_clients_that_do_not_read_their_answer_block_no_other(batch):  # noqa: F811
    noise = np.random.default_rng(0).integers(0, 256, (2000, 3000, 3), dtype=np.uint8)
    examples = [DemoExample(image=Image.fromarray(noise), text="a")]
    text = f"GET /api/examples/0 HTTP/1.1\r\n{HOST}\r\n"
    limits = DemoLimits(transfer_s=1.0)
    with served(Predictor(batch), most=3, examples=examples, limits=limits) as address:
        with connected(address, 7, text) as slow:
            assert httpx.get(f"{address}/api/info", timeout=20).status_code == 200
            time.sleep(1.5)
            assert any(ended_early(one) for one in slow)
        taken = httpx.get(f"{address}/api/examples/0", timeout=20)
        assert Image.open(io.BytesIO(taken.content)).size == (3000, 2000)


def ended_early(one):
    """Return whether the connection ended before the full answer was read."""
    one.settimeout(5)
    length = 0
    try:
        while part := one.recv(1 << 20):
            length += len(part)
    except (ConnectionError, TimeoutError):
        return True
    return length < 4_000_000


def test_an_answer_that_takes_long_is_no_slow_client(batch, monkeypatch):  # noqa: F811
    buffer, quick = io.BytesIO(), Chat.stream

    def stream(chat, text):
        time.sleep(1.5)
        yield from quick(chat, text)

    monkeypatch.setattr(Chat, "stream", stream)
    Image.new("RGB", (64, 48), "red").save(buffer, format="PNG")
    limits = DemoLimits(header_s=0.5, transfer_s=0.5)
    with served(Predictor(batch), limits=limits) as address, httpx.Client(base_url=address, timeout=60) as client:
        opened = client.post("/api/images", content=buffer.getvalue(), headers={"content-type": "image/png"}).json()
        said = client.post("/api/ask", json={"session": opened["session"], "text": "a", "regions": []})
        assert '"result"' in said.text.splitlines()[-1]
