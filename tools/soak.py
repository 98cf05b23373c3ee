"""Soak test: train a tiny model for many steps, optionally with kills, and check for leaks and leftovers.

    python tools/soak.py --steps 2000 --json soak.json
    python tools/soak.py --steps 240 --kills 20 --every 8 --validate-every 0 --json kills.json
    python tools/soak.py --steps 400 --launcher torchrun deepspeed=zero2

Renders RefShapes into the work folder, then starts `scripts/train.py` with validation, checkpoints, TensorBoard and the
log, and samples the memory of all its processes every second. Checks at the end:

* memory: for each process that lived long enough, a line is fitted to its resident memory (RSS from /proc) in the
second
  half of its life; the growth along that line must be below --max-growth-mb;
* files: no working folders or temporary files in the run folder, in the run's own TMPDIR or in /dev/shm;
* processes: none of the run is left 20 seconds after its end;
* checkpoints: the configured number is kept, each with the hashes of its manifest;
* with --kills K: the run is killed (SIGKILL) and restarted K times, at random points that depend on the seed: at a log
  line, at the first bytes of a checkpoint, at its renaming, at the deletion of an old one, and during startup. Half of
  the kills hit only the trainer, the others also its data workers. The log's metrics and the exported weights must
  equal those of the same run without kills, which is trained first.

Other arguments are overrides of scripts/train.py. Exit status 0 if all checks pass, else 1.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pixel_sail.dist import free_port
from pixel_sail.renamed import current_log_line
from pixel_sail.training.log import TIMING_FIELDS

ROOT = Path(__file__).resolve().parent.parent
MARK = "PIXEL_SAIL_SOAK"
"""Environment variable that identifies every process of a run, orphans included."""

TINY_RUN = (
    *("experiment=quickstart", "model.architecture.hidden_size=32", "model.architecture.intermediate_size=64"),
    *("model.architecture.num_hidden_layers=2", "model.architecture.mask_dim=16"),
    *("data.sources.refshapes.expressions_per_image=3", "data.sources.groupshapes.expressions_per_image=2"),
    *("data.packing.max_samples=0", "data.packing.seq_len=256", "data.packing.packing_buffer=3"),
    *("data.global_batch_size=4", "data.micro_batch_size=2", "data.num_workers=1", "loss.points.num_points=64"),
    *("log.every=1", "log.progress=false", "validation.max_images=2"),
)

NOT_COMPARED = (*TIMING_FIELDS, "data/padding_fraction")
"""Metrics of a log line that may depend on when a run was stopped."""

KILL_POINTS = ("line", "writing", "renamed", "deleting", "start")


@dataclass(kw_only=True)
class Watched:
    """Memory samples of the processes of a run: per process its command and (second, RSS in MB)."""

    names: dict[int, str] = field(default_factory=dict)
    samples: dict[int, list[tuple[float, float]]] = field(default_factory=dict)

    def look(self, mark: str, since: float) -> None:
        """Read the memory of all processes of the run once."""
        for pid in marked_processes(mark):
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            except (OSError, IndexError):  # it ended between the two reads
                continue
            self.names.setdefault(pid, command.strip())
            megabytes = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
            self.samples.setdefault(pid, []).append((time.monotonic() - since, megabytes))

    def memory(self, shortest_s: float) -> list[dict[str, Any]]:
        """Return the memory of every process that lived at least `shortest_s` seconds."""
        return [
            {"pid": pid, "command": self.names[pid][:60], **half_life_growth(samples)}
            for pid, samples in self.samples.items()
            if samples[-1][0] - samples[0][0] >= shortest_s
        ]


def half_life_growth(samples: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Return statistics of the memory of a process in the second half of its life, from (second, MB)."""
    seconds, megabytes = np.array(samples).T
    second_half = seconds >= (seconds[0] + seconds[-1]) / 2
    slope = float(np.polyfit(seconds[second_half], megabytes[second_half], 1)[0])
    span = float(seconds[second_half][-1] - seconds[second_half][0])
    return {
        "seconds": round(float(seconds[-1] - seconds[0]), 1),
        "mb_at_half": round(float(megabytes[second_half][0]), 1),
        "mb_at_end": round(float(megabytes[-1]), 1),
        "mb_peak": round(float(megabytes.max()), 1),
        "mb_per_hour": round(slope * 3600, 2),
        "growth_mb": round(slope * span, 2),
        "mb_at_tenths": [round(float(part[-1]), 1) for part in np.array_split(megabytes, 10)],
    }


def marked_processes(mark: str) -> list[int]:
    """Return the processes with the mark of this run in their environment."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                if f"{MARK}={mark}".encode() in (path / "environ").read_bytes().split(b"\0"):
                    found.append(int(path.name))
            except OSError:  # gone, or another user's
                continue
    return sorted(found)


def make_data(root: Path) -> None:
    """Render a small benchmark and its tokenizer, once."""
    if (root / "refshapes" / "tokenizer").is_dir():
        return
    from pixel_sail.data.sources.refer import expressions, load_refer
    from pixel_sail.model.tokenization import train_tokenizer
    from pixel_sail.refshapes import RefShapesSpec, write_refshapes

    write_refshapes(root / "refshapes", RefShapesSpec(seed=3, num_train=20, num_eval=3), num_workers=1)
    texts = [item.text for item in expressions(load_refer(root / "refshapes", "refshapes", "train"))]
    train_tokenizer(texts, vocab_size=400, num_visual_prompts=15).save_pretrained(str(root / "refshapes" / "tokenizer"))


def command_line(arguments: argparse.Namespace, run_dir: Path) -> list[str]:
    """Return the command that trains into `run_dir`."""
    start = [sys.executable]
    if arguments.launcher == "torchrun":
        start = [*start, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={arguments.port}"]
    own = [f"optim.steps={arguments.steps}", f"checkpoint.every={arguments.every}", f"run_dir={run_dir}"]
    validation = [f"validation.every={arguments.validate_every}"]
    if not arguments.validate_every:
        validation += ["evals=[]"]
    sharding = ["deepspeed=none"] if arguments.launcher == "python" else []
    return [*start, "scripts/train.py", *TINY_RUN, *own, *validation, *sharding, *arguments.overrides]


def temporary_folder(work: Path) -> Path:
    """Return the TMPDIR of the sessions in a work folder. Its name is short, because data workers put sockets there,
    and their paths are limited to 107 characters."""
    return Path(tempfile.gettempdir()) / f"soak_{hashlib.sha256(str(work.resolve()).encode()).hexdigest()[:8]}"


class RunProcess:
    """One start of the run: the process and its output file."""

    def __init__(self, command: Sequence[str], work: Path, mark: str) -> None:
        self.temporary = temporary_folder(work)
        self.temporary.mkdir(exist_ok=True)
        # One thread: results are compared bit for bit, and two threads on busy cores mostly wait for each other.
        own = {MARK: mark, "PIXEL_SAIL_DATA": str(work / "data"), "TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1"}
        environment = os.environ | own | {"TOKENIZERS_PARALLELISM": "false"}
        self.output = work / "output.txt"
        with self.output.open("a") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def is_running(self) -> bool:
        """Return whether the trainer is running."""
        return self.process.poll() is None

    def kill(self, *, alone: bool) -> None:
        """Send SIGKILL to the trainer or to its process group; orphaned data workers must end by themselves."""
        send = os.kill if alone else os.killpg
        send(self.process.pid, signal.SIGKILL)
        self.process.wait()


def finish(session: RunProcess, mark: str, watched: Watched, since: float, timeout_s: float) -> None:
    """Sample the memory every second until the run ends. Raises: RuntimeError if it fails or times out."""
    deadline = time.monotonic() + timeout_s
    while session.is_running:
        if time.monotonic() > deadline:
            session.kill(alone=False)
            raise RuntimeError(f"the run did not end within {timeout_s:.0f} s; {session.output}")
        watched.look(mark, since)
        time.sleep(1.0)
    if session.process.returncode:
        raise RuntimeError(
            f"exit status {session.process.returncode}: {session.output.read_text(errors='replace')[-2000:]}"
        )


def wait_for_kill_point(session: RunProcess, run_dir: Path, point: str, line: int, chance: random.Random) -> bool:
    """Wait until the run reaches the point of the kill; return False if it ended before."""
    if point == "start":
        return sleep_while_running(session, chance.uniform(0.2, 6.0))
    log, checkpoints = run_dir / "log.jsonl", run_dir / "checkpoints"
    while session.is_running and num_lines(log) < line:
        time.sleep(0.01)
    if point == "line":
        return sleep_while_running(session, chance.uniform(0.0, 0.3))
    before = set(names_in(checkpoints))
    size = int(chance.expovariate(1 / 100_000))
    while session.is_running:
        now = names_in(checkpoints)
        if point == "writing" and any(folder_bytes(checkpoints / name) >= size for name in now if "writing" in name):
            break
        if point == "renamed" and any(name.startswith("step_") for name in set(now) - before):
            break
        if point == "deleting" and any("deleting" in name for name in now):
            break
        time.sleep(0.0002)
    return session.is_running


def sleep_while_running(session: RunProcess, seconds: float) -> bool:
    """Sleep, and return whether the run is still running."""
    time.sleep(seconds)
    return session.is_running


def num_lines(path: Path) -> int:
    """Return the number of lines of a file, 0 if it does not exist."""
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def names_in(folder: Path) -> list[str]:
    """Return the names in a folder, none if it does not exist."""
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def folder_bytes(folder: Path) -> int:
    """Return the bytes in the files of a folder, -1 if it was renamed meanwhile."""
    try:
        return sum(entry.stat().st_size for entry in os.scandir(folder))
    except FileNotFoundError:
        return -1


def train_with_kills(arguments: argparse.Namespace, work: Path, mark: str, watched: Watched) -> list[dict[str, Any]]:
    """Train with repeated kills; return the point of each kill."""
    chance, run_dir = random.Random(arguments.seed), work / "run"
    lines = sorted(chance.randint(1, arguments.steps - arguments.every) for _ in range(arguments.kills))
    kills: list[dict[str, Any]] = []
    since = time.monotonic()
    for index, line in enumerate(lines):
        point, alone = KILL_POINTS[index % len(KILL_POINTS)], chance.random() < 0.5
        session = RunProcess(command_line(arguments, run_dir), work, mark)
        if not wait_for_kill_point(session, run_dir, point, line, chance):
            status = session.process.wait()
            raise RuntimeError(f"kill {index} ({point}): the run had ended with {status}; {session.output}")
        session.kill(alone=alone)
        left = sorted(names_in(run_dir / "checkpoints"))
        kills.append({"point": point, "trainer_alone": alone, "lines": num_lines(run_dir / "log.jsonl"), "left": left})
        print(f"kill {index + 1}: {kills[-1]}", flush=True)
    session = RunProcess(command_line(arguments, run_dir), work, mark)
    finish(session, mark, watched, since, arguments.timeout_s)
    return kills


def comparable(run_dir: Path) -> list[dict[str, float]]:
    """Return the metrics of every log line that do not depend on the clock."""
    lines = [current_log_line(json.loads(line)) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in NOT_COMPARED} for line in lines]


def differences(killed: Path, whole: Path) -> list[str]:
    """Return the differences between a killed run and the one without kills."""
    found = []
    lines, expected = comparable(killed), comparable(whole)
    if len(lines) != len(expected):
        found.append(f"{len(lines)} log lines, expected {len(expected)}")
    for line, other in zip(lines, expected, strict=False):
        if line != other:
            found.append(f"first differing log line: {line}, expected {other}")
            break
    if sha256(killed / "export" / "model.safetensors") != sha256(whole / "export" / "model.safetensors"):
        found.append("exported weights differ")
    return found


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def leftover_files(run_dir: Path, temporary: Path, shared_before: set[str], *, kills: int, port: int) -> list[str]:
    """Return temporary files of the run folder and TMPDIR, and new files in /dev/shm that no process maps.

    A killed data worker cannot remove its socket: Python leaves one empty `pymp-*` folder per worker in TMPDIR. A
    worker killed between creating and unlinking a block of shared memory leaves the block. As many of each as there
    were kills are allowed. DeepSpeed's buffers contain the port of their run, so those of other runs on the machine are
    not counted.
    """
    from pixel_sail.training.run_lock import LOCK_FILE

    left = [str(path) for path in run_dir.rglob("*") if path.name.startswith((".", "tmp")) or path.suffix == ".tmp"]
    left.remove(str(run_dir / LOCK_FILE))  # remains, without effect once its holder has ended
    # torch creates one empty compiler cache folder per user.
    names = [name for name in names_in(temporary) if not name.startswith("torchinductor_")]
    sockets = [name for name in names if name.startswith("pymp-")]
    left += [str(temporary / name) for name in names if name not in sockets[:kills]]
    own_buffer = re.compile(rf"_{port}_\d+$")
    new = sorted(
        name
        for name in set(names_in(Path("/dev/shm"))) - shared_before
        if not name.startswith("deepspeed_") or own_buffer.search(name)
    )
    blocks = [name for name in new if name.startswith("torch_") and not is_mapped(f"/dev/shm/{name}")]
    others = [name for name in new if not name.startswith("torch_") and not is_mapped(f"/dev/shm/{name}")]
    return left + [f"/dev/shm/{name}" for name in (*others, *blocks[kills:])]


def is_mapped(path: str) -> bool:
    """Return whether a running process maps a file: other programs use /dev/shm, too."""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            if path in maps.read_text(errors="replace"):
                return True
        except OSError:  # gone, or another user's
            continue
    return not Path(path).exists()


def checkpoint_faults(folder: Path, keep: int) -> list[str]:
    """Return errors in the checkpoints of a finished run."""
    names = sorted(names_in(folder))
    found = [] if len(names) == keep else [f"{names}, expected {keep} checkpoints"]
    for name in names:
        manifest = json.loads((folder / name / "manifest.json").read_text())
        found += [
            f"{name}/{file}: another hash" for file, own in manifest.items() if sha256(folder / name / file) != own
        ]
    return found


def processes_left(mark: str, patience_s: float = 20.0) -> list[int]:
    """Return the processes of the run that have not ended by themselves."""
    deadline = time.monotonic() + patience_s
    while (left := marked_processes(mark)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return left


def soak(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Run the test and return all results; `faults` is empty if all checks pass."""
    mark, watched = uuid.uuid4().hex, Watched()
    make_data(work / "data")
    shared_before = set(names_in(Path("/dev/shm")))
    faults: list[str] = []
    kills: list[dict[str, Any]] = []
    since = time.monotonic()
    if arguments.kills:
        finish(
            RunProcess(command_line(arguments, work / "whole"), work, mark), mark, Watched(), since, arguments.timeout_s
        )
        kills = train_with_kills(arguments, work, mark, watched)
        faults += differences(work / "run", work / "whole")
    else:
        session = RunProcess(command_line(arguments, work / "run"), work, mark)
        finish(session, mark, watched, since, arguments.timeout_s)
    seconds = time.monotonic() - since
    left_processes = processes_left(mark)
    faults += [f"process {pid} is left: {watched.names.get(pid)}" for pid in left_processes]
    temporary = temporary_folder(work)
    left_files = leftover_files(work / "run", temporary, shared_before, kills=len(kills), port=arguments.port)
    faults += [f"left: {path}" for path in left_files]
    shutil.rmtree(temporary)
    faults += checkpoint_faults(work / "run" / "checkpoints", keep=2)
    memory = watched.memory(shortest_s=30.0)
    faults += [f"memory grows: {row}" for row in memory if row["growth_mb"] > arguments.max_growth_mb]
    during_a_save = sum(any(name.startswith(".") for name in kill["left"]) for kill in kills)
    return {
        "steps": arguments.steps,
        "log_lines": num_lines(work / "run" / "log.jsonl"),
        "seconds": round(seconds, 1),
        "kills": kills,
        "kills_during_a_save": during_a_save,
        "processes_seen": len(watched.names),
        "memory": memory,
        "faults": faults,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the test and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--validate-every", type=int, default=100, help="steps between validations, 0 for none")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0, help="seed of the kills")
    parser.add_argument("--launcher", choices=("python", "torchrun"), default="python")
    parser.add_argument("--max-growth-mb", type=float, default=16.0)
    parser.add_argument("--timeout-s", type=float, default=7200.0, help="time limit of one start")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/soak"), help="work folder, emptied first except for the synthetic data"
    )
    parser.add_argument("--json", type=Path)
    given, overrides = parser.parse_known_args(arguments)
    given.overrides = overrides
    given.port = free_port()
    work = given.work.resolve()
    for name in ("run", "whole", "tmp"):
        shutil.rmtree(work / name, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    (work / "output.txt").unlink(missing_ok=True)
    result = soak(given, work)
    text = json.dumps(result, indent=1)
    print(text)
    if given.json is not None:
        given.json.write_text(text + "\n")
    return 1 if result["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
