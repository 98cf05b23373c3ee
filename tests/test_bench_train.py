"""The benchmark's version of the released method gives the released results; benchmarks run and write their output."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from running import load_tool

from pixel_sail.evaluation.predict import GenerationRequest
from pixel_sail.model import generation
from pixel_sail.model.decoder import Decoder
from pixel_sail.model.generation import generate_steps
from pixel_sail.model.kernels import REFERENCE


@pytest.fixture(scope="module")
def bench():
    return load_tool("bench_train")


def test_the_rebuilt_released_step_has_the_loss_and_gradients_of_our_reference(
    bench, tiny_model, processor, make_sample, make_batch
):
    sample = make_sample(np.random.default_rng(0), masks_per_turn=(1, 2))
    batch = make_batch([processor.encode_sample(*sample, independent_turns=False)])
    model = tiny_model(mask_stride=2).train()
    model.use(REFERENCE)
    found = []
    for loss in (bench.released_loss, bench.our_loss):
        model.zero_grad()
        value = loss(model, batch)
        value.backward()
        found.append((value.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (theirs, their_gradients), (ours, our_gradients) = found
    assert theirs == pytest.approx(ours, rel=1e-5)
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-3, atol=1e-4, msg=name)


def test_strides_share_every_weight_they_both_have(bench):
    built = bench.build_models("tiny", [4, 2], "cpu", torch.float32)
    (coarse, _), (fine, _) = built[4], built[2]
    shared = coarse.state_dict()
    assert all(torch.equal(value, fine.state_dict()[name]) for name, value in shared.items())
    assert len(fine.state_dict()) > len(shared)


def test_the_training_benchmark_writes_ratios_of_ours_to_theirs(bench, monkeypatch, tmp_path, capsys):
    held = {"released": 900, "ours": 400}
    monkeypatch.setattr(bench, "measured_memory", lambda name, arguments: {"before": 100, "peak": held[name]})
    where = ["--size", "tiny", "--image", "64", "96", "--samples", "2", "--samples-per-sequence", "2", "--rounds", "1"]
    assert bench.main([*where, "--ways", "released", "ours", "--json", str(tmp_path / "out.json")]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["memory_ratio"] == pytest.approx(300 / 800)
    rates = {name: result["ways"][name]["samples_per_second"] for name in held}
    assert result["speed_ratio"] == pytest.approx(rates["ours"] / rates["released"])
    assert result["operations_ratio"] < 1.0
    assert set(result["ways"]["ours"]["seconds_by_part"]) == {
        *("decoder", "text", "mask head", "mask losses", "optimizer")
    }
    assert "speed_ratio" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("axis", "values"), [("image", [[16, 24], [32, 48]]), ("sequence", [1, 2]), ("expressions", [1, 3])]
)
def test_growth_of_a_step_is_measured_along_an_axis(bench, monkeypatch, tmp_path, axis, values):
    monkeypatch.setitem(bench.GROWTH, axis, [tuple(value) if axis == "image" else value for value in values])
    where = ["--size", "tiny", "--image", "16", "24", "--rounds", "1", "--ways", "released", "ours"]
    files = ["--json", str(tmp_path / "out.json"), "--png", str(tmp_path / "out.png")]
    assert bench.main([*where, "--growth", axis, *files]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    first, last = found["points"]
    assert [first["value"], last["value"]] == values and first["tokens"] < last["tokens"]
    size = "value" if axis == "expressions" else "tokens"
    expected = np.log(last["seconds"]["ours"] / first["seconds"]["ours"]) / np.log(last[size] / first[size])
    assert found["exponents"]["ours"] == pytest.approx(expected)
    assert (tmp_path / "out.png").stat().st_size > 0
    with pytest.raises(SystemExit):
        bench.main([*where, "--png", str(tmp_path / "other.png")])


def test_memory_is_that_of_the_steps_and_not_of_the_libraries(bench):
    held = bench.measured_memory("ours", ["--size", "tiny", "--image", "512", "512"])
    assert 0 < held["peak"] - held["before"] < held["before"]


def test_the_attention_and_head_benchmarks_write_growth_and_images(tmp_path):
    attention, heads = load_tool("bench_attention"), load_tool("bench_heads")
    small = ["--rounds", "1", "--json", str(tmp_path / "a.json"), "--png", str(tmp_path / "a.png")]
    assert attention.main([*small, "--samples", "1", "2", "--image-tokens", "20", "--text-tokens", "6"]) == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["tokens"] == [26, 52] and set(found["growth"]) == {"dense", "segments"}
    small = ["--rounds", "1", "--json", str(tmp_path / "h.json"), "--png", str(tmp_path / "h.png")]
    assert heads.main([*small, "--hidden", "8", "--mask-dim", "4", "--vocab", "50", "--expressions", "1", "2"]) == 0
    assert set(json.loads((tmp_path / "h.json").read_text())["mask_seconds"]) == {"maps", "folded", "points"}
    assert (tmp_path / "a.png").stat().st_size > 0 and (tmp_path / "h.png").stat().st_size > 0


def test_growth_is_the_exponent(tmp_path):
    assert load_tool("bench_attention").growth([10, 20, 40], [1.0, 4.0, 16.0]) == pytest.approx(2.0)


def test_the_benchmark_of_8_bit_weights_names_its_requirements(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchao", None)
    assert load_tool("bench_int8").main([]) == 2
    assert "pip install torchao" in capsys.readouterr().err


def test_the_answers_that_8_bit_weights_are_timed_with_have_their_full_length():
    predictor = load_tool("bench_int8").random_predictor(layers=1)
    image = predictor.prepare(Image.fromarray(np.zeros((32, 48, 3), dtype=np.uint8)))
    request = GenerationRequest(image=image, questions=["Please segment the dog."])
    tokens = []
    for step in generate_steps(
        predictor.model,
        predictor.encode([request]),
        [[predictor.question_ids(request.questions[0], follows_image=True)]],
        max_new_tokens=predictor.max_new_tokens,
        end_ids=predictor.end_ids,
    ):
        ((tokens),) = step
    assert len(tokens) == 8


def test_compiled_answers_are_compared_with_plain_ones(monkeypatch, tmp_path, capsys):
    captured = torch.compile(Decoder.forward, dynamic=True, backend="aot_eager")
    monkeypatch.setattr(generation, "through_compile", lambda forward: captured)
    tool = load_tool("bench_decode")
    monkeypatch.setattr(tool, "IMAGE_HW", (32, 48))
    options = (
        "--size",
        "tiny",
        "--answers",
        "1",
        "3",
        "--tokens",
        "3",
        "--rounds",
        "1",
        "--json",
        str(tmp_path / "decode.json"),
    )
    assert tool.main(options) == 0
    points = json.loads((tmp_path / "decode.json").read_text())["points"]
    assert [(point["answers"], point["changed_answers"]) for point in points] == [(1, 0), (3, 0)]
    assert "compiled ms" in capsys.readouterr().out


def test_kernels_and_bytes_of_a_step_are_counted_without_a_gpu(monkeypatch, tmp_path, capsys):
    tool = load_tool("count_step")
    options = ("--size", "tiny", "--image", "64", "96", "--samples", "2", "--json", str(tmp_path / "count.json"))
    found = []
    for layers in (2, 3):
        monkeypatch.setitem(tool.BENCHMARK_SIZES["tiny"], "num_hidden_layers", layers)
        assert tool.main(options) == 0
        found.append(json.loads((tmp_path / "count.json").read_text()))
    two, three = found
    rows = three["rows"]
    # Images and texts are a call each; the weights of a layer are seven products with two gradients each.
    assert rows["forward _varlen_attn"]["kernels"] == 2 * 3 == rows["backward _varlen_attn_backward"]["kernels"]
    assert rows["forward product"]["kernels"] - two["rows"]["forward product"]["kernels"] == 7
    assert rows["backward product"]["kernels"] - two["rows"]["backward product"]["kernels"] == 14
    weights, tokens = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48, three["tokens"]
    more = rows["forward product"]["operations"] - two["rows"]["forward product"]["operations"]
    assert more == 2 * weights * tokens
    # No layer gathers its tokens or normalizes in steps.
    assert three["total"]["kernels"] - two["total"]["kernels"] <= 95
    assert "MFU" in capsys.readouterr().out


def test_ranks_are_compared_on_one_run(data_root, monkeypatch, tmp_path, capsys):
    small = ("model.architecture.hidden_size=32", "model.architecture.num_hidden_layers=1", "deepspeed=none")
    monkeypatch.setenv("PIXEL_SAIL_DATA", str(data_root))
    tool = load_tool("bench_ranks")
    options = ("--steps", "5", "--rounds", "1", "--json", str(tmp_path / "ranks.json"))
    assert tool.main([*options, "experiment=quickstart", *small]) == 0
    found = json.loads((tmp_path / "ranks.json").read_text())["ranks"]
    assert set(found) == {"1", "2"} and found["1"]["efficiency"] == 1.0 and found["2"]["efficiency"] > 0
    assert found["2"]["last_loss"] == pytest.approx(found["1"]["last_loss"], rel=1e-5)
    assert "efficiency" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no_such_key"):
        tool.run(1, 1, ["experiment=quickstart", "no_such_key=1"], tmp_path / "broken")


def test_the_small_step_is_measured_against_the_reference_and_has_its_losses(tmp_path, capsys):
    tool = load_tool("bench_small_step")
    where = ["--images", "3", "--rounds", "1", "--expressions", "2", "--json", str(tmp_path / "out.json")]
    assert tool.main([*where, "--ways", "reference", "ours", "turns"]) == 0
    (point,) = json.loads((tmp_path / "out.json").read_text())["points"]
    ways = point["ways"]
    assert max(way["loss_difference"] for way in ways.values()) < 1e-5
    assert ways["ours"]["operations"] < ways["reference"]["operations"]
    assert ways["ours"]["speed"] == pytest.approx(ways["reference"]["seconds"] / ways["ours"]["seconds"])
    assert "3 images, 2 expressions each" in capsys.readouterr().out
