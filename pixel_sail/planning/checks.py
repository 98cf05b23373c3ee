"""Checks whether a machine is ready for a run. Each function takes plain numbers and returns a `Check`.

`tools/doctor.py` measures and these functions evaluate, so every failure can be tested without a broken machine. For
example:

    check_shared_memory(free=64e6, needed=900e6)
      -> Check(name="shared memory", status="bad", found="/dev/shm has 0.06 GB free, ...", fix="... --shm-size=...")
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

OK, WARN, BAD = "ok", "warn", "bad"


@dataclass(frozen=True, kw_only=True)
class Check:
    """Result of one check."""

    name: str
    status: str
    """ok, warn or bad."""
    found: str
    fix: str = ""
    """What to do; empty if the status is ok."""


@dataclass(frozen=True, kw_only=True)
class VersionRule:
    """Versions of a package that must not be used."""

    package: str
    below: str
    status: str
    reason: str
    fix: str


VERSION_RULES = (
    VersionRule(
        package="python",
        below="3.11",
        status=BAD,
        reason="the code uses features of Python 3.11",
        fix="install Python 3.11 or newer, then `make setup`",
    ),
    VersionRule(
        package="torch",
        below="2.6",
        status=BAD,
        reason="loading weights runs code in spite of weights_only (CVE-2025-32434)",
        fix="`make setup`, or pip install the torch of requirements/cpu.txt",
    ),
    VersionRule(
        package="torch",
        below="2.10",
        status=BAD,
        reason="loading weights can corrupt memory in spite of weights_only (CVE-2026-24747)",
        fix="`make setup`, or pip install the torch of requirements/cpu.txt",
    ),
    VersionRule(
        package="transformers",
        below="5.17",
        status=BAD,
        reason="configuration classes and weight loading of 4.x and early 5.x differ",
        fix="pip install 'transformers>=5.17'",
    ),
    VersionRule(
        package="accelerate",
        below="1.15",
        status=BAD,
        reason="older versions were not tried and fill the DeepSpeed dictionary otherwise",
        fix="pip install 'accelerate>=1.15'",
    ),
    VersionRule(
        package="deepspeed",
        below="0.19",
        status=BAD,
        reason="checkpoints reach into the optimizer state as DeepSpeed 0.19 lays it out",
        fix="pip install 'deepspeed>=0.19'",
    ),
    VersionRule(
        package="hydra-core",
        below="1.3.8",
        status=BAD,
        reason="a `_target_` may name anything there, and be run from a configuration of others",
        fix="pip install 'hydra-core>=1.3.8'",
    ),
)
"""The first rule that applies to a package is reported."""

REQUIRED = ("python", "torch", "transformers", "accelerate", "deepspeed")
MIN_OPEN_FILES, SAFE_OPEN_FILES = 1024, 4096
SLOW_DISK, SLOW_NETWORK = 100e6, 1e9
"""Bytes per second: a 3B checkpoint of 37 GB takes six minutes at 100 MB/s; gradients of 6 GB six seconds at 1 GB/s."""


def version_numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: 2.13.0+cpu is (2, 13, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def check_versions(versions: Mapping[str, str | None]) -> list[Check]:
    """Return one finding per package; None means that it is not installed."""
    findings = []
    for package, version in versions.items():
        if version is None:
            status = BAD if package in REQUIRED else OK
            fix = "`make setup`, or install requirements/cpu.txt" if status == BAD else ""
            findings.append(Check(name=package, status=status, found="not there", fix=fix))
            continue
        rules = [
            rule
            for rule in VERSION_RULES
            if rule.package == package and version_numbers(version) < version_numbers(rule.below)
        ]
        if rules:
            found = f"{version}, expected {rules[-1].below} or newer: {rules[0].reason}"
            findings.append(Check(name=package, status=rules[0].status, found=found, fix=rules[0].fix))
        else:
            findings.append(Check(name=package, status=OK, found=version))
    return findings


def check_gpus(
    *, seen_by_driver: int, seen_by_torch: int, torch_cuda: str | None, processes: int, without_bf16: Sequence[str]
) -> Check:
    """Check the GPUs of one node against its processes. `without_bf16`: names of GPUs without bf16 support."""
    if seen_by_driver and torch_cuda is None:
        return Check(
            name="GPUs",
            status=BAD,
            found=f"{seen_by_driver} GPUs, but this torch was built for the CPU",
            fix="TORCH_VARIANT=cuda make setup (some `pip install` may have replaced torch)",
        )
    if seen_by_driver and not seen_by_torch:
        return Check(
            name="GPUs",
            status=BAD,
            found=f"the driver shows {seen_by_driver} GPUs, torch (CUDA {torch_cuda}) none",
            fix="look at CUDA_VISIBLE_DEVICES; the driver may be older than that CUDA (nvidia-smi shows its newest)",
        )
    if not seen_by_torch:
        return Check(name="GPUs", status=WARN, found="none: the run will use the CPU", fix="fine for the quickstart")
    if processes > seen_by_torch:
        return Check(
            name="GPUs",
            status=BAD,
            found=f"{processes} processes on this node, {seen_by_torch} GPUs",
            fix=f"launch with at most {seen_by_torch} processes per node",
        )
    if without_bf16:
        return Check(
            name="GPUs",
            status=WARN,
            found=f"{', '.join(without_bf16)} cannot compute in bf16",
            fix="optim.precision=fp32, or GPUs from Ampere on",
        )
    return Check(name="GPUs", status=OK, found=f"{seen_by_torch} for {processes} processes, CUDA {torch_cuda}")


def check_disk(*, folder: Path, free: float, needed: float, bytes_per_second: float) -> Check:
    """Check the disk of the run folder; `needed`: bytes of its checkpoints and the export."""
    found = f"{folder}: {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed, {bytes_per_second / 1e6:.0f} MB/s"
    if free < needed:
        return Check(
            name="disk", status=BAD, found=found, fix="free space, another run_dir, or a smaller checkpoint.keep"
        )
    if bytes_per_second < SLOW_DISK:
        fix = "checkpoints will slow down training; use a faster disk or save less often (checkpoint.every)"
        return Check(name="disk", status=WARN, found=found, fix=fix)
    return Check(name="disk", status=OK, found=found)


def shared_memory_needed(*, seq_len: int, sequences: int, patch_size: int, workers: int, processes: int) -> float:
    """Return the bytes of all prefetched batches: four per data worker, without masks.

    A token has ten 8-byte numbers and at most one patch of bytes.
    """
    per_batch = sequences * seq_len * (10 * 8 + 3 * patch_size**2)
    return 4.0 * per_batch * workers * processes


def check_shared_memory(*, free: float, needed: float) -> Check:
    """Check /dev/shm, through which data workers pass their batches."""
    found = f"/dev/shm has {free / 1e9:.2f} GB free, batches in flight take about {needed / 1e9:.2f} GB"
    if free < needed:
        fix = "docker run --ipc=host (or --shm-size=16g), remount /dev/shm larger, or fewer data.num_workers"
        return Check(name="shared memory", status=BAD, found=found, fix=fix)
    if free < 2 * needed:
        fix = "masks need additional space, twice as much is safe; use fewer data.num_workers, or a larger /dev/shm"
        return Check(name="shared memory", status=WARN, found=found, fix=fix)
    return Check(name="shared memory", status=OK, found=found)


def check_open_files(limit: int) -> Check:
    """Check the limit of open files; every tensor in transit from a data worker is one."""
    found = f"a process may open {limit} files"
    fix = "ulimit -n 65536 before launching (in Slurm: in the batch script; in Docker: --ulimit nofile=65536)"
    if limit < MIN_OPEN_FILES:
        return Check(name="open files", status=BAD, found=found, fix=fix)
    return Check(
        name="open files",
        status=WARN if limit < SAFE_OPEN_FILES else OK,
        found=found,
        fix="" if limit >= SAFE_OPEN_FILES else fix,
    )


def check_java(path: str | None, *, is_needed: bool) -> Check:
    """Check for Java, which caption scores need."""
    if path:
        return Check(name="java", status=OK, found=path)
    return Check(
        name="java",
        status=BAD if is_needed else WARN,
        found="not there: no caption scores",
        fix="apt-get install default-jre-headless, or set JAVA_HOME",
    )


def check_paths(name: str, paths: Mapping[str, bool]) -> Check:
    """Check that the files and folders of a source or eval exist (path -> exists)."""
    missing = [path for path, exists in paths.items() if not exists]
    if missing:
        fix = "see data/README.md, or set PIXEL_SAIL_DATA; tools/check_data.py checks their content"
        return Check(name=f"data {name}", status=BAD, found=f"missing: {', '.join(missing)}", fix=fix)
    return Check(name=f"data {name}", status=OK, found=f"{len(paths)} paths are there")


def check_matmul(*, error: float, tolerance: float, tflops: float, device: str) -> Check:
    """Check a matrix product against the same in float64. `error` is relative to the largest entry."""
    found = f"{device}: {tflops:.2f} TFLOP/s, relative error {error:.1e}"
    if not error <= tolerance:  # NaN too
        fix = "do not train on this device; repeat the check on it alone, then replace it"
        return Check(name="matmul", status=BAD, found=f"{found}, expected at most {tolerance:.0e}", fix=fix)
    return Check(name="matmul", status=OK, found=found)


def check_all_reduce(
    *, world_size: int, wrong_ranks: Sequence[int], seconds: float, num_bytes: int, backend: str
) -> Check:
    """Check a timed sum over all ranks. The rate is NCCL's bus bandwidth: 2 (N - 1) / N of the bytes per second."""
    if world_size == 1:
        return Check(name="all-reduce", status=OK, found="one process, nothing to exchange")
    rate = 2 * (world_size - 1) / world_size * num_bytes / seconds
    found = f"{world_size} ranks over {backend}: {rate / 1e9:.2f} GB/s for {num_bytes / 1e6:.0f} MB"
    if wrong_ranks:
        fix = "set NCCL_DEBUG=INFO, then NCCL_P2P_DISABLE=1 or NCCL_IB_DISABLE=1 to find the broken transport"
        return Check(name="all-reduce", status=BAD, found=f"{found}; wrong sums on ranks {list(wrong_ranks)}", fix=fix)
    if backend == "nccl" and rate < SLOW_NETWORK:
        fix = "NCCL uses a slow transport (NCCL_DEBUG=INFO shows it); set NCCL_SOCKET_IFNAME or repair InfiniBand"
        return Check(name="all-reduce", status=WARN, found=found, fix=fix)
    return Check(name="all-reduce", status=OK, found=found)


def check_ranks_agree(name: str, values: Sequence[str]) -> Check:
    """Check that a value is the same on all ranks: versions, run folder, commit."""
    if len(set(values)) > 1:
        seen = "; ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))
        return Check(name=name, status=BAD, found=seen, fix="every node must run the same code, packages and run_dir")
    return Check(name=name, status=OK, found=f"equal on {len(values)} ranks: {values[0]}")


def worst_status(findings: Sequence[Check]) -> str:
    """Return the worst status."""
    statuses = [finding.status for finding in findings]
    return BAD if BAD in statuses else WARN if WARN in statuses else OK


def checks_text(findings: Sequence[Check]) -> str:
    """Return one line per finding, followed by the fix if it is not ok."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:5}{finding.name:24}{finding.found}")
        if finding.fix and finding.status != OK:
            lines.append(f"{'':29}-> {finding.fix}")
    return "\n".join(lines)
