"""Metrics of a log line besides the losses: throughput, memory, and counts and losses per source.

`training/loop.py` calls `PerfMetrics` when a step begins, has its data and is done, adds every step's
`StepReport.by_source`, and reads the metrics of a log line. They cover all steps since the last line:

    {"perf/tokens_per_s": 31200.0, "perf/samples_per_s": 24.1, "time/step_s": 0.412, "time/data_s": 0.003,
     "perf/mfu": 0.31, "perf/memory_gb": 61.2}
    {"refcoco/samples": 310, "refcoco/tokens": 9920, "refcoco/masks": 1550, "refcoco/text": 0.12, "refcoco/bce": 0.31}
    skipped.jsonl: {"source": "osprey_short_form", "position": 18220, "reason": "...: no such image file; ..."}

Only `read` communicates with other ranks, in one sum of four numbers per rank. Nothing here waits for a GPU, as reading
a step's losses already does. Checkpoints and validation are not timed.
"""

import json
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from pixel_sail import dist
from pixel_sail.data.mixture import Mixture
from pixel_sail.data.packing import Skipped, allowed_skips
from pixel_sail.distillation.settings import TeacherSettings
from pixel_sail.files import append_lines
from pixel_sail.losses.distill import DistillTerm
from pixel_sail.model.configuration_pixel_sail import Architecture
from pixel_sail.planning.flops import useful_flops
from pixel_sail.planning.workload import of_batch
from pixel_sail.types import Batch, DataError

PEAK_TFLOPS = (
    (r"\bH100 PCIe\b", 756.0),
    (r"\bH100 NVL\b", 835.0),
    (r"\bH200 NVL\b", 835.0),
    (r"\bH[12]00\b", 989.0),
    (r"\bA100\b", 312.0),
    (r"\bL40S\b", 362.0),
    (r"\bRTX 4090$", 165.0),
)
"""Pattern of a GPU's name in torch (first match wins), and its dense bf16 TFLOP/s with float32 accumulation, from the
vendor's data sheets."""


class PerfMetrics:
    """Sums of this rank since the last log line."""

    def __init__(
        self,
        architecture: Architecture,
        teachers: Mapping[str, TeacherSettings],
        *,
        peak_tflops: float | None,
        device: torch.device,
    ) -> None:
        self.architecture = architecture
        self.teachers = teachers
        self.device = device
        self.peak_flops = 1e12 * (device_peak_tflops(device) if peak_tflops is None else peak_tflops)
        self._clear()

    def _clear(self) -> None:
        self._steps, self._seconds, self._waited, self._flops = 0, 0.0, 0.0, 0.0
        self._tokens, self._samples = 0, 0

    def step_started(self) -> None:
        """Start the clock, before the step's data is requested."""
        self._begun = time.perf_counter()

    def data_loaded(self) -> None:
        """Record the time spent waiting for data."""
        self._waited += time.perf_counter() - self._begun

    def step_done(self, batches: Sequence[Batch], *, tokens: int, samples: int) -> None:
        """Add a step: this rank's micro-batches, on the CPU; real tokens and samples of all ranks."""
        if self.peak_flops:
            self._flops += sum(useful_flops(self.architecture, of_batch(batch), self.teachers) for batch in batches)
        self._tokens += tokens
        self._samples += samples
        self._steps += 1
        self._seconds += time.perf_counter() - self._begun

    def read(self) -> dict[str, float]:
        """Return the metrics of the steps since the last call; every rank must call it, after at least one step."""
        own = (self._waited, peak_memory_bytes(self.device), self._flops, self.peak_flops)
        numbers = perf_numbers(
            _of_all_ranks(own, self.device),
            steps=self._steps,
            seconds=self._seconds,
            tokens=self._tokens,
            samples=self._samples,
        )
        self._clear()
        return numbers


def perf_numbers(ranks_R4: Tensor, *, steps: int, seconds: float, tokens: int, samples: int) -> dict[str, float]:
    """Return the performance metrics of a log line.

    ranks_R4: float64, for each rank the seconds of waiting for data, peak bytes, FLOPs, and peak FLOP/s (0: unknown).
    `seconds` is the time of all steps; tokens and samples are those of all ranks.
    """
    waited_R, bytes_R, flops_R, peak_R = ranks_R4.T
    numbers = {
        "perf/tokens_per_s": tokens / seconds,
        "perf/samples_per_s": samples / seconds,
        "time/step_s": seconds / steps,
        # All ranks wait for the one whose data is late.
        "time/data_s": float(waited_R.max()) / steps,
    }
    if bool((peak_R > 0).all()):
        numbers["perf/mfu"] = float(flops_R.sum() / peak_R.sum()) / seconds
    numbers["perf/memory_gb"] = float(bytes_R.max()) / 1e9
    return {name: float(f"{value:.4g}") for name, value in numbers.items()}


def _of_all_ranks(own: Sequence[float], device: torch.device) -> Tensor:
    """Return the numbers of every rank, float64 [ranks, numbers]: a sum in which each rank fills its own row."""
    table = torch.zeros(dist.world_size(), len(own), dtype=torch.float64)
    table[dist.rank()] = torch.tensor(own, dtype=torch.float64)
    return dist.sum_over_ranks(table.to(device)).cpu()


def device_peak_tflops(device: torch.device) -> float:
    """Return the peak bf16 TFLOP/s of this GPU, 0 if unknown and on a CPU."""
    return named_peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else 0.0


def named_peak_tflops(name: str) -> float:
    """Return the peak bf16 TFLOP/s of a GPU with this name, 0 if unknown."""
    return next((peak for pattern, peak in PEAK_TFLOPS if re.search(pattern, name)), 0.0)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory so far: of tensors on a GPU, of this process (resident) on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage, whose peak is inherited from the parent process.
    status = Path("/proc/self/status").read_text()
    (kib,) = re.findall(r"^VmHWM:\s+(\d+) kB$", status, flags=re.MULTILINE)
    return int(kib) * 1024


SKIPPED_FILE = "skipped.jsonl"


def source_scalars(names: Sequence[str], sums: Tensor, distill_terms: Sequence[DistillTerm] = ()) -> dict[str, float]:
    """Return counts and mean losses of every source that had samples, from sums of `source_columns`."""
    scalars: dict[str, float] = {}
    for name, (samples, tokens, masks, text, bce, dice, *distilled) in zip(names, sums.tolist(), strict=True):
        if not samples:
            continue
        scalars |= {f"{name}/samples": samples, f"{name}/tokens": tokens, f"{name}/text": text / max(tokens, 1)}
        if masks:
            scalars |= {f"{name}/masks": masks, f"{name}/bce": bce / masks, f"{name}/dice": dice / masks}
        losses, images = distilled[: len(distill_terms)], distilled[len(distill_terms) :]
        for term, loss, num_images in zip(distill_terms, losses, images, strict=True):
            if num_images:
                scalars[f"{name}/distill/{term.name}"] = loss / num_images
    return scalars


def record_skipped(
    run_dir: Path,
    own: Sequence[Skipped],
    *,
    before: int,
    mixture: Mixture,
    position: int,
    max_fraction: float,
    device: torch.device,
) -> int:
    """Write this step's skipped samples of all ranks to skipped.jsonl; return how many the run has skipped so far.

    Raises: DataError, on every rank, if these are more than `max_fraction` of the mixture up to `position`, or of one
    epoch if that is longer.
    """
    new = int(dist.sum_over_ranks(torch.tensor(len(own), device=device)))
    if new == 0:
        return before
    everyone = sorted((skip for skips in dist.gather_objects(own) for skip in skips), key=lambda skip: skip.position)
    if dist.rank() == 0:
        append_lines(run_dir / SKIPPED_FILE, [json.dumps(asdict(skip)) for skip in everyone])
    total = before + new
    if total > allowed_skips(mixture, position, max_fraction):
        counts = dict(Counter(skip.source for skip in everyone))
        raise DataError(
            f"data: {total} samples skipped by position {position} of the mixture, expected at most a fraction of "
            f"{max_fraction} (data.max_skipped_fraction); {run_dir / SKIPPED_FILE} lists them, the last are {counts}: "
            f"{everyone[-1].reason}"
        )
    return total
