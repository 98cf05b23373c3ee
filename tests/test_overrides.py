"""Text settings keep the literal text of the command line, regardless of Hydra's grammar."""

import random

import pytest

from pixel_sail import paths
from pixel_sail.config import ConfigError, DemoConfig, EvalConfig, PredictCommandConfig, TrainConfig, load_config
from pixel_sail.overrides import as_typed, sweep_as_typed
from pixel_sail.predict_files import predict_command_config
from pixel_sail.sweep.grid import expand

TEXTS = (
    *("2024_11_05", "007", "1e5", "1e10", "1_000", "0x10", "1.10", "true", "off", "nan", "inf", "2026-12-01", "v1.0"),
    *(
        "[a]",
        "{a:1}",
        "(a)",
        "a b",
        " a",
        "a,b",
        "a=b",
        "it's",
        'say "hi"',
        "a#1",
        "a&b",
        "100%",
        "café",
        "红星",
        "~tmp",
    ),
    *(
        "-x",
        "None",
        "a\nb",
        "range(1,3)",
        "choice(a,b)",
        "the man's hat, left (red)",
        "<Prompt0>?",
        "C:\\x",
        "'",
        "a'b'",
    ),
)


def asked(*overrides):
    return load_config("predict", PredictCommandConfig, ["checkpoint=c", "image=i", *overrides])


def trained(*overrides):
    return load_config("train", TrainConfig, ["name=x", *overrides])


@pytest.mark.parametrize("text", [*TEXTS, "null"])
def test_a_text_setting_is_what_was_typed(text):
    assert asked(f"question={text}").question == text


@pytest.mark.parametrize("text", [text for text in TEXTS if text.isprintable()])
def test_a_run_has_the_given_name_and_its_own_folder(text):
    config = load_config("train", TrainConfig, [f"name={text}"])
    assert (config.name, config.run_dir) == (text, f"runs/{text}")


def test_quotation_marks_interpolations_backslashes_and_null_mean_what_they_mean_to_hydra():
    for typed, text in {"'1.10'": "1.10", '"a,b"': "a,b", r"'it\'s'": "it's", r"a\,b": "a,b", "''": ""}.items():
        assert asked(f"question={typed}").question == text
    assert asked("question=${checkpoint}, (1)").question == "c, (1)"
    assert trained("run_dir=${paths.runs}/a (1)").run_dir == "runs/a (1)"
    assert load_config("evaluate", EvalConfig, ["checkpoint=c", "output=null"]).output is None
    assert trained("model.init_from=null").model.init_from is None


def test_texts_within_groups_lists_and_named_entries_are_typed_ones_too():
    config = trained(
        *("model.tokenizer=2024_11_05", "model.init_from=007", "log.wandb_project=1e5", "optim.lr=1e2"),
        *(
            "model.lora.targets=[decoder\\.(a|b){1,2}, 007, 'x,y']",
            "tuning=decoder_frozen",
            "optim.groups.decoder.match=[heads?(_a|_b)]",
        ),
        *("distillation=sam2", "distillation.sam2.cache=1_0", "distillation.sam2.model.weights=10", "paths.data=1.10"),
    )
    assert (config.model.tokenizer, config.model.init_from, config.log.wandb_project) == ("2024_11_05", "007", "1e5")
    assert config.model.lora.targets == ["decoder\\.(a|b){1,2}", "007", "x,y"] and config.optim.lr == 100
    assert config.optim.groups["decoder"].match == ["heads?(_a|_b)"] and config.paths.data == "1.10"
    assert config.distillation["sam2"].cache == "1_0" and config.distillation["sam2"].model["weights"] == "10"
    assert load_config("demo", DemoConfig, ["checkpoint=007", "names=[1.10,192.168.1.5]"]).names == [
        "1.10",
        "192.168.1.5",
    ]


def test_an_entry_of_an_open_set_that_holds_text_keeps_text_and_others_their_type():
    node = load_config(
        "evaluate",
        EvalConfig,
        [
            *("checkpoint=c", "evals=[refcoco_val]", "evals.refcoco_val.split=007"),
            *("evals.refcoco_val.root=/data/my (1)", "+evals.refcoco_val.limit=5"),
        ],
    ).evals["refcoco_val"]
    assert (node["split"], node["root"], node["limit"]) == ("007", "/data/my (1)", 5)


def test_a_choice_that_looks_like_a_number_is_the_file_of_that_name(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "2024_11_05.yaml").write_text("# @package _global_\nname: mine\n")
    config = load_config("train", TrainConfig, ["experiment=2024_11_05", f"hydra.searchpath=[file://{tmp_path}]"])
    assert config.name == "mine"
    unchanged = ["model=tiny", "evals=[refcoco_val, gcg_val]", "experiment=null", "evals={}", "seed=007", "a@b=1"]
    assert as_typed(unchanged, TrainConfig, lambda key: False) == unchanged


@pytest.mark.parametrize("value", ["2024_11_05", "1e5", "1.10", "true", "007"])
def test_a_name_that_yaml_reads_as_something_else_is_rejected(tmp_path, value):
    (tmp_path / "experiment").mkdir()
    file, path = tmp_path / "experiment" / "mine.yaml", f"hydra.searchpath=[file://{tmp_path}]"
    file.write_text(f"# @package _global_\nname: {value}\n")
    with pytest.raises(ConfigError, match=r"mine.yaml: name is .*put the value in quotation marks"):
        load_config("train", TrainConfig, ["experiment=mine", path])
    assert load_config("train", TrainConfig, ["experiment=mine", path, "name=a"]).name == "a"
    file.write_text(f"# @package _global_\nname: '{value}'\n")
    assert load_config("train", TrainConfig, ["experiment=mine", path]).name == value


def test_plain_options_are_taken_as_they_stand():
    rng = random.Random(0)
    sampled = ["".join(rng.choices("ab'\"\\ ,()[]{}=:$~#\n\té红0_1.-?", k=rng.randint(1, 9))) for _ in range(8)]
    for text in (*sampled, "${x}.jpg", "???", "'a'", "null", "-x.jpg", "--image", r"a\,b", "${", "caf\udce9.jpg"):
        config = predict_command_config(["--image", f"pics/{text}", f"--question={text}", "checkpoint=c"])
        assert (config.image, config.question) == (f"pics/{text}", text)
    options = ["--checkpoint=c", "--image=i", "--output", "o/1", "--question=q", "--box", "1,2,30,40.5"]
    config = predict_command_config([*options, "--point=3,4", "--point=5,6", "predict.max_new_tokens=2"])
    assert (config.checkpoint, config.output, config.boxes) == ("c", "o/1", [[1, 2, 30, 40.5]])
    assert config.points == [[3, 4], [5, 6]] and config.predict.max_new_tokens == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--imag=a.jpg"], "found '--imag=a.jpg', expected key=value"),
        (["a.jpg"], "found 'a.jpg', expected key=value"),
        (["image=a", "--image=b"], "image is given twice"),
        (["--image=a", "--image=b"], "--image is given twice"),
        (["--image"], "found nothing after it"),
        (["--box", "1,2,3"], "--box: found '1,2,3', expected 4 comma-separated numbers"),
        (["--point", "1,nan"], "expected 2 comma-separated numbers"),
        (["--point", "1,2", "points=[[1,2]]"], "use one of them"),
        (["image=${x}.jpg"], "--image, --question, --output TEXT are used verbatim"),
        (["image="], "image is empty"),
        (["--image="], "image is empty"),
    ],
)
def test_an_ambiguous_command_line_is_one_message(arguments, named):
    rest = [] if any("image" in argument for argument in arguments) else ["image=i"]
    with pytest.raises(ConfigError) as caught:
        predict_command_config(["checkpoint=c", "question=q", *rest, *arguments])
    assert named in str(caught.value)


@pytest.mark.parametrize("name", ["", " ", "..", ".", "a/b", "/a", "a\nb", "a\udce9", "x" * 201])
def test_a_name_that_is_no_folder_is_rejected(name):
    with pytest.raises(ConfigError, match="name"):
        load_config("train", TrainConfig, [f"name={name}"])


def test_an_empty_folder_is_not_the_current_one():
    with pytest.raises(ConfigError, match="run_dir is empty"):
        trained("run_dir=")
    for empty in ("checkpoint=", "output="):
        with pytest.raises(ConfigError, match=f"{empty[:-1]} is empty"):
            load_config("evaluate", EvalConfig, [*(["checkpoint=c"] if empty == "output=" else []), empty])


def test_a_value_of_another_type_is_rejected_with_the_reason():
    with pytest.raises(ConfigError, match="could not be converted to Integer"):
        trained("optim.steps=1.5")


def test_a_sweep_of_texts_has_the_typed_values():
    overrides = ["model.init_from=2024_11_05,2024_1_105,a (1)", "seed=1,2", "experiment=007,quickstart"]
    jobs = expand(overrides)
    assert len(jobs) == 12 and len({job.name for job in jobs}) == 12
    starts = {trained(*job.overrides[:1]).model.init_from for job in jobs}
    assert starts == {"2024_11_05", "2024_1_105", "a (1)"}
    assert {job.swept["experiment"] for job in jobs} == {"007", "quickstart"}
    plain = ["ablation=stride_4,stride_8", "predict.prompt=short,paper", "model.init_from=choice(a,b)"]
    assert sweep_as_typed(plain, TrainConfig) == plain


def test_a_tilde_is_the_home_folder_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("PIXEL_SAIL_RUNS", "~/runs")
    monkeypatch.setenv("PIXEL_SAIL_DATA", "~")
    config = trained("data=refcoco", "model.init_from=~/base", "model=sail_0_5b")
    assert config.run_dir == "/home/me/runs/x" and config.paths.data == "/home/me"
    assert config.model.init_from == "/home/me/base"
    assert config.model.tokenizer == "/home/me/tokenizers/qwen2_5"
    assert all("~" not in str(node) and "/home/me/" in str(node) for node in config.data.sources.values())
    assert trained("run_dir=~/runs/y").run_dir == "/home/me/runs/y"
    config = predict_command_config(["--checkpoint=~/m", "image=~/i.jpg", "question=~/q", "output=~tmp"])
    assert (config.checkpoint, config.image) == ("/home/me/m", "/home/me/i.jpg")
    assert (config.question, config.output) == ("~/q", "~tmp")


def test_an_empty_variable_counts_as_not_set(monkeypatch):
    monkeypatch.setenv("PIXEL_SAIL_RUNS", "")
    monkeypatch.setenv("PIXEL_SAIL_DATA", "")
    config = trained("model=sail_0_5b")
    assert (config.run_dir, config.model.tokenizer) == ("runs/x", "data/tokenizers/qwen2_5")


def test_a_tilde_of_a_user_without_a_home_is_rejected(monkeypatch):
    monkeypatch.setattr(paths, "home_folder", lambda: None)
    assert trained("run_dir=/runs/y").run_dir == "/runs/y"
    for override in ("run_dir=~/y", "paths.runs=~/y", "model.init_from=~"):
        with pytest.raises(ConfigError, match="HOME is not set"):
            trained(override)
