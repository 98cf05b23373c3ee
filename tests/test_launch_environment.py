"""Environment variables set by launchers, platforms and schedulers, and the error message for inconsistent ones."""

import logging
import os
import time

import pytest
import torch
from accelerate import DeepSpeedPlugin

from pixel_sail import dist
from pixel_sail.config import ConfigError, TrainConfig, load_config
from pixel_sail.dist import LaunchError, ensure_launch_environment
from pixel_sail.training.accelerator import check_build_lock, deepspeed_dictionary, leave_out_launcher_settings

OTHERS = ("SLURM_", "OMPI_", "PMI_", "MV2_", "JSM_", "ENVIRONMENT")


@pytest.fixture
def leave(monkeypatch):
    """Return a function that sets exactly these variables, returns the resulting ones, and restores the environment."""
    for name in [name for name in os.environ if name in dist.VARIABLES or name.startswith(OTHERS)]:
        monkeypatch.delenv(name)
    for name in dist.VARIABLES:
        # Recorded, so that variables set by the code under test are removed.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def run(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        ensure_launch_environment()
        return {name: os.environ[name] for name in dist.VARIABLES if name in os.environ}

    return run


TWO = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"WORLD_SIZE": "1"},
        {"RANK": "0"},
        {"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": "", "MASTER_ADDR": "", "MASTER_PORT": " "},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_ID": "0"},
        # The script of a job, a shell in an allocation, and one of both tasks alone on purpose.
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "ENVIRONMENT": "BATCH"},
        {"SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_ID": "0"},
        {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "RANK": "0", "WORLD_SIZE": "1"},
    ],
)
def test_a_single_process_gets_what_is_missing(leave, given):
    left = leave(**given)
    port = int(left.pop("MASTER_PORT"))
    assert left == {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    assert 0 < port < 2**16 and (dist.rank(), dist.launched_world_size()) == (0, 1)


def test_variables_of_a_launcher_are_kept(leave):
    assert leave(**TWO, LOCAL_WORLD_SIZE="2") == {**TWO, "LOCAL_WORLD_SIZE": "2"}
    assert leave() == {**TWO, "LOCAL_WORLD_SIZE": "2"}, "the second call changes nothing"


def test_one_process_per_machine_needs_no_local_rank(leave):
    assert leave(**{name: value for name, value in TWO.items() if name != "LOCAL_RANK"})["LOCAL_RANK"] == "0"


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"RANK": "", "WORLD_SIZE": "2"}, "RANK is not set"),
        ({"RANK": "3"}, "WORLD_SIZE is not set"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 and WORLD_SIZE 2"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE 0"),
        ({"RANK": "zero", "WORLD_SIZE": "1"}, "RANK is 'zero', expected a number"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1', expected a number"),
        ({"RANK": "0", "WORLD_SIZE": "1.0"}, "WORLD_SIZE is '1.0', expected a number"),
        ({"LOCAL_WORLD_SIZE": "two"}, "LOCAL_WORLD_SIZE is 'two'"),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR and MASTER_PORT not set"),
        (TWO | {"MASTER_PORT": ""}, "MASTER_PORT not set"),
        (TWO | {"MASTER_PORT": "70000"}, "MASTER_PORT is 70000"),
        (TWO | {"MASTER_PORT": "tcp://10.0.0.1:80"}, "MASTER_PORT is 'tcp://10"),
    ],
)
def test_variables_that_do_not_fit_are_one_message(leave, given, named):
    with pytest.raises(LaunchError, match=named) as caught:
        leave(**given)
    assert "start with torchrun" in str(caught.value)


@pytest.mark.parametrize(
    ("local", "named"), [("3", "LOCAL_RANK is 3, but torch sees 2 GPUs"), ("", "which of the 2 GPUs")]
)
def test_every_process_of_a_machine_with_gpus_has_one_of_them(leave, monkeypatch, local, named):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(LaunchError, match=named):
        leave(**TWO | {"LOCAL_RANK": local})


def test_how_the_launcher_would_train_is_skipped_and_logged(monkeypatch, caplog):
    # As set by `accelerate launch` with a DeepSpeed section in its config file.
    values = {
        "ACCELERATE_CONFIG_DS_FIELDS": "gradient_accumulation_steps,zero_stage,mixed_precision",
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": "/nowhere/ds.json",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto",
        "ACCELERATE_MIXED_PRECISION": "fp16",
        "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
        "ACCELERATE_USE_FSDP": "true",
    }
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    for name, value in (values | {"ACCELERATE_CPU_AFFINITY": "1", "RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    with caplog.at_level(logging.INFO):
        leave_out_launcher_settings()
    assert [name for name in os.environ if name.startswith("ACCELERATE_")] == ["ACCELERATE_CPU_AFFINITY"]
    assert "deepspeed_zero_stage=3" in caplog.text and "mixed_precision=fp16" in caplog.text
    config = load_config("train", TrainConfig, ["name=x", "deepspeed=zero1"])
    plugin = DeepSpeedPlugin(hf_ds_config=deepspeed_dictionary(config, 4))
    assert (plugin.zero_stage, plugin.gradient_accumulation_steps) == (1, 4)


@pytest.mark.parametrize("task", ["0", "1"])
@pytest.mark.parametrize(
    ("program", "number", "size"),
    [
        ("srun", "SLURM_PROCID", "SLURM_NTASKS"),
        ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
        ("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        ("mpiexec", "PMI_RANK", "PMI_SIZE"),
    ],
)
def test_tasks_that_nobody_numbered_are_rejected_with_what_to_start_instead(leave, program, number, size, task):
    with pytest.raises(LaunchError, match=rf"task {task} of 2 that {program} started \({number}, {size}\)") as caught:
        # Within the script of a job, too.
        leave(**{number: task, size: "2", "SLURM_STEP_ID": "0", "ENVIRONMENT": "BATCH"})
    assert "torchrun --nproc-per-node" in str(caught.value) and f"RANK=${number}" in str(caught.value)


def test_the_lock_of_a_compilation_that_was_killed_is_named(tmp_path):
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    check_build_lock(tmp_path)
    os.utime(lock, (time.time() - 3600,) * 2)
    with pytest.raises(ConfigError, match=r"deepspeed_shm_comm/lock: found .*60 minutes ago.*Delete this file"):
        check_build_lock(tmp_path)
    check_build_lock(tmp_path / "absent")


def test_a_free_port_is_none_of_those_of_outgoing_connections():
    ports = {dist.free_port() for _ in range(20)}
    assert len(ports) > 15 and all(15_000 <= port < 32_000 for port in ports)
