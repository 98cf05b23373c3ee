"""Logging of a run: speed and memory metrics, terminal lines or progress bar, TensorBoard and wandb."""

import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import numpy as np
import pytest
import torch
from PIL import Image
from running import ROOT, environment
from test_train import SMALL, log_lines, train

from pixel_sail.config import ConfigError, LogConfig
from pixel_sail.planning.flops import forward_flops, useful_flops
from pixel_sail.planning.workload import Workload, of_batch
from pixel_sail.training import metrics as metrics_module
from pixel_sail.training.log import TIMING_FIELDS
from pixel_sail.training.metrics import PerfMetrics, named_peak_tflops, peak_memory_bytes, perf_numbers

PLAIN = re.compile(r"pixel_sail\.training\.log: (step .*)")


@pytest.fixture
def rows(make_sample, processor):
    """Two rows of examples: images of two sizes with masks, one without, and a sample of text alone."""
    rng = np.random.default_rng(0)
    wanted = [[((64, 48), (2, 1)), ((40, 64), (1,)), (None, (0,))], [((48, 48), (0, 0))]]
    sampled = [[make_sample(rng, size_hw=size, masks_per_turn=masks) for size, masks in row] for row in wanted]
    return [[processor.encode_sample(*pair, independent_turns=True) for pair in row] for row in sampled]


def test_useful_operations_are_those_of_each_sample_alone(rows, make_batch, make_config):
    config = make_config(num_visual_prompts=0)  # else every micro-batch projects them once
    packed = of_batch(make_batch(*rows))
    alone = [of_batch(make_batch([example])) for row in rows for example in row]
    assert packed.rows * packed.tokens_per_row > packed.real_tokens, "the batch must contain padding"
    together = useful_flops(config, packed, {})
    assert together == pytest.approx(sum(useful_flops(config, work, {}) for work in alone), rel=1e-12)
    assert together < 3 * forward_flops(config, packed, {}).total


def test_useful_operations_of_a_text_are_those_counted_by_hand(tiny_config):
    sizes = {"rows": 1, "tokens_per_row": 8, "supervised": 2, "samples": 1, "real_tokens": 5}
    work = Workload(images=(), seen_pairs=15, computed_pairs=25, computed_keys=5, **sizes)
    # Width 32, key and value width 16, inner width 48, 2 layers, 320 words; twice an addition and a multiplication.
    linear = 2 * 2 * 5 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    attention = 2 * 2 * 2 * 15 * 32
    text_head = 2 * 2 * 32 * 320
    prompts = forward_flops(tiny_config, work, {}).image_embedding
    assert useful_flops(tiny_config, work, {}) == 3 * (linear + attention + text_head + prompts)


def test_the_numbers_of_a_line_are_sums_over_steps_and_ranks():
    ranks = torch.tensor([[0.5, 2e9, 6e12, 4e12], [1.5, 3e9, 2e12, 12e12]], dtype=torch.float64)
    assert perf_numbers(ranks, steps=5, seconds=4.0, tokens=1000, samples=50) == {
        "perf/tokens_per_s": 250.0,
        "perf/samples_per_s": 12.5,
        "time/step_s": 0.8,
        "time/data_s": 0.3,
        "perf/mfu": 0.125,
        "perf/memory_gb": 3.0,
    }
    ranks[1, 3] = 0.0
    assert "perf/mfu" not in perf_numbers(ranks, steps=5, seconds=4.0, tokens=1000, samples=50)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


def test_metrics_time_only_steps(rows, make_batch, tiny_config, monkeypatch):
    clock, batch = Clock(), make_batch(*rows)
    monkeypatch.setattr(metrics_module, "time", clock)
    perf = PerfMetrics(tiny_config, {}, peak_tflops=1e-6, device=torch.device("cpu"))
    lines = []
    for waits in ((1.0, 3.0), (0.25,)):
        for wait in waits:
            perf.step_started()
            clock.now += wait
            perf.data_loaded()
            clock.now += 2.0
            perf.step_done([batch, batch], tokens=600, samples=12)
            clock.now += 50.0  # a checkpoint
        lines.append(perf.read())
    assert [line["time/step_s"] for line in lines] == [4.0, 2.25]
    assert [line["time/data_s"] for line in lines] == [2.0, 0.25]
    assert [line["perf/tokens_per_s"] for line in lines] == [1200 / 8, pytest.approx(600 / 2.25, rel=1e-3)]
    assert lines[0]["perf/samples_per_s"] == 3.0
    operations = 4 * useful_flops(tiny_config, of_batch(batch), {})
    assert lines[0]["perf/mfu"] == pytest.approx(operations / 8.0 / 1e6, rel=1e-3)
    assert set(lines[0]) < set(TIMING_FIELDS)


def test_without_a_known_peak_nothing_is_counted(rows, make_batch, tiny_config, monkeypatch):
    monkeypatch.setattr(metrics_module, "of_batch", lambda batch: pytest.fail("counted for nothing"))
    perf = PerfMetrics(tiny_config, {}, peak_tflops=None, device=torch.device("cpu"))
    perf.step_started()
    perf.data_loaded()
    perf.step_done([make_batch(*rows)], tokens=1, samples=1)
    assert "perf/mfu" not in perf.read()


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA GeForce RTX 4090", 165.0),
        ("NVIDIA GeForce RTX 4090 D", 0.0),
        ("NVIDIA H20", 0.0),
        ("Abacus", 0.0),
    ],
)
def test_a_gpu_is_identified_by_its_full_name(name, peak):
    assert named_peak_tflops(name) == peak


def test_peak_memory_is_that_of_this_process_and_stays_when_memory_is_given_back():
    device = torch.device("cpu")
    held = np.ones(40_000_000)
    assert peak_memory_bytes(device) >= held.nbytes
    peak = peak_memory_bytes(device)
    del held
    assert peak_memory_bytes(device) >= peak - 10_000_000, "the kernel counts in batches of pages"


def test_a_peak_of_nothing_is_rejected():
    with pytest.raises(ConfigError, match=r"log\.peak_tflops is 0"):
        LogConfig(peak_tflops=0.0)


def read_wandb(path):
    """Return the records of a file of wandb: chunks of at most 32 KiB blocks, each with checksum, length and kind."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, offset, chunks, records = path.read_bytes(), 7, [], []
    assert content[:4] == b":W&B"
    while offset < len(content):
        if 32768 - offset % 32768 < 7:
            offset += 32768 - offset % 32768
            continue
        length, kind = struct.unpack("<HB", content[offset + 4 : offset + 7])
        chunks.append(content[offset + 7 : offset + 7 + length])
        offset += 7 + length
        if kind in (1, 4):  # whole, or the last chunk
            records.append(Record.FromString(b"".join(chunks)))
            chunks = []
    return records


def history(records):
    """Return {key: value} of every logged row."""
    rows = [record.history.item for record in records if record.WhichOneof("record_type") == "history"]
    return [{item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]


def on_a_terminal(command, data_root):
    """Return what a command writes to stderr where that is a terminal of 160 columns."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 160))
    process = subprocess.Popen(command, cwd=ROOT, env=environment(data_root), stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    written = []
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        written.append(part)
    os.close(ours)
    said = b"".join(written).decode()
    assert process.wait(timeout=280) == 0, said[-3000:]
    return said


EVERYTHING = (
    *("deepspeed=none", "optim.steps=5", "log.progress=true", "log.tensorboard=true", "log.wandb=offline"),
    *("validation.every=2", "validation.max_images=1", "evals=[refshapes_val]", "log.overlays=1"),
)


@pytest.fixture(scope="module")
def two_sessions(data_root, tmp_path_factory):
    """A run of five steps: three on a terminal, two more without one."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    command = [sys.executable, "scripts/train.py", *SMALL, f"run_dir={run_dir}", *EVERYTHING]
    terminal = on_a_terminal([*command, "checkpoint.stop_after=3"], data_root)
    return run_dir, terminal, train(data_root, run_dir, *EVERYTHING)


def test_a_terminal_shows_a_bar_with_losses_speed_and_time_left(two_sessions):
    _, terminal, _ = two_sessions
    assert not PLAIN.findall(terminal)
    bars = [part for part in re.split(r"[\r\n]+", terminal) if re.search(r"\d/5 \[", part)]
    assert re.search(r" 3/5 \[\d\d:\d\d<\d\d:\d\d, .*total=\d\.\d{3}, bce=.*tokens/s=[\d,]+", bars[-1]), bars
    assert re.search(r"^step 2/5, refshapes_val: ciou \d\.\d{3}, giou \d\.\d{3}$", terminal.replace("\r", "\n"), re.M)


def test_without_a_terminal_every_logged_step_is_one_plain_line(two_sessions):
    run_dir, _, piped = two_sessions
    assert "\r" not in piped and "step/s" not in piped
    steps = [line for line in PLAIN.findall(piped) if ": total" in line]
    logged = [line for line in log_lines(run_dir) if "loss/total" in line][3:]
    assert len(steps) == len(logged) == 2
    for said, line in zip(steps, logged, strict=True):
        assert said.startswith(f"step {line['step']}/5: total {line['loss/total']:.3f}, bce {line['loss/bce']:.3f}, ")
        assert re.search(r", lr \d\.\de-\d\d, grad_norm \d+\.\d\d, [\d,]+ tokens/s, \d\d:\d\d left$", said)
    assert "step 4/5, refshapes_val: ciou" in piped


def test_the_file_has_the_numbers_under_earlier_keys_as_well(two_sessions):
    lines = [json.loads(line) for line in (two_sessions[0] / "log.jsonl").read_text().splitlines()]
    for old, new in (("total", "loss/total"), ("data_wait_s", "time/data_s"), ("skipped", "data/skipped")):
        assert [line[old] for line in lines if old in line] == [line[new] for line in lines if new in line] != []


def test_tensorboard_has_the_metrics_and_images_of_both_sessions(two_sessions):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir, _, _ = two_sessions
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    for name in ("loss/total", "optim/grad_norm", "refshapes/dice", "perf/tokens_per_s", "refshapes_val/ciou"):
        expected = [(line["step"], line[name]) for line in lines if name in line]
        assert len(expected) == (2 if name == "refshapes_val/ciou" else 5)
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        assert np.allclose(shown, expected, rtol=1e-5), name
    assert "total" not in events.Tags()["scalars"]
    images = events.Images("refshapes_val/0")
    assert [image.step for image in images] == [2, 4]
    with Image.open(io.BytesIO(images[0].encoded_image_string)) as image:
        assert image.width > image.height, "true and predicted mask side by side"


def test_wandb_resumes_offline_under_the_same_id(two_sessions):
    run_dir, _, _ = two_sessions
    own = (run_dir / "wandb_id").read_text()
    files = sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"))
    assert [path.name for path in files] == [f"run-{own}.wandb"] * 2
    totals, images = [], []
    for path in files:
        records = read_wandb(path)
        assert {record.run.run_id for record in records if record.HasField("run")} == {own}
        rows = history(records)
        totals += [(row["_step"], row["loss/total"]) for row in rows if "loss/total" in row]
        images += [row["_step"] for row in rows if "refshapes_val.filenames" in row]
        assert list(path.parent.glob("files/media/images/*.png"))
    expected = [(line["step"], line["loss/total"]) for line in log_lines(run_dir) if "loss/total" in line]
    assert totals == expected and images == [2, 4]


def test_two_ranks_write_one_log_of_their_common_numbers(data_root, tmp_path):
    overrides = ("optim.steps=5", "log.every=2", "log.progress=true", "log.peak_tflops=0.1")
    said = train(data_root, tmp_path / "run", *overrides, by="torchrun")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 5]
    assert [re.match(r"step \d", line)[0] for line in PLAIN.findall(said)] == ["step 2", "step 4", "step 5"]
    for line in lines:
        assert set(TIMING_FIELDS) <= set(line)
        assert 0 <= line["time/data_s"] < line["time/step_s"] and 0 < line["perf/mfu"] < 1
        assert 0.05 < line["perf/memory_gb"] < 20
    # The last line covers one step alone, whose counts it also holds; the others two steps.
    last = lines[-1]
    assert last["perf/tokens_per_s"] * last["time/step_s"] == pytest.approx(last["data/tokens"], rel=2e-3)
    assert last["perf/samples_per_s"] * last["time/step_s"] == pytest.approx(last["data/samples"], rel=2e-3)
    samples = sum(lines[0][f"{name}/samples"] for name in ("refshapes", "groupshapes"))
    assert 2 * lines[0]["perf/samples_per_s"] * lines[0]["time/step_s"] == pytest.approx(samples, rel=2e-3)
