"""Load-test the demo with several users, first one at a time, then concurrently: latency, errors and memory.

Starts `scripts/demo.py` with a checkpoint and sends the requests that its page sends. Every user loads a synthetic
scene, asks about it, marks a region, asks again, and loads the next. One line of the table:

    at once     412 questions   0 errors   latency 0.31 s median, 0.62 s in 19 of 20, 0.94 s at most

    python tools/bench_demo.py checkpoint=runs/quickstart predict.prompt=short
    python tools/bench_demo.py --users 4 --minutes 5 --json FILE checkpoint=runs/quickstart
"""

import argparse
import io
import json
import re
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from pixel_sail.demo.examples import render_examples
from pixel_sail.entry import one_message
from pixel_sail.files import replace_text
from pixel_sail.paths import root_folder

NUM_SCENES = 8
BOX = {"box": [10, 10, 60, 60]}
MEMORY_EVERY_S = 1.0


@dataclass
class Log:
    """Results so far. Several threads append to the lists."""

    latencies_s: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


@contextmanager
def started_demo(overrides: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Yield the address and process number of a demo. Raises: SystemExit with its output if it does not start."""
    command = [sys.executable, str(root_folder() / "scripts" / "demo.py"), "port=0", *overrides]
    demo = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert demo.stderr is not None
    said = []
    try:
        for line in demo.stderr:
            said.append(line)
            if found := re.search(r"running on (http://\S+)", line):
                break
        else:
            raise SystemExit("".join(said))
        # Keep reading, otherwise the demo blocks on a full pipe.
        threading.Thread(target=demo.stderr.read, daemon=True).start()
        yield found[1], demo.pid
    finally:
        demo.terminate()
        demo.wait()


def talk(address: str, user: int, until: float, turn: AbstractContextManager[object], log: Log) -> None:
    """Load scenes and ask, each time when it is the user's turn, until the time is over."""
    scenes = render_examples(NUM_SCENES, "short")
    with httpx.Client(base_url=address, timeout=120) as client:
        number, session = user, ""
        while time.monotonic() < until:
            scene = scenes[number % NUM_SCENES]
            number += 1
            buffer = io.BytesIO()
            scene.image.resize((640, 480), Image.Resampling.BICUBIC).save(buffer, format="JPEG")
            loaded = client.post(
                f"/api/images?replaces={session}", content=buffer.getvalue(), headers={"content-type": "image/jpeg"}
            )
            if loaded.status_code != 200:
                log.errors.append(loaded.text)
                continue
            session = loaded.json()["session"]
            for text, regions in ((scene.text, []), ("the star", []), ("what is <Prompt0>", [BOX])):
                with turn:
                    ask(client, {"session": session, "text": text, "regions": regions}, log)


def ask(client: httpx.Client, question: dict[str, Any], log: Log) -> None:
    """Ask once, and record the latency or the error."""
    begun = time.monotonic()
    response = client.post("/api/ask", json=question)
    lines = response.text.splitlines()
    if response.status_code == 200 and lines and "result" in json.loads(lines[-1]):
        log.latencies_s.append(time.monotonic() - begun)
    else:
        log.errors.append(response.text)


def run_users(address: str, users: int, seconds: float, *, at_once: bool) -> Log:
    """Return the results of several users."""
    log, until = Log(), time.monotonic() + seconds
    turn: AbstractContextManager[object] = nullcontext() if at_once else threading.Lock()
    threads = [threading.Thread(target=talk, args=(address, user, until, turn, log)) for user in range(users)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return log


def resident_mb(pid: int) -> float:
    """Return the memory that a process holds, in millions of bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def summary(log: Log) -> dict[str, Any]:
    """Return counts and latencies in seconds."""
    times = sorted(log.latencies_s)
    return {
        "questions": len(times),
        "errors": len(log.errors),
        "first_error": log.errors[0] if log.errors else None,
        "median_s": statistics.median(times) if times else None,
        "p95_s": times[int(0.95 * (len(times) - 1))] if times else None,
        "max_s": times[-1] if times else None,
    }


@one_message
def main() -> int:
    """Print the table; exit status 1 if a question failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument(
        "--minutes", type=float, default=5.0, help="total time: one half sequential, one half concurrent"
    )
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument(
        "overrides", nargs="+", help="overrides of scripts/demo.py, for example checkpoint=runs/quickstart"
    )
    arguments = parser.parse_args()
    half_s = 30 * arguments.minutes
    memory_mb: list[float] = []
    with started_demo(arguments.overrides) as (address, pid):
        # Warm up: the first question includes one-time setup.
        run_users(address, 1, 1.0, at_once=True)
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(MEMORY_EVERY_S):
                memory_mb.append(resident_mb(pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        results = {
            "in turn": summary(run_users(address, arguments.users, half_s, at_once=False)),
            "at once": summary(run_users(address, arguments.users, half_s, at_once=True)),
        }
        ended.set()
        watcher.join()
    for name, result in results.items():
        print(f"{name:<10} {result['questions']:5d} questions   {result['errors']} errors   ", end="")
        if result["questions"]:
            print("latency {median_s:.2f} s median, {p95_s:.2f} s in 19 of 20, {max_s:.2f} s at most".format(**result))
        else:
            print(f"first error: {result['first_error']}")
    quarter = max(1, len(memory_mb) // 4)
    quarters = [statistics.fmean(memory_mb[start : start + quarter]) for start in range(0, 4 * quarter, quarter)]
    print("memory of the server, mean of each quarter of the time: " + ", ".join(f"{mb:.0f} MB" for mb in quarters))
    if arguments.json:
        replace_text(arguments.json, json.dumps({**results, "memory_mb": quarters}, indent=1) + "\n")
    return int(any(result["errors"] for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
