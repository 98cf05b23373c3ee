"""The adapter inside lmms-eval itself: registry, our task files on synthetic images, scores, several processes."""

import base64
import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from running import ROOT

from pixel_sail.config import ConfigError
from pixel_sail.evaluation.predict import BatchPredictor, PredictorOutput
from pixel_sail.model.processing_pixel_sail import PixelSailProcessor
from pixel_sail.types import DataError
from pixel_sail.vqa.answering import answer
from pixel_sail.vqa.prompts import lettered_question, mme_question, seed_question

REASON = "needs the kit: pip install -e .[vqa]"
pytest.importorskip("lmms_eval", reason=REASON)
datasets = pytest.importorskip("datasets", reason=REASON)

from pixel_sail.vqa.lmms_eval_plugin import TASK_FOLDER, manifest, register, with_default_options  # noqa: E402

TEMPLATES = {
    "pixel_sail_mme": mme_question,
    "pixel_sail_mmbench_en_dev": lettered_question,
    "pixel_sail_seed_image": seed_question,
    "pixel_sail_mmstar": lettered_question,
}


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    for name, value in {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "CUDA_VISIBLE_DEVICES": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)


@pytest.fixture(scope="module")
def checkpoint(tiny_model, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "export"
    tiny_model().save_pretrained(folder)
    processor.save_pretrained(folder)
    assert PixelSailProcessor.from_pretrained(folder).seg_id == processor.seg_id
    return folder


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(5)
    return [Image.fromarray(rng.integers(0, 256, (16, 24, 3), dtype=np.uint8)) for _ in range(3)]


def rows_of(task: str, images) -> list[dict]:
    """Some documents with the columns of the benchmark."""
    options = {"A": "red", "B": "blue", "C": "green", "D": "nan"}
    if task == "pixel_sail_mme":
        names = ("existence", "existence", "existence", "existence", "code_reasoning", "code_reasoning")
        return [
            {
                "question_id": f"{category}/{i // 2}",
                "image": images[i // 2],
                "question": f"Is it number {i}? Please answer yes or no.",
                "answer": ("Yes", "No")[i % 2],
                "category": category,
            }
            for i, category in enumerate(names)
        ]
    if task == "pixel_sail_mmbench_en_dev":
        keys = {"category": "color", "L2-category": "perception", "source": "sampled", "split": "dev"}
        return [
            {
                "index": i,
                "question": f"Color {i}?",
                "hint": ("nan", "Look.")[i % 2],
                "answer": "ABC"[i],
                "image": image,
            }
            | options
            | keys
            for i, image in enumerate(images)
        ]
    if task == "pixel_sail_seed_image":
        choices = {f"choice_{letter}": letter * 2 for letter in "abcd"}
        return [
            {
                "question_id": str(i),
                "question": f"Pick {i}?",
                "answer": "ABC"[i % 3],
                "data_type": "video" if i == 1 else "image",
                "image": images[:2] if i == 1 else [images[i // 2]],
            }
            | choices
            for i in range(5)
        ]
    return [
        {
            "index": i,
            "question": f"Which {i}?",
            "answer": "ABC"[i],
            "category": ("math", "coarse perception", "math")[i],
            "l2_category": ("geometry", "image emotion", "statistical reasoning")[i],
            "image": png_base64(image),
        }
        | options
        for i, image in enumerate(images)
    ]


def png_base64(image) -> str:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


@pytest.fixture
def local_tasks(tmp_path, images) -> Path:
    """A folder with our task files, changed only to read synthetic documents."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    for file in TASK_FOLDER.glob("*.yaml"):
        rows = rows_of(file.stem, images)
        data = datasets.Dataset.from_list(rows)
        if file.stem != "pixel_sail_mmstar":
            one = datasets.Image()
            data = data.cast_column("image", datasets.Sequence(one) if file.stem == "pixel_sail_seed_image" else one)
        data.to_parquet(str(folder / f"{file.stem}.parquet"))
        kept = [line for line in file.read_text().splitlines() if not line.startswith(("dataset_path", "dataset_name"))]
        split = next(line.split()[1] for line in kept if line.startswith("test_split"))
        source = f"dataset_path: parquet\ndataset_kwargs: {{data_files: {{{split}: {folder / file.stem}.parquet}}}}\n"
        (folder / file.name).write_text(source + "\n".join(kept) + "\n")
    return folder


def evaluate(model, tasks: Path, *names: str):
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False, model_name="pixel_sail")
    cli = SimpleNamespace(output_path=str(tasks), process_with_media=False)
    return simple_evaluate(
        model=model, tasks=list(names), task_manager=manager, log_samples=True, bootstrap_iters=0, cli_args=cli
    )


@pytest.fixture
def model(checkpoint):
    from pixel_sail.vqa.lmms_eval_model import PixelSail

    return PixelSail(pretrained=str(checkpoint))


def test_the_registry_of_the_kit_finds_and_checks_the_class():
    from lmms_eval.models import get_model

    from pixel_sail.vqa.lmms_eval_model import PixelSail

    register()
    assert get_model("pixel_sail") is PixelSail
    assert manifest().model_id == "pixel_sail"


def test_every_task_file_is_known_to_the_tests():
    assert {file.stem for file in TASK_FOLDER.glob("*.yaml")} == TEMPLATES.keys()


@pytest.mark.parametrize("task", sorted(TEMPLATES))
def test_the_kit_gets_the_answer_of_a_single_question_for_every_document(task, model, local_tasks, images, checkpoint):
    samples = evaluate(model, local_tasks, task)["samples"][task]
    rows = [row for row in rows_of(task, images) if row.get("data_type") != "video"]
    predictor = BatchPredictor.from_pretrained(checkpoint)
    expected = []
    for row in rows:
        image = row["image"][0] if task == "pixel_sail_seed_image" else row["image"]
        if isinstance(image, str):
            image = Image.open(io.BytesIO(base64.b64decode(image)))
        expected.append(answer(predictor, image, TEMPLATES[task](row), max_new_tokens=16))
    found = {sample["doc_id"]: sample["resps"][0][0] for sample in samples}
    assert [found[i] for i in range(len(rows))] == expected
    asked = {sample["doc_id"]: sample["arguments"][0] for sample in samples}
    assert [asked[i] for i in range(len(rows))] == [TEMPLATES[task](row) for row in rows]


def test_answers_become_the_scores_of_the_kit(model, local_tasks, monkeypatch):
    """MME: two images of perception, one answered right twice, the other once: (100 + 100 + 50 + 0) / 2 = 125."""
    said = {"0": "Yes.", "1": "no", "2": "Yes", "3": "Yes", "4": "No", "5": "Yes"}
    say_with(monkeypatch, model, lambda question: said[question.split()[3][0]])
    scores = evaluate(model, local_tasks, "pixel_sail_mme")["results"]["pixel_sail_mme"]
    assert scores["mme_perception_score,none"] == 125
    assert scores["mme_cognition_score,none"] == 0


def test_chosen_letters_become_the_scores_of_the_kit(model, local_tasks, monkeypatch):
    """Always "A": right in one of three documents of MMBench and MMStar, in two of four of SEED-Bench."""
    say_with(monkeypatch, model, lambda question: "A")
    names = ("pixel_sail_mmbench_en_dev", "pixel_sail_seed_image", "pixel_sail_mmstar")
    results = evaluate(model, local_tasks, *names)["results"]
    assert results["pixel_sail_mmbench_en_dev"]["gpt_eval_score,none"] == pytest.approx(100 / 3)
    assert results["pixel_sail_seed_image"]["seed_image,none"] == 0.5
    assert results["pixel_sail_mmstar"]["average,none"] == pytest.approx(1 / 3)


def say_with(monkeypatch, model, said):
    def ask_many(self, requests):
        none = np.zeros((0, 1, 1), dtype=bool)
        return [
            [PredictorOutput(answer=said(text), masks_NHW=none, scores=()) for text in r.questions] for r in requests
        ]

    monkeypatch.setattr(type(model.predictor), "ask_many", ask_many)


def test_the_kits_own_task_with_several_images_is_rejected_by_name(model, local_tasks):
    file = local_tasks / "pixel_sail_seed_image.yaml"
    text = "\n".join(line for line in file.read_text().splitlines() if not line.startswith("process_docs"))
    file.write_text(text + "\n")
    with pytest.raises(DataError, match=r"task pixel_sail_seed_image, split test, document 1: 2 images found"):
        evaluate(model, local_tasks, "pixel_sail_seed_image")


def test_other_kinds_of_requests_are_rejected_by_name(model):
    from lmms_eval.api.instance import Instance

    metadata = {"task": "seedbench_ppl", "doc_id": 0, "repeats": 1}
    requests = [Instance(request_type="loglikelihood", arguments=("q", "a"), idx=0, metadata=metadata)]
    for kind in ("loglikelihood", "generate_until_multi_round"):
        with pytest.raises(NotImplementedError, match=rf"tasks \['seedbench_ppl'\]: {kind} requests found"):
            getattr(model, kind)(requests)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "fp8"}, "precision is 'fp8'"),
        ({"batch_size": 16}, "max_batch_tokens"),
        ({"pretrained": "nowhere"}, "checkpoint nowhere"),
    ],
)
def test_wrong_model_arguments_are_named(checkpoint, arguments, message):
    from pixel_sail.vqa.lmms_eval_model import PixelSail

    with pytest.raises(ConfigError, match=message):
        PixelSail(**{"pretrained": str(checkpoint)} | arguments)


def test_given_options_of_the_command_are_kept():
    given = ["--include_path=mine", "--model", "other", "--verbosity", "INFO"]
    assert with_default_options(given) == given
    assert with_default_options(["--tasks", "mme"])[2:] == [
        *("--model", "pixel_sail", "--include_path", str(TASK_FOLDER), "--verbosity", "DEBUG"),
    ]


def command_line(checkpoint, tasks, output, num_processes):
    launch = [sys.executable]
    if num_processes > 1:
        launch += ["-m", "torch.distributed.run", f"--nproc-per-node={num_processes}", "--master-port=29711"]
    options = {"--include_path": tasks, "--output_path": output, "--model_args": f"pretrained={checkpoint}"}
    names = "pixel_sail_mme,pixel_sail_seed_image,pixel_sail_mmstar"
    flags = ["--tasks", names, "--log_samples", *(str(part) for pair in options.items() for part in pair)]
    return subprocess.run([*launch, "-m", "pixel_sail.vqa", *flags], cwd=ROOT, capture_output=True, text=True)


def logged(output: Path) -> dict[str, dict[int, str]]:
    """The answers in the kit's sample files, by task and document."""
    found: dict[str, dict[int, str]] = {}
    for file in output.rglob("*_samples_*.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        found[file.stem.split("_samples_")[1]] = {line["doc_id"]: line["filtered_resps"] for line in lines}
    return found


@pytest.mark.slow
def test_one_and_two_processes_log_the_same_answers_and_scores(checkpoint, local_tasks, tmp_path):
    scores = []
    for number in (1, 2):
        done = command_line(checkpoint, local_tasks, tmp_path / str(number), number)
        assert done.returncode == 0, done.stderr[-3000:]
        (file,) = (tmp_path / str(number)).rglob("*_results.json")
        scores.append(json.loads(file.read_text())["results"])
    one, two = (logged(tmp_path / number) for number in "12")
    assert {task: len(answers) for task, answers in one.items()} == {
        "pixel_sail_mme": 6,
        "pixel_sail_seed_image": 4,
        "pixel_sail_mmstar": 3,
    }
    assert one == two
    assert scores[0] == scores[1]


@pytest.mark.slow
def test_a_failed_run_of_the_command_ends_with_an_error_status(local_tasks, tmp_path):
    done = command_line("nowhere", local_tasks, tmp_path / "out", 1)
    assert done.returncode != 0
    assert "checkpoint nowhere" in done.stderr
