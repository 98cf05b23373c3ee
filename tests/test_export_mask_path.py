"""The exported mask path gives the model's logits for any number of patches and masks."""

import pytest
import torch
from running import load_tool


@pytest.mark.parametrize("changes", [{}, {"mask_stride": 8, "upsampler": "bilinear"}, {"upsampler": "pixel_shuffle"}])
def test_the_program_read_again_is_the_model(tiny_model, tmp_path, capsys, changes):
    model = tiny_model(**changes)
    model.save_pretrained(tmp_path / "model")
    tool = load_tool("export_mask_path")
    assert tool.main([str(tmp_path / "model"), "--out", str(tmp_path / "path.pt2")]) == 0
    assert "largest difference" in capsys.readouterr().out
    program = torch.export.load(tmp_path / "path.pt2").module()
    states, seg_states = tool.random_states((5, 3, 2), model.config.hidden_size)
    with torch.no_grad():
        features = model.mask_head.pixel_features(states[None])[0]
        expected = torch.einsum("nd,yxd->nyx", model.mask_head.seg_queries(seg_states), features)
        torch.testing.assert_close(program(states, seg_states), expected, atol=1e-5, rtol=1e-4)


def test_a_program_that_differs_is_noticed(tiny_model, tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "model")
    tool = load_tool("export_mask_path")
    monkeypatch.setattr(tool, "largest_difference", lambda program, path, width: 0.1)
    assert tool.main([str(tmp_path / "model"), "--out", str(tmp_path / "path.pt2")]) == 1


def test_a_checkpoint_that_is_not_there_is_rejected(tmp_path, capsys):
    assert load_tool("export_mask_path").main([str(tmp_path / "nowhere"), "--out", str(tmp_path / "path.pt2")]) == 2
    assert "nowhere" in capsys.readouterr().err
