"""Serve the web demo of a checkpoint.

    scripts/demo.py checkpoint=runs/quickstart predict.prompt=short      then open http://127.0.0.1:7860
    scripts/demo.py checkpoint=runs/mine precision=bf16 port=8000 limits.answer_s=30

Images and questions are kept in memory; nothing is written to disk. Stop it with Ctrl-C.
"""

import logging
import sys
from pathlib import Path

import uvicorn

from pixel_sail.cli import script_help, wants_help
from pixel_sail.config import DemoConfig, command_line_overrides, load_config
from pixel_sail.demo.connections import connection_options
from pixel_sail.demo.examples import render_examples
from pixel_sail.demo.server import build_app
from pixel_sail.entry import one_message
from pixel_sail.predictor import Predictor


@one_message
def main() -> int:
    """Serve until interrupted; wrong input ends with one message and exit status 2."""
    if wants_help(sys.argv[1:]):
        print(script_help(Path(__file__), "DemoConfig"))
        return 0
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    config = load_config("demo", DemoConfig, command_line_overrides())
    predictor = Predictor.from_pretrained(config.checkpoint, config=config.predict, precision=config.precision)
    folder = Path(config.checkpoint)
    app = build_app(
        predictor,
        # Only the last part: users need not know where models are stored.
        name=folder.parent.name if folder.name == "export" else folder.name,
        examples=render_examples(config.examples, config.predict.prompt),
        limits=config.limits,
        names=[config.host, *config.names],
    )
    uvicorn.run(
        app,
        host=config.host,
        port=config.port,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=5,
        **connection_options(config.limits),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
