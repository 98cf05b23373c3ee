"""Sweeps: a grid is expanded to jobs, jobs resume where they stopped, a failure does not affect others, tables are
written."""

import errno
import json
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest
from running import ROOT, load_tool, start

from pixel_sail.config import ConfigError
from pixel_sail.evaluation.comparison import compare
from pixel_sail.evaluation.sweep_tables import read_groups, scores_table_of
from pixel_sail.files import replace_text
from pixel_sail.sweep import jobs as sweep_jobs
from pixel_sail.sweep import slurm
from pixel_sail.sweep.grid import Job, expand
from pixel_sail.sweep.jobs import Settings
from pixel_sail.sweep.run import main


def test_a_grid_is_every_combination_the_last_one_fastest():
    jobs = expand(["experiment=refshapes_student", "ablation=stride_4,stride_8", "seed=range(1,3)", "evals=[a,b]"])
    assert [job.swept for job in jobs] == [
        {"ablation": "stride_4", "seed": "1"},
        {"ablation": "stride_4", "seed": "2"},
        {"ablation": "stride_8", "seed": "1"},
        {"ablation": "stride_8", "seed": "2"},
    ]
    assert jobs[1] == Job(
        name="ablation-stride_4__seed-2",
        overrides=("experiment=refshapes_student", "ablation=stride_4", "seed=2", "evals=[a,b]"),
        swept={"ablation": "stride_4", "seed": "2"},
    )


def test_nothing_swept_is_one_job_and_names_are_folder_names():
    assert [job.name for job in expand(["experiment=quickstart"])] == ["only"]
    names = [job.name for job in expand(["optim.lr=1e-3,2.5e-4", "data.sources.x.root=/a/b,'c d'"])]
    assert names == [
        "optim.lr-0.001__data.sources.x.root-_a_b",
        "optim.lr-0.001__data.sources.x.root-_c_d",
        "optim.lr-0.00025__data.sources.x.root-_a_b",
        "optim.lr-0.00025__data.sources.x.root-_c_d",
    ]


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["seed=1,2", "run_dir=runs/x"], "run_dir=runs/x"),
        (["seed=1,1"], "seed-1"),
        (["optim.lr=1,[2"], "sweep"),
        (["name=a"], "name=a"),
    ],
)
def test_a_grid_that_cannot_be_run_is_rejected(overrides, named):
    with pytest.raises(ConfigError, match=named.replace("[", r"\[")):
        expand(overrides)


FAKE_TRAIN = """
import os, pathlib, sys
values = dict(argument.split("=", 1) for argument in sys.argv[1:])
folder = pathlib.Path(values["run_dir"].strip("'"))
folder.mkdir(parents=True, exist_ok=True)
with (folder / "starts").open("a") as file:
    file.write("x")
starts = len((folder / "starts").read_text())
if values["seed"] == os.environ.get("FAILING"):
    sys.exit("broken on purpose")
if values["seed"] == "3" and starts < 3:
    sys.exit(85)
"""
FAKE_EVALUATE = """
import pathlib, sys
values = dict(argument.split("=", 1) for argument in sys.argv[1:])
(pathlib.Path(values["checkpoint"].strip("'")) / "scored").write_text(values["evals"])
"""


@pytest.fixture
def fake_scripts(tmp_path, monkeypatch):
    """Trainings that record their starts: seed 3 requests two restarts, the one in FAILING fails."""
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "train.py").write_text(FAKE_TRAIN)
    (folder / "evaluate.py").write_text(FAKE_EVALUATE)
    monkeypatch.setattr(sweep_jobs, "SCRIPTS", folder)


def starts(folder):
    return {path.parent.name: len(path.read_text()) for path in folder.glob("*/starts")}


def test_a_failed_job_affects_no_other_and_is_the_only_one_retried(fake_scripts, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "sweep"
    command = [f"--folder={folder}", "--jobs=2", "--evaluate=evals=[refshapes_val]", "experiment=quickstart"]
    command += ["seed=1,2,3,4"]
    monkeypatch.setenv("FAILING", "2")
    assert main(command) == 1
    assert starts(folder) == {"seed-1": 1, "seed-2": 1, "seed-3": 3, "seed-4": 1}
    assert sorted(path.parent.name for path in folder.glob("*/scored")) == ["seed-1", "seed-3", "seed-4"]
    said = capsys.readouterr().out
    assert "4 jobs" in said and "3 finished, 1 failed" in said and "jobs/seed-2.log" in said
    assert "broken on purpose" in (folder / "jobs" / "seed-2.log").read_text()
    monkeypatch.delenv("FAILING")
    assert main(command) == 0
    assert starts(folder) == {"seed-1": 1, "seed-2": 2, "seed-3": 3, "seed-4": 1}
    assert "1 finished, 3 skipped" in capsys.readouterr().out
    # A new evaluation runs for all jobs without retraining; more seeds use the same folder.
    assert main([*command[:2], "--evaluate=evals=[refshapes_testA]", "experiment=quickstart", "seed=1,2,3,4,5"]) == 0
    assert starts(folder) == {"seed-1": 1, "seed-2": 2, "seed-3": 3, "seed-4": 1, "seed-5": 1}
    assert {path.read_text() for path in folder.glob("*/scored")} == {"[refshapes_testA]"}
    assert list(json.loads((folder / "sweep.json").read_text())["jobs"]) == [f"seed-{n}" for n in (1, 2, 3, 4, 5)]


def test_a_launcher_that_does_not_exist_fails_the_jobs_and_not_the_sweep(fake_scripts, tmp_path, capsys):
    command = [f"--folder={tmp_path / 'sweep'}", "--launcher=no_such_launcher", "experiment=quickstart", "seed=1,2"]
    assert main(command) == 1
    said = capsys.readouterr().out
    assert said.count("FileNotFoundError") == 2 and "no_such_launcher" in said and "2 failed" in said


@pytest.mark.parametrize("content", ["{", "[]", '{"overrides": []}', '{"overrides": 1, "evaluate": [], "done": []}'])
def test_a_damaged_record_fails_only_its_job(fake_scripts, tmp_path, capsys, content):
    folder = tmp_path / "sweep"
    (folder / "jobs").mkdir(parents=True)
    (folder / "jobs" / "seed-1.json").write_text(content)
    assert main([f"--folder={folder}", "experiment=quickstart", "seed=1,2,4"]) == 1
    assert starts(folder) == {"seed-2": 1, "seed-4": 1}
    said = capsys.readouterr().out
    assert f"DataError: {folder / 'jobs' / 'seed-1.json'}: found no record of a job" in said
    assert "2 finished, 1 failed" in said


def test_a_disk_that_is_full_for_one_job_loses_no_other(fake_scripts, tmp_path, monkeypatch, capsys):
    def write(path, text):
        if path.name == "seed-1.json" and "train" in json.loads(text)["done"]:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        replace_text(path, text)

    monkeypatch.setattr(sweep_jobs, "replace_text", write)
    folder = tmp_path / "sweep"
    assert main([f"--folder={folder}", "--jobs=2", "experiment=quickstart", "seed=1,3,4"]) == 1
    assert starts(folder) == {"seed-1": 1, "seed-3": 3, "seed-4": 1}
    said = capsys.readouterr().out
    assert "No space left on device" in said and "2 finished, 1 failed" in said


def test_a_damaged_list_of_jobs_is_rejected_before_anything_starts(fake_scripts, tmp_path, capsys):
    (tmp_path / "sweep.json").write_text("{")
    assert main([f"--folder={tmp_path}", "experiment=quickstart", "seed=1"]) == 2
    assert str(tmp_path / "sweep.json") in capsys.readouterr().err
    assert not starts(tmp_path)


def test_a_folder_of_other_jobs_is_rejected_before_anything_starts(fake_scripts, tmp_path, capsys):
    folder = tmp_path / "sweep"
    assert main([f"--folder={folder}", "experiment=quickstart", "seed=1"]) == 0
    assert main([f"--folder={folder}", "experiment=quickstart", "optim.lr=1", "seed=1,7"]) == 0
    assert main([f"--folder={folder}", "experiment=quickstart", "optim.lr=2", "seed=8,7"]) == 2
    assert "optim.lr=1" in capsys.readouterr().err
    assert "seed-8" not in starts(folder)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["experiment=quickstart", "ablation=stride_4,no_such"], "no_such"),
        (["experiment=quickstart", "--job=2"], "--job"),
        (["experiment=quickstart", "--jobs=0"], "--jobs"),
        (["experiment=quickstart", "optim.stepz=1,2"], "stepz"),
    ],
)
def test_wrong_input_ends_before_any_job(fake_scripts, tmp_path, capsys, arguments, named):
    assert main([f"--folder={tmp_path / 'sweep'}", *arguments]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


SLEEPING = """
import pathlib, signal, sys, time
values = dict(argument.split("=", 1) for argument in sys.argv[1:])
folder = pathlib.Path(values["run_dir"].strip("'"))
folder.mkdir(parents=True)
def save(*_):
    (folder / "saved").write_text("")
    sys.exit(85)
signal.signal(signal.SIGTERM, save)
(folder / "running").write_text("")
time.sleep(120)
"""
STOPPED = """
import pathlib, sys
from pixel_sail.sweep import jobs, run
jobs.SCRIPTS = pathlib.Path(sys.argv[1])
sys.exit(run.main(sys.argv[2:]))
"""


EARLY = [
    (["experiment=quickstart", "ablation=stride_4,marks_box"], "ablation-marks_box", "data.sources.osprey_short_form"),
    (["experiment=quickstart", "ablation=stride_4,data_pix2cap"], "ablation-data_pix2cap", "no _target_"),
    (["experiment=pixel_sail_7b", "ablation=stride_4,prompts_off"], "ablation-prompts_off", "base eve"),
    (
        ["experiment=quickstart", "+data.sources.refshapes.splitt=a,b"],
        "splitt-a",
        "unexpected keyword argument 'splitt'",
    ),
    (["experiment=quickstart", "data.sources.refshapes._target_=no.such"], "only", "no.such"),
    (["experiment=quickstart", "evals.refshapes_val.root=a", "+evals.other.root=b,c"], "other.root-b", "evals.other"),
    (["experiment=refshapes_distill", "distillation.ours.fraction=1,3"], "fraction-3", "fraction is 3"),
    (["experiment=refshapes_distill", "+distillation.ours.model.weightz=a,b"], "weightz-a", "distillation.ours.model"),
    (["experiment=quickstart", "data.micro_batch_size=8,3"], "batch-3", "multiple of 3"),
]


@pytest.mark.parametrize(("overrides", "job", "named"), EARLY)
def test_a_combination_that_training_would_reject_is_named_before_any_job(
    fake_scripts, tmp_path, capsys, overrides, job, named
):
    assert main([f"--folder={tmp_path / 'sweep'}", *overrides]) == 2
    said = capsys.readouterr().err
    assert re.match(rf"ConfigError: sweep: job '\S*{re.escape(job)}' \(experiment=", said) and named in said
    assert "_partial_" not in said and not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("evaluate", ["evals=[no_such]", "evals=[refshapes_val] predict.prompt=no_such"])
def test_an_impossible_evaluation_is_rejected_before_any_training(fake_scripts, tmp_path, capsys, evaluate):
    assert main([f"--folder={tmp_path / 'sweep'}", f"--evaluate={evaluate}", "experiment=quickstart", "seed=1"]) == 2
    said = capsys.readouterr().err
    assert f"--evaluate '{evaluate}'" in said and "no_such" in said.partition(evaluate)[2]
    assert not (tmp_path / "sweep").exists()


def test_a_stopped_sweep_has_its_trainings_save_and_starts_no_other(tmp_path):
    (tmp_path / "train.py").write_text(SLEEPING)
    folder = tmp_path / "sweep"
    command = [sys.executable, "-c", STOPPED, str(tmp_path), f"--folder={folder}", "experiment=quickstart", "seed=1,2"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        while not (folder / "seed-1" / "running").exists():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 85
    assert (folder / "seed-1" / "saved").exists() and not (folder / "seed-2").exists()
    assert "1 interrupted, 1 not started" in said


def test_a_job_is_scored_with_its_training_paths_unless_the_evaluation_sets_others(tmp_path):
    job = Job(name="a", overrides=("experiment=quickstart", "paths.data=/mine"), swept={})
    evals = "evals=[refshapes_val]"
    command = sweep_jobs.evaluate_command(job, Settings(folder=tmp_path, evaluate=(evals,)))
    assert command[-2:] == ["paths.data=/mine", evals]
    command = sweep_jobs.evaluate_command(job, Settings(folder=tmp_path, evaluate=(evals, "paths.data=/other")))
    assert [part for part in command if part.startswith("paths.data")] == ["paths.data=/other"]


def test_slurm_without_submitit_is_an_error(fake_scripts, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert main([f"--folder={tmp_path / 's'}", "--slurm=timeout_min=9", "experiment=quickstart", "seed=1"]) == 2
    assert "pip install submitit" in capsys.readouterr().err


class FakeExecutor:
    """The part of submitit that the sweep uses: jobs run immediately; the second one is lost."""

    def __init__(self, folder, cluster):
        self.log, self.count = [(str(folder), cluster)], 0
        FakeExecutor.last = self

    def update_parameters(self, **parameters):
        self.log.append(parameters)

    def submit(self, job):
        self.count += 1
        result = job if self.count != 2 else None

        def outcome():
            if result is None:
                raise RuntimeError("node failed")
            return result()

        return types.SimpleNamespace(job_id=100 + self.count, result=outcome)


def test_jobs_go_through_submitit_with_its_parameters(fake_scripts, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "submitit", types.SimpleNamespace(AutoExecutor=FakeExecutor))
    slurm_settings = "--slurm=slurm_partition=gpu timeout_min=90"
    assert main([f"--folder={tmp_path / 's'}", slurm_settings, "experiment=quickstart", "seed=1,2,4"]) == 1
    assert FakeExecutor.last.log == [
        (str(tmp_path / "s" / "slurm"), "slurm"),
        {"slurm_partition": "gpu", "timeout_min": 90},
    ]
    assert starts(tmp_path / "s") == {"seed-1": 1, "seed-4": 1}
    assert "Slurm job 102: node failed" in capsys.readouterr().out


def test_a_job_that_runs_out_of_time_is_submitted_again(tmp_path, monkeypatch):
    helpers = types.SimpleNamespace(DelayedSubmission=lambda job: ("again", job))
    monkeypatch.setitem(sys.modules, "submitit", types.SimpleNamespace(helpers=helpers))
    job = slurm.SlurmJob(Job(name="a", overrides=(), swept={}), Settings(folder=tmp_path))
    job.stop = sweep_jobs.Stop()
    again, resubmitted = job.checkpoint()
    assert (again, resubmitted.job, job.stop.is_set) == ("again", job.job, True)


ON_A_NODE = """
import pathlib, signal, sys, types
from pixel_sail.sweep import jobs, slurm
from pixel_sail.sweep.grid import Job
folder = jobs.SCRIPTS = pathlib.Path(sys.argv[1])
sys.modules["submitit"] = types.SimpleNamespace(helpers=types.SimpleNamespace(DelayedSubmission=lambda job: job))
job = slurm.SlurmJob(Job(name="a", overrides=(), swept={}), jobs.Settings(folder=folder / "sweep"))
def checkpoint_and_requeue(*_):
    print("again:", job.checkpoint().job.name)
    sys.exit(3)
signal.signal(signal.SIGUSR2, checkpoint_and_requeue)
job()
"""


def test_the_signal_before_the_time_limit_has_the_training_save_and_the_job_submitted_again(tmp_path):
    """The handler runs in the main thread, as that of submitit does, while the job waits for its training."""
    (tmp_path / "train.py").write_text(SLEEPING)
    run_dir = tmp_path / "sweep" / "a"
    command = [sys.executable, "-c", ON_A_NODE, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            while not (run_dir / "running").exists():
                assert process.poll() is None
                time.sleep(0.05)
            process.send_signal(signal.SIGUSR2)
            said, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, said) == (3, "again: a\n")
    assert (run_dir / "saved").exists()


def test_a_signal_before_the_job_has_begun_requeues_too(tmp_path, monkeypatch):
    helpers = types.SimpleNamespace(DelayedSubmission=lambda job: ("again", job.job))
    monkeypatch.setitem(sys.modules, "submitit", types.SimpleNamespace(helpers=helpers))
    job = Job(name="a", overrides=(), swept={})
    assert slurm.SlurmJob(job, Settings(folder=tmp_path)).checkpoint() == ("again", job)


def test_a_real_sweep_trains_scores_and_makes_its_tables(data_root, tmp_path, capsys):
    """One tiny training by the documented command; a copy with other answers is the second group."""
    folder = tmp_path / "sweep"
    command = [
        *(sys.executable, "scripts/train.py", "-m", f"--folder={folder}", "experiment=quickstart", "deepspeed=none"),
        *("optim.steps=2", "data.global_batch_size=2", "data.micro_batch_size=2", "log.tensorboard=false"),
        *("data.num_workers=0", "evals=[]", "ablation=choice(stride_16)"),
        "--evaluate=evals=[refshapes_val] predict.answer=forced max_images=3 resamples=9 examples=0 progress=false",
    ]
    done = start(command, data_root)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "1 finished" in done.stdout
    first, second = folder / "ablation-stride_16", folder / "ablation-other"
    assert json.loads((first / "export" / "config.json").read_text())["mask_stride"] == 16
    shutil.copytree(first, second)
    answers = second / "evaluation" / "refshapes_val" / "predictions.jsonl"
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    for row, other in zip(rows[::2], rows[1::2], strict=False):
        if row["image_id"] == other["image_id"]:
            row["segmentation"] = other["segmentation"]
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sweep = json.loads((folder / "sweep.json").read_text())
    sweep["jobs"]["ablation-other"] = {"swept": {"ablation": "other"}, "overrides": []}
    (folder / "sweep.json").write_text(json.dumps(sweep))
    tool = load_tool("make_tables")
    out, plot = tmp_path / "a.md", tmp_path / "a.png"
    assert tool.main([f"--sweep={folder}", "--baseline=stride_16", f"--plot={plot}", f"--out={out}"]) == 0
    said = capsys.readouterr().out
    score = json.loads((first / "evaluation" / "results.jsonl").read_text())["scores"]["ciou"]
    assert f"| ablation=stride_16 | {score:.3f} (1) |" in said
    # With one seed, the table equals the comparison of two runs.
    evals = [group / "evaluation" / "refshapes_val" for group in (first, second)]
    ciou = next(one for one in compare(*evals) if one.score == "ciou")
    assert ciou.a != ciou.b and ciou.interval is not None
    low, high = ciou.interval
    expected = f"{ciou.b - ciou.a:+.4f} | {low:+.4f} .. {high:+.4f} | {ciou.b - ciou.a:+.4f} |"
    assert f"| ablation=other: refshapes_val ciou | {expected}" in said
    assert out.read_text() == said and plot.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("ablation=a, lr=1", "ablation=a, lr=1"),
        ("data_a, lr=1", "ablation=data_a, lr=1"),
        ("data_b", "ablation=data_b, lr=1"),
        ("ablation=data_b", "ablation=data_b, lr=1"),
        ("10", "ablation=data_b_c, lr=10"),
        ("_c", "ablation=data_b_c, lr=10"),
    ],
)
def test_a_baseline_is_a_name_else_a_value_else_a_part_of_a_name(tmp_path, capsys, text, found):
    swept = [("a", "1"), ("data_a", "1"), ("data_b", "1"), ("data_b_c", "10")]
    jobs = {f"job_{index}": {"swept": {"ablation": a, "lr": lr}} for index, (a, lr) in enumerate(swept)}
    (tmp_path / "sweep.json").write_text(json.dumps({"jobs": jobs}))
    assert load_tool("make_tables").main([f"--sweep={tmp_path}", f"--baseline={text}"]) == 0
    assert f"## Differences to {found}\n" in capsys.readouterr().out


@pytest.mark.parametrize(("text", "said"), [("1", "fits 2 of the 3 groups"), ("data", "fits 2"), ("other", "fits 0")])
def test_a_baseline_that_is_not_one_group_is_rejected_with_the_names_to_choose_from(tmp_path, capsys, text, said):
    swept = [("a", "1"), ("data_a", "1"), ("data_c", "10")]
    jobs = {f"job_{index}": {"swept": {"ablation": a, "lr": lr}} for index, (a, lr) in enumerate(swept)}
    (tmp_path / "sweep.json").write_text(json.dumps({"jobs": jobs}))
    assert load_tool("make_tables").main([f"--sweep={tmp_path}", f"--baseline={text}"]) == 2
    error = capsys.readouterr().err
    assert said in error and "'ablation=data_a, lr=1'" in error


def test_spread_over_seeds_by_hand(tmp_path):
    folders = {}
    for seed, value in (("1", 0.5), ("2", 0.7)):
        folders[seed] = tmp_path / f"a__seed-{seed}"
        (folders[seed] / "evaluation").mkdir(parents=True)
        row = {"eval": "e", "scores": {"ciou": value, "count": 3}}
        (folders[seed] / "evaluation" / "results.jsonl").write_text(json.dumps(row) + "\n")
    jobs = {folder.name: {"swept": {"x": "a", "seed": seed}} for seed, folder in folders.items()}
    jobs["b__seed-1"] = {"swept": {"x": "b", "seed": "1"}}
    (tmp_path / "sweep.json").write_text(json.dumps({"jobs": jobs}))
    groups = read_groups(tmp_path)
    assert [(group.name, list(group.folders)) for group in groups] == [("x=a", ["1", "2"]), ("x=b", ["1"])]
    # Deviations of 0.1 on both sides: the root of 0.02 / (2 - 1).
    assert scores_table_of(groups).rows == (("x=a", ("0.600 +- 0.141 (2)",)), ("x=b", ("not run",)))


def test_the_papers_tables_are_printed_with_ours(tmp_path, capsys):
    tool = load_tool("make_tables")
    folder = tmp_path / "run" / "evaluation"
    folder.mkdir(parents=True)
    rows = [
        {"eval": "refcoco_val", "scores": {"ciou": 0.5, "paper_ciou": 0.25, "count": 3}},
        {"eval": "refcocog_region_caption", "scores": {"meteor": 0.1234}},
    ]
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    vqa = tmp_path / "results.json"
    vqa.write_text(json.dumps({"results": {"pixel_sail_mmstar": {"alias": "x", "average,none": 0.25}}}))
    assert tool.main([f"mine={tmp_path / 'run'}", f"--vqa=mine={vqa}"]) == 0
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert (
        "| **mine (paper)** | " + "**not run** | " * 5 + "**25.0** | " + "**not run** | " * 4 + "**not run** |" in lines
    )
    assert "| **mine (standard)** | " + "**not run** | " * 5 + "**50.0** |" in said
    assert "| Pixel-SAIL 0.5B | 70.8 | 75.8 |" in said and "| **mine** | **12.3** |" in lines
    assert "| **mine** | " + "**not run** | " * 4 + "**25.0** |" in lines
    assert "| SAM4MLLM 7B |" in said and "not verified" in said and said.count("## ") == 5
    assert tool.main([f"mine={tmp_path / 'nothing'}"]) == 2 and "results.jsonl" in capsys.readouterr().err
    assert tool.main(["runs/mine"]) == 2 and "NAME=PATH" in capsys.readouterr().err
    assert tool.main([f"--sweep={tmp_path}"]) == 2 and "sweep.json" in capsys.readouterr().err
