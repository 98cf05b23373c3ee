"""The Slurm scripts start the documented processes (srun, scontrol and python are fakes), and exit statuses per
launcher."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from running import ROOT, launcher, start

SLURM = ROOT / "scripts" / "slurm"

FAKE_SRUN = """#!/usr/bin/env python3
# Starts every task of the step one after another, as Slurm would all at once; ends with the highest status.
import os, subprocess, sys
options, command = {}, sys.argv[1:]
while command[0].startswith("--"):
    name, _, value = command.pop(0)[2:].partition("=")
    options[name] = value
tasks, nodes = int(options["ntasks"]), int(options["nodes"])
assert tasks == nodes * int(options["ntasks-per-node"])
status = 0
for rank in range(tasks):
    local = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank % (tasks // nodes)}
    local |= {"SLURM_NTASKS": tasks, "SLURM_NNODES": nodes}
    done = subprocess.run(command, env=os.environ | {key: str(value) for key, value in local.items()})
    status = max(status, done.returncode)
sys.exit(status)
"""

FAKE_SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >>"$RECORD.scontrol"
if [ "$1 $2" = "show hostnames" ]; then for i in 1 2 3 4; do echo "node$i"; done; fi
"""

FAKE_PYTHON = """#!/usr/bin/env python3
import json, os, sys, time
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps({"args": sys.argv[1:], **{name: os.environ[name] for name in names}}) + "\\n")
time.sleep(float(os.environ.get("SLEEP", "0")))
sys.exit(int(os.environ.get("STATUS", "0")))
"""


@pytest.fixture
def submit(tmp_path):
    """Return a function that runs a batch script and returns the process, the tasks it started, the scontrol calls."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("srun", FAKE_SRUN), ("scontrol", FAKE_SCONTROL), ("python", FAKE_PYTHON)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)

    def run(script: str, *arguments: str, nodes: int = 4, gpus: str = "8", **variables: str):
        record = tmp_path / "record"
        environment = os.environ | {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "PYTHON": str(folder / "python"),
            "RECORD": str(record),
            "SLURM_SUBMIT_DIR": str(tmp_path),
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_JOB_NODELIST": "node[1-4]",
            "SLURM_GPUS_ON_NODE": gpus,
            **variables,
        }
        environment.pop("PIXEL_SAIL_RUNS", None)
        done = subprocess.run(
            ["bash", str(SLURM / script), *arguments], env=environment, capture_output=True, text=True, timeout=60
        )
        tasks = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
        calls = Path(f"{record}.scontrol")
        return done, tasks, calls.read_text().splitlines() if calls.exists() else []

    return run


@pytest.mark.parametrize("script", sorted(path.name for path in SLURM.glob("*.sbatch")))
def test_scripts_are_correct_bash(script):
    assert subprocess.run(["bash", "-n", str(SLURM / script)]).returncode == 0


def test_training_starts_one_task_per_gpu_in_one_group_and_one_run_folder(submit, tmp_path):
    done, tasks, _ = submit("train.sbatch", "experiment=quickstart", "optim.lr=1e-3")
    assert done.returncode == 0, done.stderr
    assert [task["RANK"] for task in tasks] == [str(rank) for rank in range(32)]
    assert [task["LOCAL_RANK"] for task in tasks] == [str(rank) for rank in range(8)] * 4
    assert {task["WORLD_SIZE"] for task in tasks} == {"32"} and {task["LOCAL_WORLD_SIZE"] for task in tasks} == {"8"}
    assert {(task["MASTER_ADDR"], task["MASTER_PORT"]) for task in tasks} == {("node1", "24711")}
    run_dir = tmp_path / "runs" / "slurm_4711"
    expected = ["scripts/train.py", "experiment=quickstart", "optim.lr=1e-3", f"run_dir={run_dir}"]
    assert all(task["args"] == expected for task in tasks)
    assert run_dir.is_dir()


@pytest.mark.parametrize("gpus", ["4", "a100:4"])
def test_other_numbers_of_nodes_and_gpus(submit, gpus):
    done, tasks, _ = submit("train.sbatch", "experiment=quickstart", nodes=2, gpus=gpus)
    assert done.returncode == 0 and len(tasks) == 8
    assert {task["LOCAL_WORLD_SIZE"] for task in tasks} == {"4"}


def test_a_given_run_folder_is_made_absolute_and_passed_last(submit, tmp_path):
    _, tasks, _ = submit("train.sbatch", "name=x", "run_dir=here/mine", nodes=1, gpus="1")
    assert tasks[0]["args"][-1] == f"run_dir={tmp_path}/here/mine"
    _, tasks, _ = submit("train.sbatch", "name=x", nodes=1, gpus="1", RUN_DIR="/tmp/pixel_sail_run_dir_of_a_test")
    Path("/tmp/pixel_sail_run_dir_of_a_test").rmdir()
    assert tasks[-1]["args"][-1] == "run_dir=/tmp/pixel_sail_run_dir_of_a_test"
    # Files of variables expand nothing.
    home = tmp_path / "home"
    _, tasks, _ = submit("train.sbatch", "name=x", nodes=1, gpus="1", RUN_DIR="~/mine", HOME=str(home))
    assert tasks[-1]["args"][-1] == f"run_dir={home}/mine"


def test_an_interrupted_run_is_requeued_and_a_failed_one_is_not(submit):
    done, _, calls = submit("train.sbatch", "name=x", nodes=1, gpus="2", STATUS="85")
    assert done.returncode == 0 and "scontrol requeue 4711" in calls
    done, _, calls = submit("train.sbatch", "name=x", nodes=1, gpus="2", STATUS="2")
    assert done.returncode == 2 and calls.count("scontrol requeue 4711") == 1


@pytest.mark.parametrize("status", ["86", "137"])
def test_a_job_that_lost_a_process_resumes_while_checkpoints_are_completed(submit, tmp_path, status):
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "step_00000500").mkdir(parents=True)
    arguments = ("train.sbatch", "name=x", f"run_dir={tmp_path / 'run'}")
    done, _, calls = submit(*arguments, nodes=1, gpus="2", STATUS=status)
    assert done.returncode == int(status) and not calls.count("scontrol requeue 4711")
    assert "no checkpoint was completed since this start" in done.stdout
    saver = tmp_path / "env.sh"
    saver.write_text(f"if [[ $0 == rank ]]; then mkdir -p {checkpoints}/step_00001000; fi\n")
    done, _, calls = submit(*arguments, nodes=1, gpus="2", STATUS=status, BASH_ENV=str(saver))
    assert done.returncode == 0 and calls.count("scontrol requeue 4711") == 1, done.stdout + done.stderr


def test_the_shell_survives_the_warning_signals_until_training_has_saved(submit, tmp_path):
    # The signals go to the script alone, as Slurm sends them; the task needs a second to save.
    sender = tmp_path / "bin" / "kill_later"
    sender.write_text('#!/usr/bin/env bash\n(sleep 0.4; kill -USR1 "$1"; sleep 0.2; kill -TERM "$1") &\n')
    sender.chmod(0o755)
    environment_script = tmp_path / "env.sh"
    environment_script.write_text(f"if [[ $0 == *train.sbatch ]]; then {sender} $$ >/dev/null 2>&1; fi\n")
    done, tasks, calls = submit(
        "train.sbatch", "name=x", nodes=1, gpus="1", STATUS="85", SLEEP="1.5", BASH_ENV=str(environment_script)
    )
    assert "waiting for the checkpoint" in done.stdout
    assert done.returncode == 0 and len(tasks) == 1 and "scontrol requeue 4711" in calls


def test_evaluation_on_one_and_on_two_nodes(submit):
    done, tasks, _ = submit("evaluate.sbatch", "checkpoint=runs/x", "evals=[refcoco_val]", nodes=1, gpus="2")
    assert done.returncode == 0 and len(tasks) == 2
    assert tasks[0]["args"] == ["scripts/evaluate.py", "checkpoint=runs/x", "evals=[refcoco_val]"]
    _, tasks, _ = submit("evaluate.sbatch", "checkpoint=runs/x", nodes=2, gpus="2")
    assert [task["RANK"] for task in tasks[2:]] == ["0", "1", "2", "3"]


@pytest.mark.parametrize("script", ["train.sbatch", "evaluate.sbatch"])
def test_without_arguments_nothing_starts(submit, script):
    done, tasks, _ = submit(script)
    assert done.returncode == 2 and "no overrides" in done.stderr and not tasks


def test_the_docker_file_pins_its_base_and_the_projects_requirements():
    text = (ROOT / "scripts" / "docker" / "Dockerfile").read_text()
    (base,) = [line for line in text.splitlines() if line.startswith("FROM")]
    assert ":" in base and "latest" not in base
    assert "requirements/cuda.txt" in text and (ROOT / "requirements" / "cuda.txt").is_file()


def test_every_script_the_launching_page_names_exists():
    text = (ROOT / "docs" / "launching.md").read_text()
    named = {word.strip("`,.:;()") for word in text.split() if word.strip("`,.:;()").startswith(("scripts/", "tools/"))}
    assert named and not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize(("by", "status"), [("torchrun", 1), ("accelerate", 1), ("deepspeed", 85)])
def test_exit_status_of_training_under_each_launcher(tmp_path, by, status):
    script = tmp_path / "interrupted.py"
    script.write_text("import sys\n\nsys.exit(85)\n")
    done = start([*launcher(by), str(script)], tmp_path)
    assert done.returncode == status, done.stderr[-4000:]
