"""tools/doctor.py: every failure with made-up numbers, and one real check of this machine."""

import json
import sys
from pathlib import Path

import pytest
from running import launcher, load_tool, start

from pixel_sail.planning import checks
from pixel_sail.planning.checks import BAD, OK, WARN

GOOD = {
    "python": "3.11.7",
    "torch": "2.13.0+cpu",
    "transformers": "5.23.0",
    "accelerate": "1.15.0",
    "deepspeed": "0.19.8",
    "hydra-core": "1.3.8",
}


def statuses(**changes):
    return {finding.name: finding.status for finding in checks.check_versions(GOOD | changes)}


def test_the_tested_versions_are_fine():
    assert set(statuses().values()) == {OK}


@pytest.mark.parametrize(
    ("package", "version", "reason"),
    [
        ("python", "3.10.12", "3.11"),
        ("torch", "2.5.1+cu124", "CVE-2025-32434"),
        ("torch", "2.9.1", "CVE-2026-24747"),
        ("transformers", "4.57.0", "4.x"),
        ("accelerate", "1.9.0", "older"),
        ("deepspeed", "0.18.2", "0.19"),
        ("hydra-core", "1.3.7", "_target_"),
    ],
)
def test_known_bad_versions_are_rejected_with_reason_and_fix(package, version, reason):
    (finding,) = [one for one in checks.check_versions(GOOD | {package: version}) if one.name == package]
    assert finding.status == BAD and reason in finding.found and finding.fix


def test_the_newest_bound_is_named_even_where_an_older_rule_applies():
    (finding,) = checks.check_versions({"torch": "2.5.1"})
    assert "2.10 or newer" in finding.found


def test_versions_compare_as_numbers_and_a_missing_package_is_bad():
    assert statuses(torch="2.10.0")["torch"] == OK
    assert statuses(deepspeed=None)["deepspeed"] == BAD
    assert checks.check_versions({"nccl": None})[0].status == OK


GPUS = {"seen_by_driver": 8, "seen_by_torch": 8, "torch_cuda": "13.0", "processes": 8, "without_bf16": ()}


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({}, OK, "8 for 8"),
        ({"torch_cuda": None, "seen_by_torch": 0}, BAD, "built for the CPU"),
        ({"seen_by_torch": 0}, BAD, "torch (CUDA 13.0) none"),
        ({"processes": 9}, BAD, "9 processes"),
        ({"without_bf16": ("V100",)}, WARN, "V100"),
        ({"seen_by_driver": 0, "seen_by_torch": 0, "torch_cuda": None}, WARN, "CPU"),
    ],
)
def test_gpus(changes, status, said):
    finding = checks.check_gpus(**(GPUS | changes))
    assert finding.status == status and said in finding.found


@pytest.mark.parametrize(("free", "rate", "status"), [(2e9, 1e9, OK), (2e9, 5e7, WARN), (9e8, 1e9, BAD)])
def test_disk(free, rate, status):
    finding = checks.check_disk(folder=Path("runs"), free=free, needed=1e9, bytes_per_second=rate)
    assert finding.status == status and bool(finding.fix) == (status != OK)


def test_shared_memory_of_docker_is_too_small_for_eight_workers():
    # 4 batches x 8 workers x 8 processes x 8,192 tokens x (80 + 768) bytes.
    needed = checks.shared_memory_needed(seq_len=8192, sequences=1, patch_size=16, workers=8, processes=8)
    assert needed == 4 * 8 * 8 * 8192 * 848
    finding = checks.check_shared_memory(free=64e6, needed=needed)
    assert finding.status == BAD and "--ipc=host" in finding.fix
    assert checks.check_shared_memory(free=needed * 1.5, needed=needed).status == WARN
    assert checks.check_shared_memory(free=needed * 2, needed=needed).status == OK


@pytest.mark.parametrize(("limit", "status"), [(256, BAD), (1024, WARN), (65536, OK)])
def test_open_files(limit, status):
    finding = checks.check_open_files(limit)
    assert finding.status == status and ("ulimit" in finding.fix) == (status != OK)


def test_java_is_bad_only_where_captions_are_scored():
    assert checks.check_java(None, is_needed=True).status == BAD
    assert checks.check_java(None, is_needed=False).status == WARN
    assert checks.check_java("/usr/bin/java", is_needed=True).status == OK


def test_missing_data_is_named():
    finding = checks.check_paths("refcoco", {"data/a": True, "data/b": False})
    assert finding.status == BAD and "data/b" in finding.found and "data/a" not in finding.found


@pytest.mark.parametrize(("error", "status"), [(1e-7, OK), (1e-3, BAD), (float("nan"), BAD)])
def test_a_wrong_product_is_bad(error, status):
    assert checks.check_matmul(error=error, tolerance=1e-5, tflops=1.0, device="cuda:0").status == status


def test_all_reduce_counts_bus_bandwidth_and_names_wrong_ranks():
    values = {"world_size": 4, "seconds": 0.5, "num_bytes": 10**9, "backend": "nccl"}
    fine = checks.check_all_reduce(wrong_ranks=(), **values)
    assert fine.status == OK and "3.00 GB/s" in fine.found  # 2 x 3 / 4 x 1 GB / 0.5 s
    wrong = checks.check_all_reduce(wrong_ranks=(2,), **values)
    assert wrong.status == BAD and "[2]" in wrong.found
    slow = checks.check_all_reduce(wrong_ranks=(), **(values | {"seconds": 3.0}))
    assert slow.status == WARN and "NCCL_DEBUG" in slow.fix
    assert checks.check_all_reduce(wrong_ranks=(), **(values | {"seconds": 3.0, "backend": "gloo"})).status == OK


def test_ranks_that_differ_are_named():
    finding = checks.check_ranks_agree("run_dir", ["runs/a", "runs/a", "runs/b"])
    assert finding.status == BAD and "rank 2: runs/b" in finding.found
    assert checks.check_ranks_agree("run_dir", ["runs/a", "runs/a"]).status == OK


def test_the_worst_finding_is_the_verdict_and_its_fix_is_shown():
    fine, bad = checks.check_open_files(65536), checks.check_open_files(10)
    assert checks.worst_status([fine]) == OK and checks.worst_status([fine, bad]) == BAD
    assert "-> ulimit" in checks.checks_text([fine, bad]) and "->" not in checks.checks_text([fine])


def doctor():
    return load_tool("doctor")


def test_two_processes_on_this_machine(data_root, tmp_path):
    out = tmp_path / "report.json"
    arguments = ("experiment=quickstart", f"run_dir={tmp_path / 'run'}", "--json", str(out))
    done = start([*launcher("torchrun"), "tools/doctor.py", *arguments], data_root)
    report = json.loads(out.read_text())
    named = {finding["name"]: finding for finding in report["findings"]}
    assert done.returncode == 0, done.stdout
    assert {"torch", "disk", "data refshapes", "matmul", "run_dir"} <= set(named)
    assert named["all-reduce"]["status"] == OK and "2 ranks over gloo" in named["all-reduce"]["found"]
    assert not list(tmp_path.glob(".doctor_*")) and not (tmp_path / "run").exists()


def test_missing_data_ends_with_status_1_under_plain_python(tmp_path):
    done = start([sys.executable, "tools/doctor.py", "experiment=quickstart", f"run_dir={tmp_path}"], tmp_path / "none")
    assert done.returncode == 1
    assert "bad  data refshapes" in done.stdout and "PIXEL_SAIL_DATA" in done.stdout


def test_a_broken_product_is_found(monkeypatch):
    import torch

    module = doctor()
    real = torch.Tensor.__matmul__

    def broken(left, right):
        product = real(left, right)
        if product.dtype == torch.float32:
            product[3, 5] += 1.0
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", broken)
    assert module.matmul_finding(torch.device("cpu")).status == BAD


def test_a_folder_that_cannot_be_written_to_is_bad(monkeypatch, tmp_path):
    module = doctor()
    config = module.load_config("train", module.TrainConfig, ["experiment=quickstart", f"run_dir={tmp_path}"])

    def refuse(self, mode):
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "open", refuse)
    finding = module.disk_finding(config)
    assert finding.status == BAD and "read-only" in finding.found


def test_a_wrong_key_ends_with_status_2(capsys):
    assert doctor().main(["experiment=quickstart", "optim.learning=1"]) == 2
    assert "optim.learning" in capsys.readouterr().err
