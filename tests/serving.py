"""Run the demo's server for tests that send it the requests of a browser."""

import threading
import time
from contextlib import contextmanager

import uvicorn

from pixel_sail.config import DemoLimits
from pixel_sail.demo.connections import MOST_CONNECTIONS, connection_options
from pixel_sail.demo.server import build_app


@contextmanager
def served(predictor, *, most=MOST_CONNECTIONS, **settings):
    """Yield the address of a server on a free port; it is stopped at the end of the block."""
    app = build_app(predictor, name="test", **settings)
    options = connection_options(settings.get("limits") or DemoLimits(), most)
    config = uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=5, **options)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
