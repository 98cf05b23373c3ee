"""An evaluation with kills, lack of resources, damaged files or several ranks gives the scores of an undisturbed one.

Every run is a separate process of `scripts/evaluate.py`, forked from a process that has imported everything
once, because starting Python again would take most of the time.
"""

import json
import multiprocessing
import os
import resource
import runpy
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from running import ROOT, environment, free_port
from safetensors.torch import load_file, save_file

from pixel_sail.config import ConfigError, EvalConfig, PredictCommandConfig, load_config
from pixel_sail.evaluation.run import run_evals
from pixel_sail.model.processing_pixel_sail import PixelSailProcessor
from pixel_sail.predict_files import predict_files
from pixel_sail.predictor import Predictor, PredictorRequest
from pixel_sail.refshapes import RefShapesSpec, write_refshapes
from pixel_sail.training.run_lock import LOCK_FILE, RunLock
from pixel_sail.types import DataError

EVAL = "refshapes_val"
NUM_IMAGES = 7
"""Odd, so that only one rank divides them evenly."""

SEED = 20

SIZES = {"num_hidden_layers": 1, "max_long_side": 32}
"""Sizes of the model: there are many runs, and none depends on its answers."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Fault of a process."""

    killed_after_bytes: int | None = None
    """SIGKILL itself after this many bytes of answers, in the middle of a line or not."""
    largest_file_bytes: int | None = None
    """File size limit: the system writes part of a line and rejects the rest, as on a full disk."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """Exit statuses of processes, and their joint output."""

    statuses: list[int]
    said: str


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A benchmark of synthetic images and an untrained model."""

    data: Path
    checkpoint: Path

    def options(self, output: Path, *overrides: str) -> list[str]:
        """Return a command line; max_batch_tokens fits few images, so that every rank has several batches."""
        common = (f"checkpoint={self.checkpoint}", f"output={output}", f"evals=[{EVAL}]", "progress=false")
        return [*common, "predict.answer=forced", "predict.max_batch_tokens=700", "examples=1", *overrides]


FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["pixel_sail.evaluation.run", "hydra", "pytest"])


def evaluate_in_child(options: list[str], variables: dict[str, str], log: Path, fault: Fault) -> None:
    """Run scripts/evaluate.py in this process, which is a child that ends with it."""
    os.environ.update(variables)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if fault.largest_file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.largest_file_bytes, fault.largest_file_bytes))
    if fault.killed_after_bytes is not None:
        kill_after(fault.killed_after_bytes)
    sys.argv = ["scripts/evaluate.py", *options]
    runpy.run_path("scripts/evaluate.py", run_name="__main__")


def kill_after(num_bytes: int) -> None:
    """Kill this process by SIGKILL once it has written a number of bytes of answers."""
    write, left = os.write, num_bytes

    def counting(descriptor, data):
        nonlocal left
        if "jsonl" not in os.readlink(f"/proc/self/fd/{descriptor}"):
            return write(descriptor, data)
        if left <= len(data):
            write(descriptor, data[:left])
            os.kill(os.getpid(), signal.SIGKILL)
        left -= len(data)
        return write(descriptor, data)

    os.write = counting


def start(bench: Bench, output: Path, *overrides: str, ranks: int = 1, faults: dict[int, Fault] | None = None) -> Ended:
    """Run an evaluation on several ranks; if one fails, kill the others, as launchers do."""
    port = free_port()
    log = output.with_suffix(".log")
    log.unlink(missing_ok=True)
    processes = []
    for rank in range(ranks):
        launched = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        variables = environment(bench.data) | {name: str(value) for name, value in launched.items()}
        fault = (faults or {}).get(rank, Fault())
        arguments = (bench.options(output, *overrides), variables, log, fault)
        processes.append(FORKSERVER.Process(target=evaluate_in_child, args=arguments))
    for process in processes:
        process.start()
    waiting = {process.sentinel: process for process in processes}
    while waiting:
        ended = multiprocessing.connection.wait(waiting, timeout=120)
        bad = [waiting.pop(sentinel) for sentinel in ended]
        if not ended or any(process.exitcode != 0 for process in bad):
            for process in waiting.values():
                process.kill()
    return Ended(statuses=[process.exitcode for process in processes], said=log.read_text())


def lines(output: Path) -> list[str]:
    return (output / EVAL / "predictions.jsonl").read_text().splitlines()


def scores(output: Path) -> list[dict]:
    """Return the scores of every evaluation that ended in this folder."""
    return [json.loads(line)["scores"] for line in (output / "results.jsonl").read_text().splitlines()]


def parts(output: Path) -> list[str]:
    """Return the lines of all part files."""
    return [line for part in sorted((output / EVAL).glob("part-*")) for line in part.read_text().splitlines()]


@pytest.fixture(scope="module")
def bench(tiny_model, make_config, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    write_refshapes(folder / "refshapes", RefShapesSpec(seed=5, num_train=1, num_eval=NUM_IMAGES), num_workers=1)
    tiny_model(**SIZES).save_pretrained(folder / "export")
    PixelSailProcessor.for_model(tokenizer, make_config(**SIZES)).save_pretrained(folder / "export")
    return Bench(data=folder, checkpoint=folder / "export")


@pytest.fixture(scope="module")
def whole(bench, tmp_path_factory):
    """Output folder of an undisturbed evaluation."""
    output = tmp_path_factory.mktemp("whole") / "out"
    ended = start(bench, output)
    assert ended.statuses == [0], ended.said[-3000:]
    predictions = [json.loads(line) for line in lines(output)]
    assert len(predictions) > 2 * NUM_IMAGES and len({p["image_id"] for p in predictions}) == NUM_IMAGES
    assert all(prediction["segmentation"] for prediction in predictions)
    return output


def check_same(output: Path, whole: Path) -> None:
    assert lines(output) == lines(whole)
    assert sorted(parts(output)) == sorted(lines(whole)), "every expression was answered once"
    assert scores(output) == scores(whole)
    assert not (output / EVAL / ".predictions.jsonl").exists()


def check_message(ended: Ended, *said: str) -> None:
    """Check that a process ended with a message instead of a traceback."""
    assert 2 in ended.statuses, ended.said[-3000:]
    assert "Traceback" not in ended.said, ended.said[-3000:]
    assert "DataError: " in ended.said or "ConfigError: " in ended.said, ended.said
    assert all(words in ended.said for words in said), ended.said


# Killed.


def test_killed_at_five_random_moments_and_continued(bench, whole, tmp_path):
    output = tmp_path / "out"
    num_bytes = (whole / EVAL / "predictions.jsonl").stat().st_size
    moments = np.sort(np.random.default_rng(SEED).integers(1, num_bytes, size=5))
    for moment in moments:
        # A resumed run writes only the rest, so the point of the kill is relative to existing bytes.
        there = sum(part.stat().st_size for part in (output / EVAL).glob("part-*"))
        ended = start(bench, output, faults={0: Fault(killed_after_bytes=max(int(moment) - there, 1))})
        assert ended.statuses == [-signal.SIGKILL], ended.said[-3000:]
        assert not (output / "results.jsonl").exists()
    assert start(bench, output).statuses == [0]
    check_same(output, whole)


def test_killed_while_the_answers_are_put_together(bench, whole, tmp_path):
    output = tmp_path / "out"
    num_bytes = (whole / EVAL / "predictions.jsonl").stat().st_size
    ended = start(bench, output, faults={0: Fault(killed_after_bytes=num_bytes + num_bytes // 2)})
    assert ended.statuses == [-signal.SIGKILL], ended.said[-3000:]
    assert sorted(path.name for path in (output / EVAL).glob("*.jsonl")) == [".predictions.jsonl", "part-0.jsonl"]
    assert start(bench, output).statuses == [0]
    check_same(output, whole)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_share_an_odd_number_of_images(bench, whole, tmp_path, ranks):
    output = tmp_path / "out"
    ended = start(bench, output, ranks=ranks)
    assert ended.statuses == [0] * ranks, ended.said[-3000:]
    check_same(output, whole)
    assert all((output / EVAL / f"part-{rank}.jsonl").stat().st_size > 0 for rank in range(ranks))


def test_killed_on_two_ranks_and_continued_on_three(bench, whole, tmp_path):
    output = tmp_path / "out"
    num_bytes = (whole / EVAL / "predictions.jsonl").stat().st_size
    ended = start(bench, output, ranks=2, faults={1: Fault(killed_after_bytes=num_bytes // 4)})
    assert ended.statuses[1] == -signal.SIGKILL, ended.said[-3000:]
    assert 0 < len(parts(output)) < len(lines(whole))
    assert start(bench, output, ranks=3).statuses == [0] * 3
    check_same(output, whole)


# Damaged files.


def copied(whole: Path, tmp_path: Path, kept_lines: int) -> tuple[Path, Path]:
    """Return an output folder with the first answers of a complete one, and its answer file."""
    output = tmp_path / "out"
    (output / EVAL).mkdir(parents=True)
    (output / EVAL / "protocol.json").write_bytes((whole / EVAL / "protocol.json").read_bytes())
    part = output / EVAL / "part-0.jsonl"
    content = (whole / EVAL / "part-0.jsonl").read_text().splitlines(keepends=True)
    part.write_text("".join(content[:kept_lines]))
    return output, part


def test_a_corrupt_line_in_the_middle_is_named_and_the_rest_is_used_once_it_is_gone(bench, whole, tmp_path):
    output, part = copied(whole, tmp_path, kept_lines=6)
    sound = part.read_text().splitlines(keepends=True)
    part.write_text("".join([*sound[:2], sound[2][:40] + "\n", *sound[3:]]))
    damaged = part.read_bytes()
    check_message(start(bench, output), f"{part}:3: found no JSON", "remove or repair the line")
    assert part.read_bytes() == damaged
    part.write_text("".join([*sound[:2], *sound[3:]]))
    assert start(bench, output).statuses == [0]
    check_same(output, whole)


def test_an_item_with_a_truncated_line_is_queried_again(bench, whole, tmp_path):
    output, part = copied(whole, tmp_path, kept_lines=6)
    content = part.read_bytes()
    part.write_bytes(content[:-50])
    ended = start(bench, output)
    assert ended.statuses == [0] and "truncated an incomplete last line" in ended.said
    assert part.read_bytes().startswith(b"".join(content.splitlines(keepends=True)[:5]))
    check_same(output, whole)


def last_image(bench: Bench, whole: Path) -> Path:
    """Return the image that was asked about last."""
    image_id = json.loads(parts(whole)[-1])["image_id"]
    content = json.loads((bench.data / "refshapes" / "refshapes" / "instances.json").read_text())
    (name,) = (image["file_name"] for image in content["images"] if image["id"] == image_id)
    return bench.data / "refshapes" / "images" / "train2014" / name


def test_a_truncated_image_is_named_and_the_work_before_it_is_kept(bench, whole, tmp_path):
    output, image = tmp_path / "out", last_image(bench, whole)
    sound = image.read_bytes()
    try:
        image.write_bytes(sound[:200])
        check_message(start(bench, output), str(image), "cannot be decoded")
    finally:
        image.write_bytes(sound)
    kept = (output / EVAL / "part-0.jsonl").read_bytes()
    assert kept.endswith(b"\n") and not (output / EVAL / "predictions.jsonl").exists()
    assert start(bench, output).statuses == [0]
    assert (output / EVAL / "part-0.jsonl").read_bytes().startswith(kept)
    check_same(output, whole)


def test_a_missing_image_is_named_before_the_first_question_and_earlier_work_is_kept(bench, whole, tmp_path):
    output, part = copied(whole, tmp_path, kept_lines=6)
    kept, image = part.read_bytes(), last_image(bench, whole)
    moved = image.rename(image.with_suffix(".gone"))
    try:
        check_message(start(bench, output), str(image))
    finally:
        moved.rename(image)
    assert part.read_bytes() == kept
    assert start(bench, output).statuses == [0]
    assert part.read_bytes().startswith(kept)
    check_same(output, whole)


# Missing resources.


def test_a_full_disk_is_reported_and_earlier_work_is_kept(bench, whole, tmp_path):
    output = tmp_path / "out"
    num_bytes = (whole / EVAL / "predictions.jsonl").stat().st_size
    limit = num_bytes * 6 // 10
    part = output / EVAL / "part-0.jsonl"
    ended = start(bench, output, faults={0: Fault(largest_file_bytes=limit)})
    kept = part.read_bytes()
    check_message(ended, f"{part}: cannot be written (File too large)", "MiB are free in", "Free disk space")
    check_message(ended, f"ends with a whole line ({len(kept)} bytes, {kept.count(10)} lines")
    # The partially written line has been removed.
    assert kept.endswith(b"}\n") and 0 < len(kept) <= limit < num_bytes
    assert kept.decode().splitlines() == parts(whole)[: kept.count(b"\n")]
    assert start(bench, output).statuses == [0]
    assert part.read_bytes().startswith(kept)
    check_same(output, whole)


def test_a_disk_that_is_full_at_the_end_leaves_no_part_of_the_result(bench, whole, tmp_path):
    output, part = copied(whole, tmp_path, kept_lines=10**6)
    ended = start(bench, output, faults={0: Fault(largest_file_bytes=part.stat().st_size // 2)})
    check_message(ended, "predictions.jsonl: cannot be written (File too large)")
    assert not (output / EVAL / "predictions.jsonl").exists() and not (output / "results.jsonl").exists()
    assert start(bench, output).statuses == [0]
    check_same(output, whole)


def test_missing_java_is_reported_before_the_first_question(bench, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    folder = bench.data / "refshapes"
    overrides = (
        "evals=[perbench_caption]",
        f"evals.perbench_caption.annotations={folder / 'perbench' / 'STBench_Detailed_Caption.json'}",
        f"evals.perbench_caption.image_dir={folder / 'images' / 'train2014'}",
    )
    ended = start(bench, tmp_path / "out", *overrides)
    check_message(ended, "found no java on PATH", "install a Java runtime", "apt-get install default-jre-headless")
    assert not (tmp_path / "out").exists()


def run(bench: Bench, output: Path, monkeypatch, *overrides: str):
    """Run an evaluation in this process."""
    monkeypatch.setenv("PIXEL_SAIL_DATA", str(bench.data))
    return run_evals(load_config("evaluate", EvalConfig, bench.options(output, *overrides)))


def test_the_same_answer_in_two_files_counts_once(bench, whole, tmp_path, monkeypatch):
    output, part = copied(whole, tmp_path, kept_lines=6)
    part.with_name("part-1.jsonl").write_text("".join(part.read_text().splitlines(keepends=True)[3:5]))
    run(bench, output, monkeypatch)
    assert lines(output) == lines(whole) and scores(output) == scores(whole)


def test_two_different_answers_to_one_item_are_named(bench, whole, tmp_path, monkeypatch):
    output, part = copied(whole, tmp_path, kept_lines=6)
    other = json.loads(part.read_text().splitlines()[3]) | {"answer": "No."}
    second = part.with_name("part-1.jsonl")
    second.write_text(json.dumps(other) + "\n")
    with pytest.raises(DataError, match=f"{second}: found another answer .*{other['sent_id']}.* than in {part}"):
        run(bench, output, monkeypatch)
    second.unlink()
    run(bench, output, monkeypatch)
    assert lines(output) == lines(whole)


def test_answers_to_no_item_are_named(bench, whole, tmp_path, monkeypatch):
    output, part = copied(whole, tmp_path, kept_lines=99)
    alien = json.loads(part.read_text().splitlines()[3]) | {"ref_id": 987, "sent_id": 654}
    part.with_name("part-1.jsonl").write_text(json.dumps(alien) + "\n")
    with pytest.raises(DataError, match=r"0 items unanswered and 1 answers to no item, such as .*654"):
        run(bench, output, monkeypatch)


def test_a_second_evaluation_in_one_folder_is_rejected_and_names_the_first(bench, tmp_path):
    # Locks do not exclude within one process, so the second evaluation is a separate process.
    lock = RunLock(tmp_path / "out", name="output")
    try:
        ended = start(bench, tmp_path / "out")
    finally:
        lock.release()
    check_message(ended, f"output {tmp_path / 'out'} is in use by process {os.getpid()}", "choose another output")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [LOCK_FILE]


# Non-finite values of the model.


def broken(bench: Bench, folder: Path, name: str, value: float) -> Path:
    """Return a copy of the model with one weight changed."""
    shutil.copytree(bench.checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[0] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_integer_weights_are_rejected(bench, tmp_path, monkeypatch):
    folder = broken(bench, tmp_path / "model", "decoder.norm.weight", 1.0)
    weights = load_file(folder / "model.safetensors")
    weights["decoder.norm.weight"] = weights["decoder.norm.weight"].int()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"found \{'decoder\.norm\.weight': 'I32'\}, expected weights of"):
        run(bench, tmp_path / "out", monkeypatch, f"checkpoint={folder}")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_rejected_by_name(bench, tmp_path, monkeypatch, value):
    folder = broken(bench, tmp_path / "model", "decoder.norm.weight", value)
    with pytest.raises(DataError, match=r"found NaN or infinite numbers in decoder\.norm\.weight"):
        run(bench, tmp_path / "out", monkeypatch, f"checkpoint={folder}")
    with pytest.raises(ConfigError, match=r"found NaN or infinite numbers in decoder\.norm\.weight"):
        Predictor.from_pretrained(folder)


@pytest.mark.parametrize(
    ("answer", "said"), [("generated", "of the answer are not finite"), ("forced", "logits of a mask")]
)
def test_numbers_that_become_infinite_end_an_evaluation_with_the_item(bench, tmp_path, monkeypatch, answer, said):
    folder = broken(bench, tmp_path / "model", "decoder.norm.weight", 3e38)
    with pytest.raises(DataError) as refusal:
        run(bench, tmp_path / "out", monkeypatch, f"checkpoint={folder}", f"predict.answer={answer}")
    assert said in str(refusal.value) and "all weights are finite, so" in str(refusal.value)
    assert str(refusal.value).startswith("item (") and "train2014" in str(refusal.value)
    assert not (tmp_path / "out" / "results.jsonl").exists()


def test_numbers_that_become_infinite_end_a_question_with_the_image(bench, tmp_path):
    folder = broken(bench, tmp_path / "model", "decoder.norm.weight", 3e38)
    images = sorted((bench.data / "refshapes" / "images" / "train2014").iterdir())[:2]
    for image in images:
        (tmp_path / "images").mkdir(exist_ok=True)
        shutil.copy(image, tmp_path / "images")
    options = {"checkpoint": str(folder), "image": str(tmp_path / "images"), "question": "the star"}
    with pytest.raises(DataError, match=f"{images[0].name}: the logits of token .* of the answer are not finite"):
        list(predict_files(PredictCommandConfig(**options, output=str(tmp_path / "out"))))
    requests = [PredictorRequest(image=image, text="the star") for image in images]
    with pytest.raises(DataError, match="are not finite; all weights are finite, so"):
        Predictor.from_pretrained(folder).ask_many(requests)


# Answers of another evaluation.


@pytest.mark.parametrize(
    "changed",
    ["predict.prompt=paper", "predict.mask=first", "predict.max_new_tokens=3", "precision=bf16", "max_images=2",
     f"evals.{EVAL}.split=testA",
     f"+evals.{EVAL}.blind_baseline=language"],
)  # fmt: skip
def test_answers_to_other_questions_are_not_continued(bench, whole, monkeypatch, changed):
    check_refused(bench, whole, monkeypatch, changed)


def check_refused(bench, output, monkeypatch, *overrides, said=""):
    monkeypatch.setenv("PIXEL_SAIL_DATA", str(bench.data))
    files = {path: path.read_bytes() for path in output.rglob("*") if path.is_file() and path.name != LOCK_FILE}
    with pytest.raises(
        ConfigError, match=r"protocol\.json: found predictions of another protocol .*[Cc]hoose another"
    ) as refusal:
        run_evals(load_config("evaluate", EvalConfig, bench.options(output, *overrides)))
    after = {path: path.read_bytes() for path in output.rglob("*") if path.is_file() and path.name != LOCK_FILE}
    assert files == after
    assert said in str(refusal.value)


def test_answers_of_other_weights_are_not_continued_even_under_the_same_name(bench, whole, tiny_model, monkeypatch):
    weights = bench.checkpoint / "model.safetensors"
    own = weights.read_bytes()
    try:
        tiny_model(seed=1, **SIZES).save_pretrained(bench.checkpoint)
        check_refused(bench, whole, monkeypatch)
    finally:
        weights.write_bytes(own)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("config.json", '"rope_theta": 1000000.0', '"rope_theta": 10000.0'),
        ("processor_config.json", '"max_long_side": 32', '"max_long_side": 48'),
        ("tokenizer.json", '"add_prefix_space": false', '"add_prefix_space": true'),
        ("special_tokens_map.json", "", '{"eos_token": "<|im_end|>"}'),
    ],
)
def test_answers_of_a_model_with_another_file_are_not_continued(bench, whole, monkeypatch, name, old, new):
    file = bench.checkpoint / name
    own = file.read_text() if file.is_file() else None
    assert own is None or old in own
    try:
        file.write_text((own or "").replace(old, new) if old else new)
        check_refused(bench, whole, monkeypatch, said=f"model_files.{name}")
    finally:
        file.write_text(own) if own is not None else file.unlink()


def test_answers_about_other_annotations_are_not_continued(bench, whole, monkeypatch):
    file = bench.data / "refshapes" / "refshapes" / "instances.json"
    own, image = file.read_text(), last_image(bench, whole)
    renamed = image.with_name(f"other_{image.name}")
    renamed.write_bytes(image.read_bytes())
    try:
        file.write_text(own.replace(image.name, renamed.name))
        check_refused(bench, whole, monkeypatch)
    finally:
        file.write_text(own)
