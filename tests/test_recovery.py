"""A run gives the same result for any number of ranks and workers and after any number of interruptions.

All runs train on one mixture of text only, image chat, marked regions and masks, one sample per micro-batch:
in most steps some ranks have no image, no region or no mask where others have.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from running import BIN, ROOT, environment, free_port
from test_train import SMALL, log_lines, rank_variables, wait_for_lines
from torch.nn import functional as F

from pixel_sail.config import TrainConfig, load_config
from pixel_sail.data.loader import StreamAssignment, training_batches
from pixel_sail.data.packing import StreamState
from pixel_sail.losses.mask import point_losses
from pixel_sail.training.build import build_model
from pixel_sail.training.optim import build_optimizer, set_learning_rate
from pixel_sail.training.prepare import build_mixture
from pixel_sail.training.schedule import learning_rate

STEPS = int(os.environ.get("MIXED_STEPS", "20"))
"""For more steps: `MIXED_STEPS=200 pytest tests/test_recovery.py -k two_processes`."""

TOLERANCE = 2e-5
"""Relative tolerance of every logged metric over 20 steps: ranks sum in another order than one process. Measured on two
CPU cores: at most 1.4e-7 for losses and 4e-6 for the gradient norm."""


@pytest.fixture(scope="module")
def mixed(data_root, tmp_path_factory):
    """Return the overrides of the mixture."""
    folder = tmp_path_factory.mktemp("mixed")
    texts = [
        {
            "id": str(number),
            "conversations": [
                {"from": "human", "value": f"What is {number} and {number}?"},
                {"from": "gpt", "value": f"It is {2 * number}."},
            ],
        }
        for number in range(8)
    ]
    (folder / "texts.json").write_text(json.dumps(texts))
    sampled = "${paths.data}/refshapes"
    images = f"{sampled}/images/train2014"
    return (
        *(item for item in SMALL if not item.startswith(("data.sources", "data.repeats", "experiment", "data.pack"))),
        *("name=mixed", "model=tiny", "source@data.sources=[refshapes,llava_mix665k,osprey_short_form]"),
        f"data.sources.llava_mix665k.annotations={sampled}/llava/llava_v1_5_mix665k.json",
        f"data.sources.llava_mix665k.image_dir={sampled}/images",
        f"data.sources.osprey_short_form.annotations={sampled}/osprey/osprey_short_form.json",
        f"data.sources.osprey_short_form.image_dirs=[{images}]",
        "+data.sources.texts={_target_: pixel_sail.data.sources.llava.load, name: texts, "
        f"annotations: {folder / 'texts.json'}, image_dir: {folder}}}",
        *("+data.repeats.texts=2.5", "data.global_batch_size=4", "data.micro_batch_size=1"),
        *("data.packing.max_samples=1", "data.packing.seq_len=1024", "data.packing.packing_buffer=1"),
        *(f"optim.steps={STEPS}", "checkpoint.every=1000"),
    )


def train(data_root, run_dir, *overrides, ranks=1):
    start = [sys.executable]
    if ranks > 1:
        start = [str(BIN / "torchrun"), f"--nproc-per-node={ranks}", f"--master-port={free_port()}"]
    done = subprocess.run(
        [*start, "tests/recorded_train.py", f"run_dir={run_dir}", *overrides],
        cwd=ROOT,
        # One thread, as torchrun sets it: other numbers of threads sum in another order.
        env=environment(data_root) | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=260 + STEPS,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def global_batches(run_dir: Path) -> list[list[dict]]:
    """Return the contents of each micro-batch of each rank, per step."""
    steps: dict[int, list[dict]] = {}
    for path in sorted((run_dir / "batches").iterdir()):
        start = int(path.name.split("_")[0])
        for offset, line in enumerate(path.read_text().splitlines()):
            steps.setdefault(start + offset, []).extend(json.loads(line))
    assert sorted(steps) == list(range(len(steps)))
    return [steps[step] for step in sorted(steps)]


def sample_ids(run_dir: Path) -> list[list[str]]:
    return [sorted(name for batch in step for name in batch["samples"]) for step in global_batches(run_dir)]


def assert_same_run(run_dir: Path, expected_dir: Path, *, without: tuple[str, ...] = ()) -> None:
    assert sample_ids(run_dir) == sample_ids(expected_dir)
    lines, expected = log_lines(run_dir), log_lines(expected_dir)
    assert len(lines) == len(expected) == STEPS
    # The grouping of samples into rows affects only their padding.
    ignored = {"data/padding_fraction", *without}
    for line, other in zip(lines, expected, strict=True):
        assert line.keys() - ignored == other.keys() - ignored
        numbers = {key: value for key, value in line.items() if key not in ignored}
        assert numbers == pytest.approx({key: other[key] for key in numbers}, rel=TOLERANCE, abs=1e-6)


@pytest.fixture(scope="module")
def whole(data_root, mixed, tmp_path_factory):
    """One process without DeepSpeed, four micro-batches a step."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    train(data_root, run_dir, *mixed, "deepspeed=none")
    return run_dir


@pytest.mark.parametrize("stage", range(4))
def test_two_processes_of_every_zero_stage_equal_one_process_for_20_steps(data_root, mixed, whole, tmp_path, stage):
    run_dir = tmp_path / "run"
    train(data_root, run_dir, *mixed, f"deepspeed=zero{stage}", ranks=2)
    # DeepSpeed reports no gradient norm without ZeRO.
    assert_same_run(run_dir, whole, without=("optim/grad_norm",) if stage == 0 else ())
    for missing in ("images", "prompts", "masks"):
        uneven = [
            micro
            for step in zip(*(read_rank(run_dir, rank) for rank in range(2)), strict=True)
            for micro in zip(*step, strict=True)
            if len({batch[missing] > 0 for batch in micro}) == 2
        ]
        assert len(uneven) >= 5, f"too few micro-batches without {missing} on one rank only"


SAMPLE_MEANS = ("loss.mean=sample", "optim.steps=3", "data.global_batch_size=6")


def released_losses(config):
    """Return the totals of a plain loop like the released training: every sample separately, means per sample."""
    model, processor = build_model(config.model, seed=config.seed, teachers={})
    model.train()
    optimizer = build_optimizer(model, config.optim)
    assignment = StreamAssignment(
        global_batch_size=config.data.global_batch_size, rank=0, world_size=1, micro_batch_size=1
    )
    steps = training_batches(
        build_mixture(config.data, seed=config.seed),
        processor,
        config.data.packing,
        assignment,
        start=[StreamState()] * assignment.num_streams,
        num_workers=0,
    )
    totals = []
    for step, data in enumerate(islice(steps, config.optim.steps)):
        losses = [released_loss(model, batch, config.loss) for batch in data.batches]
        total = sum(losses) / len(losses)
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.max_grad_norm)
        set_learning_rate(optimizer, learning_rate(step, config.optim))
        optimizer.step()
        optimizer.zero_grad()
        totals.append(total.item())
    return totals


def released_loss(model, batch, config):
    """Return the loss of a single sample: means over its tokens and masks, text times 0.1 if there are masks."""
    assert len(batch.sample_ids) == 1
    output = model(**batch.model_inputs())
    text = F.cross_entropy(output.logits.float(), batch.targets_M)
    if not batch.masks:
        return config.text * text + output.zero_loss
    (logits,) = output.mask_logits
    generator = torch.Generator().manual_seed(batch.point_seeds[0])
    sums = point_losses(logits, torch.stack(batch.masks), config.points, generator)
    masks = (config.bce * sums.bce + config.dice * sums.dice) / len(batch.masks)
    return config.text * config.text_factor_with_masks * text + masks + output.zero_loss


@pytest.mark.parametrize(("ranks", "stage", "accumulation"), [(1, 2, 1), (1, 0, 3), (2, 0, 1), (2, 2, 3)])
def test_means_of_samples_train_as_the_release_does(data_root, mixed, tmp_path, ranks, stage, accumulation):
    config = load_config("train", TrainConfig, [*mixed, *SAMPLE_MEANS, f"paths.data={data_root}"])
    own = (f"data.micro_batch_size={6 // ranks // accumulation}", f"deepspeed=zero{stage}")
    train(data_root, tmp_path / "run", *mixed, *SAMPLE_MEANS, *own, ranks=ranks)
    lines = log_lines(tmp_path / "run")
    assert [line["loss/total"] for line in lines] == pytest.approx(released_losses(config), rel=1e-6)
    # The mix has samples with and without masks, so the global means differ.
    weights = config.loss
    for line in lines:
        parts = weights.text * line["loss/text"] + weights.bce * line["loss/bce"] + weights.dice * line["loss/dice"]
        assert abs(parts - line["loss/total"]) > 1e-3


def test_layers_that_are_recomputed_are_gathered_again(data_root, mixed, tmp_path):
    """Wide enough for ZeRO-3, which shards weights of more than 10,000 elements."""
    wide = ("model.architecture.hidden_size=128", "model.architecture.intermediate_size=256", "optim.steps=4")
    train(data_root, tmp_path / "plain", *mixed, *wide, "deepspeed=none")
    expected = [line["loss/total"] for line in log_lines(tmp_path / "plain")]
    for kind in ("feed_forward", "layers"):
        sharded = ("deepspeed=zero3", f"optim.activation_checkpointing={kind}")
        train(data_root, tmp_path / kind, *mixed, *wide, *sharded, ranks=2)
        found = [line["loss/total"] for line in log_lines(tmp_path / kind)]
        assert len(found) == 4 and found == pytest.approx(expected, rel=TOLERANCE)


def read_rank(run_dir: Path, rank: int) -> list[list[dict]]:
    return [json.loads(line) for line in (run_dir / "batches" / f"0000_{rank}.jsonl").read_text().splitlines()]


def test_one_micro_batch_a_step_equals_four(data_root, mixed, whole, tmp_path):
    train(data_root, tmp_path / "run", *mixed, "deepspeed=none", "data.micro_batch_size=4")
    assert_same_run(tmp_path / "run", whole)


def test_a_run_goes_on_with_other_numbers_of_processes_and_other_zero_stages(data_root, mixed, whole, tmp_path):
    sessions = ((0, 2), (1, 4), (2, 1), (3, 2))
    for stage, ranks in sessions:
        overrides = (f"deepspeed=zero{stage}", "checkpoint.stop_after=4")
        train(data_root, tmp_path / "run", *mixed, *overrides, ranks=ranks)
    train(data_root, tmp_path / "run", *mixed, "deepspeed=none")
    assert sorted(path.name for path in (tmp_path / "run" / "batches").iterdir()) == [
        *("0000_0.jsonl", "0000_1.jsonl"),
        *(f"0004_{rank}.jsonl" for rank in range(4)),
        *("0008_0.jsonl", "0012_0.jsonl", "0012_1.jsonl", "0016_0.jsonl"),
    ]
    assert_same_run(tmp_path / "run", whole, without=("optim/grad_norm",))


@contextlib.contextmanager
def two_ranks(command, data_root):
    """Yield two processes of one run, and kill them at the end."""
    port = free_port()
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(data_root) | rank_variables(rank, 2, port=port),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()


WAITING = """
import sys, time
import torch
from torch import distributed
from torch.distributed import distributed_c10d
from pixel_sail import dist
from pixel_sail.config import TrainConfig, load_config
from pixel_sail.training.prepare import prepare
prepare(load_config("train", TrainConfig, sys.argv[1:]), lock=False)
groups = list(distributed_c10d._world.pg_map)
seconds = []
for group in groups:
    start = time.monotonic()
    try:
        if dist.rank() == 0:
            distributed.all_reduce(torch.ones(3), group=group)
    except RuntimeError:
        seconds.append(round(time.monotonic() - start))
if dist.rank() == 0:
    print("waited", len(groups), seconds, file=sys.stderr)
else:
    time.sleep(600)
"""


def test_every_process_group_waits_as_long_as_configured(data_root, mixed, tmp_path):
    """Also in the groups created by DeepSpeed: the other process is silent in all of them."""
    (tmp_path / "waiting.py").write_text(WAITING)
    overrides = ("deepspeed=zero2", "watchdog.peer_timeout_s=3", f"run_dir={tmp_path / 'run'}")
    with two_ranks([sys.executable, str(tmp_path / "waiting.py"), *mixed, *overrides], data_root) as processes:
        message = processes[0].communicate(timeout=120)[1]
    (line,) = (line for line in message.splitlines() if line.startswith("waited"))
    _, number, seconds = line.split(maxsplit=2)
    assert int(number) > 1, "DeepSpeed makes no group of its own any more"
    # The first wait, or the connection that it breaks, ends a group; none waits for torch's own 30 minutes.
    assert len(json.loads(seconds)) == int(number) and max(json.loads(seconds)) < 30, message[-3000:]


@pytest.mark.parametrize("how", ["killed", "silent"])
def test_a_run_that_loses_a_process_ends_in_time_with_a_message(data_root, mixed, tmp_path, how):
    """A killed process closes its connections; a stopped one is silent, like a host with a pulled cable."""
    overrides = ("deepspeed=zero2", "optim.steps=2000", "watchdog.peer_timeout_s=5")
    command = [sys.executable, "scripts/train.py", *mixed, *overrides, f"run_dir={tmp_path / 'run'}"]
    with two_ranks(command, data_root) as processes:
        wait_for_lines(tmp_path / "run" / "log.jsonl", 2, processes)
        processes[1].send_signal(signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        message = processes[0].communicate(timeout=120)[1]
    assert processes[0].returncode == 86, message[-3000:]
    assert "LostPeer: rank 0 of 2 lost another process" in message
    assert "the same command again to resume from the last complete checkpoint" in message


def test_a_run_killed_four_times_also_while_saving_has_the_log_of_one_that_was_not(tmp_path):
    """`tools/soak.py` compares log and weights with an uninterrupted run and checks for leftovers."""
    options = ["--steps", "40", "--every", "4", "--validate-every", "0", "--kills", "4", "--work", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "tools/soak.py", *options, "--json", str(tmp_path / "result.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert [kill["point"] for kill in result["kills"]] == ["line", "writing", "renamed", "deleting"]
    assert result["log_lines"] == 40 and result["faults"] == []
