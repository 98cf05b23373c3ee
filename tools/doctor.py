"""Check a machine before a run: report what would break the run, and how to fix it.

    python tools/doctor.py                                              the quickstart's configuration
    python tools/doctor.py name=x data=cotrain_0_5b model=sail_0_5b     any overrides of scripts/train.py
    torchrun --nproc-per-node=8 tools/doctor.py experiment=...          also checks communication
    python tools/doctor.py --json report.json --captions                also requires Java

Checks versions, GPUs, disk, shared memory, open files, Java, data paths, and the results of a matrix product and an
all-reduce; the last two take a few seconds. Exit status: 0 if nothing is bad, 1 if something is, 2 for a wrong command
line. Start it with the launcher and on the nodes of the run.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from pixel_sail import dist
from pixel_sail.config import TrainConfig, load_config
from pixel_sail.entry import one_message
from pixel_sail.evaluation.check_plan import node_paths
from pixel_sail.files import replace_text
from pixel_sail.planning import checks
from pixel_sail.planning.checks import Check
from pixel_sail.planning.disk import checkpoint_bytes, run_folder_bytes
from pixel_sail.planning.parameters import fill_in_vocabulary, parameter_counts

CHECKED_PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "deepspeed",
    "safetensors",
    "tokenizers",
    "numpy",
    "hydra-core",
)
PROBE_BYTES = 64 * 2**20
REDUCE_ELEMENTS = 16 * 2**20
MATMUL_SIZE = 1024
SECONDS = 4.0
"""Longest time for which the matrix product and the all-reduce are each repeated."""
GROUP_TIMEOUT = timedelta(seconds=60)


def installed_versions() -> dict[str, str | None]:
    """Return the relevant versions, None for a package that is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in CHECKED_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    has_cuda = torch.cuda.is_available()
    versions["cuda"] = torch.version.cuda
    versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version())) if has_cuda else None
    return versions


def driver_gpus() -> int:
    """Return the number of GPUs that the driver reports, 0 without a driver."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return 0
    shown = subprocess.run([command, "-L"], capture_output=True, text=True, timeout=30, check=False)
    return sum(line.startswith("GPU ") for line in shown.stdout.splitlines())


def gpu_finding() -> Check:
    """Return the findings about the GPUs of this node."""
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    weak = [name for i, name in enumerate(names) if torch.cuda.get_device_capability(i) < (8, 0)]
    return checks.check_gpus(
        seen_by_driver=driver_gpus(),
        seen_by_torch=len(names),
        torch_cuda=torch.version.cuda,
        processes=int(os.environ.get("LOCAL_WORLD_SIZE") or 1),
        without_bf16=weak,
    )


def existing_parent(folder: Path) -> Path:
    """Return the folder or its nearest existing parent."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def disk_finding(config: TrainConfig) -> Check:
    """Write a file to the future run folder, and compare the free space with the needs of the run."""
    folder = existing_parent(Path(config.run_dir))
    probe = folder / f".doctor_{os.getpid()}"
    block = os.urandom(2**20)
    try:
        began = time.perf_counter()
        with probe.open("wb") as file:
            for _ in range(PROBE_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        seconds = time.perf_counter() - began
    except OSError as error:
        fix = "set run_dir to a writable folder that is the same on every node"
        return Check(name="disk", status=checks.BAD, found=f"{folder}: cannot be written to ({error})", fix=fix)
    finally:
        probe.unlink(missing_ok=True)
    fill_in_vocabulary(config.model)
    counts = parameter_counts(config.model.architecture, config.distillation)
    total = sum(counts.values())
    needed = run_folder_bytes(
        checkpoint_bytes(total), exported=total - counts["distill_head"], keep=config.checkpoint.keep
    )
    free = shutil.disk_usage(folder).free
    return checks.check_disk(folder=folder, free=free, needed=needed, bytes_per_second=PROBE_BYTES / seconds)


def shared_memory_finding(config: TrainConfig) -> Check:
    """Compare /dev/shm with the needs of the loader workers of this node."""
    needed = checks.shared_memory_needed(
        seq_len=config.data.packing.seq_len,
        sequences=config.data.micro_batch_size,
        patch_size=config.model.architecture.patch_size,
        workers=config.data.num_workers,
        processes=int(os.environ.get("LOCAL_WORLD_SIZE") or 1),
    )
    return checks.check_shared_memory(free=shutil.disk_usage("/dev/shm").free, needed=needed)


def data_findings(config: TrainConfig) -> list[Check]:
    """Return for every configured source and eval, and for the tokenizer, whether its paths exist."""
    findings = []
    for name, node in [*config.data.sources.items(), *((f"eval {n}", node) for n, node in config.evals.items())]:
        paths = node_paths(node)
        # A source with several folders needs one of them.
        folders = [value for value in node.values() if isinstance(value, list) and any("/" in str(v) for v in value)]
        present = {str(path): path.exists() for path in paths}
        present |= {" or ".join(map(str, group)): any(Path(str(v)).exists() for v in group) for group in folders}
        findings.append(checks.check_paths(name, present))
    tokenizer = config.model.tokenizer
    findings.append(checks.check_paths("tokenizer", {tokenizer: Path(tokenizer).exists()}))
    return findings


def matmul_finding(device: torch.device) -> Check:
    """Multiply for a few seconds and compare every result with the product in float64 on the CPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, generator=generator).to(device, dtype) for _ in range(2))
    exact = left.cpu().double() @ right.cpu().double()
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    worst, repeats, busy = 0.0, 0, 0.0
    while busy < SECONDS / 2 and repeats < 200:
        began = time.perf_counter()
        product = left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        busy += time.perf_counter() - began
        repeats += 1
        error = float((product.cpu().double() - exact).abs().max() / exact.abs().max())
        worst = error if error != error else max(worst, error)
    tflops = 2 * MATMUL_SIZE**3 * repeats / busy / 1e12
    return checks.check_matmul(error=worst, tolerance=tolerance, tflops=tflops, device=str(device))


def all_reduce_finding(device: torch.device) -> Check:
    """All-reduce a tensor for a few seconds and check every element of every result."""
    world, rank = dist.world_size(), dist.rank()
    if world == 1:
        return checks.check_all_reduce(world_size=1, wrong_ranks=(), seconds=1.0, num_bytes=0, backend="none")
    expected = float(world * (world + 1) // 2)
    seconds, repeats, is_wrong = 0.0, 5, False
    for _ in range(repeats):
        values = torch.full((REDUCE_ELEMENTS,), float(rank + 1), device=device)
        dist.barrier()
        began = time.perf_counter()
        torch.distributed.all_reduce(values)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds += time.perf_counter() - began
        is_wrong |= not bool((values == expected).all())
    wrong = [index for index, bad in enumerate(dist.gather_objects(is_wrong)) if bad]
    return checks.check_all_reduce(
        world_size=world,
        wrong_ranks=wrong,
        seconds=seconds / repeats,
        num_bytes=4 * REDUCE_ELEMENTS,
        backend=str(torch.distributed.get_backend()),
    )


def examine(config: TrainConfig, *, needs_captions: bool) -> list[Check]:
    """Return all findings of this rank, and those of other ranks that are not ok."""
    versions = installed_versions()
    java_home = os.environ.get("JAVA_HOME")
    java = str(Path(java_home) / "bin" / "java") if java_home else shutil.which("java")
    device = dist.local_device()
    local = [
        gpu_finding(),
        disk_finding(config),
        shared_memory_finding(config),
        checks.check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
        checks.check_java(java if java and Path(java).exists() else None, is_needed=needs_captions),
        *data_findings(config),
        matmul_finding(device),
    ]
    findings = [*checks.check_versions(versions), *local, all_reduce_finding(device)]
    if dist.world_size() > 1:
        findings.append(checks.check_ranks_agree("versions", dist.gather_objects(json.dumps(versions))))
        findings.append(checks.check_ranks_agree("run_dir", dist.gather_objects(config.run_dir)))
        for rank, others in enumerate(dist.gather_objects(local)):
            if rank != dist.rank():
                findings += [_of_rank(rank, finding) for finding in others if finding.status != checks.OK]
    return findings


def _of_rank(rank: int, finding: Check) -> Check:
    return Check(name=finding.name, status=finding.status, found=f"rank {rank}: {finding.found}", fix=finding.fix)


@one_message
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks, print them and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the findings to this file")
    parser.add_argument("--captions", action="store_true", help="require Java, which scores captions")
    options, overrides = parser.parse_known_args(arguments)
    if not any(override.startswith(("name=", "experiment=")) for override in overrides):
        overrides = ["name=doctor", *overrides] if overrides else ["experiment=quickstart"]
    config = load_config("train", TrainConfig, overrides)
    if dist.launched_world_size() > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(dist.local_device())
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=GROUP_TIMEOUT)
    findings = examine(config, needs_captions=options.captions)
    worst = checks.worst_status(findings)
    # All ranks exit with the same status: a launcher shows only the first failure.
    statuses = dist.gather_objects(worst)
    if dist.rank() == 0:
        print(checks.checks_text(findings))
        counts = [sum(finding.status == status for finding in findings) for status in (checks.BAD, checks.WARN)]
        print(f"{counts[0]} bad, {counts[1]} warnings")
        if options.json is not None:
            report: dict[str, Any] = {"verdict": worst, "findings": [asdict(finding) for finding in findings]}
            replace_text(options.json, json.dumps(report, indent=1) + "\n")
    dist.shutdown()
    return int(checks.BAD in statuses)


if __name__ == "__main__":
    sys.exit(main())
