"""The scripts of docs/examples run and do what their pages describe."""

import importlib
import sys

import pytest
import torch
from PIL import Image
from running import ROOT

EXAMPLES = ROOT / "docs" / "examples"


@pytest.fixture
def example(monkeypatch, data_root):
    """Return a function from the name of a script to its module; the data folder is reset afterwards."""
    monkeypatch.setenv("PIXEL_SAIL_DATA", str(data_root))
    monkeypatch.syspath_prepend(str(EXAMPLES))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(EXAMPLES) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]


def test_every_script_is_run_here():
    here = (ROOT / "tests" / "test_examples.py").read_text()
    scripts = {path.stem for path in EXAMPLES.glob("*.py")} - {"tiny"}
    assert scripts == {name for name in scripts if f'example("{name}")' in here}


def test_ask_answers_three_questions_with_a_mask_each(example, tmp_path):
    outputs = example("ask").main(tmp_path)
    assert [len(output.masks_NHW) for output in outputs] == [1, 1, 1]
    with Image.open(tmp_path / "mask.png") as mask:
        assert (mask.height, mask.width) == outputs[0].masks_NHW.shape[1:]


def test_a_new_dataset_is_packed_with_its_masks(example, tmp_path):
    sequence = example("new_dataset").main(tmp_path)
    assert {item.source for item in sequence.examples} == {"boxes"}
    assert all(item.masks[0].sum() == 12 * 8 for item in sequence.examples)


def test_a_new_eval_scores_the_questions_it_chose(example, tmp_path):
    module = example("new_eval")
    scores = module.main(tmp_path)["colours"]
    asked = module.load(root=tmp_path / "data" / "refshapes", split="val")
    everything = module.expressions(module.load_refer(tmp_path / "data" / "refshapes", "refshapes", "val"))
    assert 0 < scores["count"] == len(asked) < len(everything)
    assert (tmp_path / "evaluation" / "report.html").is_file()


def test_a_new_teacher_responds_to_the_edge_in_the_image(example, tmp_path):
    features_EYX = example("new_teacher").main(tmp_path)
    assert features_EYX.shape == (2, 16, 24)
    # The image is black up to column 48 and white from there: columns 11 and 12 of the map are on either side.
    assert (features_EYX[0, 1:-1, 11:13] > 0.1).all()
    # Black is not zero after normalization, so whether a sum cancels exactly depends on the summation order.
    assert features_EYX[0, 1:-1, 2:10].abs().max() < 1e-4


def test_a_new_base_gives_text_the_states_it_had(example, tmp_path):
    model, language = example("new_base").main(tmp_path)
    ids_BT = torch.tensor([[5, 17, 3, 99, 42]])
    positions_2BT = torch.arange(5).expand(2, 1, 5)
    mask_B1TS = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    with torch.no_grad():
        expected = language.model(input_ids=ids_BT).last_hidden_state
        backend = importlib.import_module("pixel_sail.model.decoder").MaskedAttention(mask_B1TS=mask_B1TS)
        found = model.decoder(model.embed_tokens(ids_BT), positions_2BT, backend)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
