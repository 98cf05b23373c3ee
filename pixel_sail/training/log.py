"""Logs training: a JSON line per logged step, the terminal, TensorBoard and wandb.

`training/loop.py` opens one `RunLog`; on ranks other than 0 it does nothing. A line of `log.jsonl`:

    {"step": 120, "optim/lr": 0.0019, "loss/total": 1.21, "loss/text": 0.01, "loss/bce": 0.42, "loss/dice": 0.68,
    "optim/grad_norm": 0.9, "data/tokens": 3104, "data/padding_fraction": 0.02, "data/supervised_tokens": 480,
    "data/masks": 96, "data/samples": 16, "data/epoch": 0.24, "data/skipped": 0, "perf/tokens_per_s": 8390.0,
    "perf/samples_per_s": 43.2, "time/step_s": 0.37, "time/data_s": 0.001, "perf/memory_gb": 0.93,
    "refshapes/samples": 99.0, ..., "seconds": 61.3}

For one version, `log.jsonl` has these numbers under their earlier keys as well (`pixel_sail/renamed.py`).
On a terminal a progress bar shows them. Otherwise, for example under Slurm, each logged step is one line:

    step 120/1650: total 1.210, bce 0.420, dice 0.680, lr 1.9e-03, grad_norm 0.90, 31,204 tokens/s, 07:12 left
    step 500/1650, refshapes_val: ciou 0.612, giou 0.701

When a run resumes from step S, lines after S are removed first: those steps are repeated, with the same numbers.
"""

import json
import logging
import re
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pixel_sail import dist
from pixel_sail.config import ConfigError, LogConfig
from pixel_sail.files import json_line, replace_bytes, replace_text, whole_lines, writing
from pixel_sail.renamed import current_log_line, with_old_log_keys
from pixel_sail.types import DataError

LOG_FILE = "log.jsonl"

TIMING_FIELDS = (
    *("perf/tokens_per_s", "perf/samples_per_s", "time/step_s", "time/data_s", "perf/mfu", "perf/memory_gb"),
    "seconds",
)
"""Keys that depend on the machine; all others are reproducible."""


class RunLog:
    """The open log of a run on rank 0."""

    def __init__(self, run_dir: Path, config: LogConfig, *, steps: int, start: int, resolved: dict[str, Any]) -> None:
        self.active = dist.rank() == 0
        self.started = time.monotonic()
        self._board: Any = None
        self._wandb: Any = None
        self._numbers: dict[str, float] = {}
        if not self.active:
            return
        self._path = run_dir / LOG_FILE
        with writing(self._path):
            run_dir.mkdir(parents=True, exist_ok=True)
            cut_log(self._path, start)
            self._file = self._path.open("a")
        self._progress = ProgressBar(steps=steps, start=start, shown=config.progress)
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start + 1 if start else None)
        if config.wandb != "disabled":
            self._wandb = _start_wandb(run_dir, config, resolved)

    def __enter__(self) -> "RunLog":
        """Return the log itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close everything."""
        if self.active:
            self._progress.close()
            self._file.close()
            if self._board is not None:
                self._board.close()
            if self._wandb is not None:
                self._wandb.finish()

    def step_done(self) -> None:
        """Count a step."""
        if self.active:
            self._progress.step_done()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write one line of numbers."""
        self._numbers.update(values)
        if not self.active:
            return
        line = {"step": step, **values, "seconds": round(time.monotonic() - self.started, 2)}
        self._write(with_old_log_keys(line))
        self._progress.numbers(step, values)
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def take_numbers(self) -> dict[str, float]:
        """Return, on every rank, the numbers logged since the last call."""
        taken, self._numbers = self._numbers, {}
        return taken

    def note(self, step: int, content: Mapping[str, Any]) -> None:
        """Write one line with content other than numbers, to the JSON log only."""
        if self.active:
            self._write({"step": step, **content})

    def _write(self, line: Mapping[str, Any]) -> None:
        with writing(self._path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def overlays(self, step: int, name: str, images: Sequence[tuple[str, NDArray[np.uint8]]]) -> None:
        """Log images [H, W, 3] with their captions."""
        if not self.active:
            return
        if self._board is not None:
            for index, (caption, image) in enumerate(images):
                self._board.add_image(f"{name}/{index}", image, step, dataformats="HWC")
                self._board.add_text(f"{name}/{index}", caption, step)
        if self._wandb is not None:
            wandb_images = [self._wandb.Image(image, caption=caption) for caption, image in images]
            self._wandb.log({name: wandb_images}, step=step)


def cut_log(path: Path, last_step: int) -> None:
    """Remove the lines after `last_step`, and an incomplete last line, from the log of a resumed run.

    Raises: DataError for damage in the lines that are kept.
    """
    if path.is_file():
        replace_bytes(path, b"".join(line + b"\n" for line in _kept_lines(path, last_step)))


def lines_up_to(path: Path, last_step: int) -> list[dict[str, Any]]:
    """Return the lines of a log that `cut_log` keeps, with current keys. Raises: DataError as `cut_log`."""
    kept = enumerate(_kept_lines(path, last_step), start=1)
    return [current_log_line(_log_line(path, number, line)) for number, line in kept]


def _kept_lines(path: Path, last_step: int) -> list[bytes]:
    """Return the lines up to the last one of `last_step` or before; later steps are repeated."""
    lines = whole_lines(path.read_bytes()).splitlines() if path.is_file() else []
    last = 0
    for number, line in enumerate(lines, start=1):
        with suppress(DataError):
            if _log_line(path, number, line)["step"] <= last_step:
                last = number
    kept = lines[:last]
    for number, line in enumerate(kept, start=1):
        _log_line(path, number, line)
    return kept


def _log_line(path: Path, number: int, line: bytes) -> dict[str, Any]:
    remedy = "correct or delete that line"
    return json_line(line, f"{path}, line {number}", {"step": int}, fail=DataError, remedy=remedy)


def check_boards(config: LogConfig) -> None:
    """Raise ConfigError if TensorBoard or wandb is enabled but cannot be imported. Call it before a run begins."""
    wanted = {"tensorboard": config.tensorboard, "wandb": config.wandb != "disabled"}
    modules = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}
    off = {"tensorboard": "log.tensorboard=false", "wandb": "log.wandb=disabled"}
    for name in (name for name, is_wanted in wanted.items() if is_wanted):
        try:
            import_module(modules[name])
        except ImportError as error:
            raise ConfigError(
                f"log.{name}: {getattr(config, name)!r} needs {name}, which cannot be imported ({error}); install "
                f"it (pip install {name}), or set {off[name]}"
            ) from error


def _start_wandb(run_dir: Path, config: LogConfig, resolved: dict[str, Any]) -> Any:
    """Start a wandb run, or resume that of the id in the run folder; return the wandb module."""
    import wandb

    id_file = run_dir / "wandb_id"
    if not id_file.is_file():
        replace_text(id_file, uuid.uuid4().hex[:8])
    run_id = id_file.read_bytes().decode(errors="replace").strip()
    if not re.fullmatch(r"[\w-]{1,64}", run_id):
        raise DataError(f"{id_file}: found {run_id[:80]!r}, expected the id of a wandb run; delete it to begin another")
    try:
        wandb.init(
            project=config.wandb_project,
            dir=str(run_dir),
            id=run_id,
            resume="allow",
            mode=config.wandb,  # type: ignore[arg-type]
            name=run_dir.name,
            config=resolved,
        )
    except wandb.Error as error:
        raise ConfigError(
            f"log.wandb is {config.wandb!r}, but wandb does not start ({error}); log in, or set log.wandb=offline or "
            "log.wandb=disabled"
        ) from error
    return wandb


logger = logging.getLogger(__name__)

NUMBERS = {
    **dict.fromkeys(("loss/total", "loss/bce", "loss/dice"), ".3f"),
    "optim/lr": ".1e",
    "optim/grad_norm": ".2f",
}
"""Numbers of a plain line, printed without their group, and their formats."""

SCORES = ("ciou", "giou")
"""Validation scores that are shown."""


class ProgressBar:
    """Steps done out of `steps`, on stderr."""

    def __init__(self, *, steps: int, start: int, shown: bool) -> None:
        self.steps = steps
        self.start = start
        self.shown = shown
        self.started = time.monotonic()
        is_terminal = sys.stderr.isatty()
        self._bar = (
            tqdm(total=steps, initial=start, unit="step", mininterval=1.0, dynamic_ncols=True)
            if shown and is_terminal
            else None
        )

    def step_done(self) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update()

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Show the numbers of a training step or a validation."""
        if not self.shown:
            return
        is_training = "loss/total" in values
        if self._bar is None:
            logger.info(
                training_line(step, self.steps, values, self.seconds_left(step))
                if is_training
                else validation_line(step, self.steps, values)
            )
        elif is_training:
            names = ("total", "bce", "dice")
            shown = {name: f"{values[f'loss/{name}']:.3f}" for name in names if f"loss/{name}" in values}
            if "perf/tokens_per_s" in values:
                shown["tokens/s"] = f"{values['perf/tokens_per_s']:,.0f}"
            self._bar.set_postfix(shown, refresh=False)
        else:
            self._bar.write(validation_line(step, self.steps, values), file=sys.stderr)

    def seconds_left(self, step: int) -> float:
        """Return the estimated remaining time at the average speed of this session, validations included."""
        return (time.monotonic() - self.started) / max(step - self.start, 1) * (self.steps - step)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()


def training_line(step: int, steps: int, values: Mapping[str, float], seconds_left: float) -> str:
    """Return the plain line of a logged step."""
    parts = [f"{key.partition('/')[2]} {values[key]:{form}}" for key, form in NUMBERS.items() if key in values]
    if "perf/tokens_per_s" in values:
        parts.append(f"{values['perf/tokens_per_s']:,.0f} tokens/s")
    return f"step {step}/{steps}: " + ", ".join([*parts, f"{tqdm.format_interval(seconds_left)} left"])


def validation_line(step: int, steps: int, values: Mapping[str, float]) -> str:
    """Return the plain line of a validation, whose values are named `<eval>/<score>`."""
    names = [name.rpartition("/") for name in values]
    evals = ", ".join(dict.fromkeys(group for group, _, _ in names))
    scores = [f"{score} {values[f'{group}/{score}']:.3f}" for group, _, score in names if score in SCORES]
    return f"step {step}/{steps}, {evals}: " + ", ".join(scores)
