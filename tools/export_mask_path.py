"""Export the computation from hidden states to mask logits as a program for runtimes without Python.

Exports the part of a trained model after the decoder: it maps states of an image's patches [h, w, D] and of [SEG]
tokens [N, D] to mask logits [N, h * s, w * s], for any number of patches and masks. The decoder is not included: its
cache grows token by token, in Python.

    python tools/export_mask_path.py runs/mine --out mask_path.pt2                            torch.export
    python tools/export_mask_path.py runs/mine --out mask_path.pt2 --onnx mask_path.onnx      and ONNX

The written program is loaded and compared with the model at sizes other than those of the export. ONNX needs the
packages onnx, onnxscript and onnxruntime, which `make setup` does not install.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from pixel_sail.entry import one_message
from pixel_sail.evaluation.run import checkpoint_folder
from pixel_sail.model.mask_head import MaskHead, mask_logits
from pixel_sail.model.modeling_pixel_sail import load_model

LARGEST_SIDE = 256
"""Maximum number of patches per side, and of masks."""
MADE_WITH = (6, 9, 3)
COMPARED_SIZES = ((1, 1, 1), (2, 3, 1), (30, 40, 5), (64, 48, 2))
"""Rows, columns and masks at which the written program is compared."""
TOLERANCE = 1e-3
"""Largest allowed difference of a logit: 0 for torch.export; ONNX sums in another order."""


class MaskPath(nn.Module):
    """The mask head as a function of two tensors."""

    def __init__(self, head: MaskHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, states_hwD: Tensor, seg_states_ND: Tensor) -> Tensor:
        """Return the mask logits."""
        return mask_logits(self.head.seg_queries(seg_states_ND), self.head.pixel_features(states_hwD[None])[0])


def random_states(size: tuple[int, int, int], width: int) -> tuple[Tensor, Tensor]:
    """Return states for numbers of patch rows, patch columns and [SEG] tokens."""
    return torch.randn(*size[:2], width), torch.randn(size[2], width)


@torch.no_grad()
def largest_difference(program: Callable[[Tensor, Tensor], Tensor], path: MaskPath, width: int) -> float:
    """Return the largest difference between a written program and the model, over all sizes."""
    found = []
    for size in COMPARED_SIZES:
        states, seg_states = random_states(size, width)
        found.append((program(states, seg_states) - path(states, seg_states)).abs().max().item())
    return max(found)


@one_message
def main(arguments: Sequence[str] | None = None) -> int:
    """Export and compare; exit status 1 if the program differs, 2 for wrong input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a run folder or an exported folder")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.pt2")
    parser.add_argument("--onnx", type=Path, metavar="FILE.onnx")
    options = parser.parse_args(arguments)
    model = load_model(checkpoint_folder(options.checkpoint))
    path, width = MaskPath(model.mask_head).eval(), model.config.hidden_size
    rows, columns, masks = (torch.export.Dim(name, min=1, max=LARGEST_SIDE) for name in ("rows", "columns", "masks"))
    dynamic = {"states_hwD": {0: rows, 1: columns}, "seg_states_ND": {0: masks}}
    program = torch.export.export(path, random_states(MADE_WITH, width), dynamic_shapes=dynamic)
    torch.export.save(program, options.out)
    differences = {options.out: largest_difference(torch.export.load(options.out).module(), path, width)}
    if options.onnx:
        torch.onnx.export(path, random_states(MADE_WITH, width), str(options.onnx), dynamo=True, dynamic_shapes=dynamic)
        differences[options.onnx] = largest_difference(onnx_program(options.onnx), path, width)
    for file, difference in differences.items():
        print(f"{file}: largest difference of a logit {difference:.1e} over {len(COMPARED_SIZES)} sizes")
    return int(max(differences.values()) > TOLERANCE)


def onnx_program(file: Path) -> Callable[[Tensor, Tensor], Tensor]:
    """Return an ONNX file as a function of tensors."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file))
    names = [given.name for given in session.get_inputs()]

    def run(states_hwD: Tensor, seg_states_ND: Tensor) -> Tensor:
        given = dict(zip(names, (states_hwD.numpy(), seg_states_ND.numpy()), strict=True))
        return torch.from_numpy(session.run(None, given)[0])

    return run


if __name__ == "__main__":
    sys.exit(main())
