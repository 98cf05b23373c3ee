"""Lay out RefShapes with the paths of the public datasets of the released mixes: every file of `data=cotrain_0_5b`.

Tests call `render_and_lay_out`; by hand,

    python tests/synthetic_cotrain.py DIR
    PIXEL_SAIL_DATA=DIR torchrun --nproc-per-node=2 scripts/train.py experiment=pixel_sail_0_5b ... --dry-run

renders the benchmark below DIR, with a tokenizer, lays it out and prints the whole command.
"""

import json
import pickle
import shlex
import sys
from pathlib import Path

from running import make_data_root
from tiny_teachers import MASK2FORMER, SAM2

IMAGE_DIRS = (
    *("ref_seg/images/train2014", "coco/train2017", "llava_data/llava_images/train2014"),
    *(
        "glamm_data/images/grandf/train",
        "glamm_data/images/flickr30k/Flickr30K",
        "glamm_data/images/coco2014/train2014",
    ),
)
"""Image folders; the synthetic images are in each."""

FILES = {
    "ref_seg/refcoco": "refshapes",
    "ref_seg/refcoco+": "refshapes",
    "ref_seg/grefcoco": "grefshapes",
    "coco/annotations/panoptic_train2017.json": "panoptic/annotations/panoptic_train.json",
    "coco/annotations/panoptic_train2017": "panoptic/annotations/panoptic_train",
    "pixel2cap/pix2cap_coco_train.json": "pix2cap/pix2cap_coco_train.json",
    "glamm_data/annotations": "glamm_data/annotations",
    "muse/MUSE_train.json": "muse/MUSE_train.json",
    "llava_data/LLaVA-Instruct-150K/llava_v1_5_mix665k.json": "llava/llava_v1_5_mix665k.json",
    "osprey-724k/osprey_conversation.json": "osprey/osprey_conversation.json",
    "osprey-724k/osprey_short_form.json": "osprey/osprey_short_form.json",
    "osprey-724k/osprey_detail_description.json": "osprey/osprey_detail_description.json",
    # Synthetic scenes have no parts and no absent classes; the record format is the same.
    "osprey-724k/osprey_part_level.json": "osprey/osprey_conversation.json",
    "osprey-724k/osprey_lvis_positive_negative.json": "osprey/osprey_conversation.json",
}
"""Path in the released mix -> file or folder of RefShapes."""

SPLITS_OF_REFCOCOG = {"train": "train", "val": "val", "testA": "test", "testB": "test"}

TINY = (
    # A test's tokenizer and sizes, random weights and random teachers; everything else is the card's.
    *("model.tokenizer=${paths.data}/refshapes/tokenizer", "model.init_from=null", "allow_random_teachers=true"),
    *("model.architecture.hidden_size=32", "model.architecture.intermediate_size=48"),
    *("model.architecture.num_hidden_layers=2", "model.architecture.num_attention_heads=2"),
    *("model.architecture.num_key_value_heads=1", "model.architecture.mask_dim=16"),
    *("loss.points.num_points=64", "data.num_workers=1", "log.tensorboard=false"),
)


WHOLE_EPOCH = ("data.packing.seq_len=10240", "data.packing.packing_buffer=1", "data.stream_rounds=1")
"""The 128 samples of a step, in the mixture's order, cover an epoch of two synthetic images."""


def render_and_lay_out(root: Path) -> None:
    """Render a benchmark of two training images below `root` with every file that the released mixes read."""
    rendered = make_data_root(root, num_train=2, num_eval=1) / "refshapes"
    places = FILES | dict.fromkeys(IMAGE_DIRS, "images/train2014")
    for place, origin in places.items():
        assert (rendered / origin).exists(), origin
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).symlink_to(rendered / origin)
    # RefCOCOg has other names for its splits, and none for those of one kind of expressions.
    refcocog = root / "ref_seg" / "refcocog"
    refcocog.mkdir()
    (refcocog / "instances.json").symlink_to(rendered / "refshapes" / "instances.json")
    refs = pickle.loads((rendered / "refshapes" / "refs(unc).p").read_bytes())
    refs = [{**ref, "split": SPLITS_OF_REFCOCOG.get(ref["split"], "val")} for ref in refs]
    (refcocog / "refs(umd).p").write_bytes(pickle.dumps(json.loads(json.dumps(refs)), protocol=2))


def tiny_teachers() -> tuple[str, ...]:
    """Return overrides that make the two teachers of the cards small networks with random weights."""
    models = {
        "mask2former": {"architecture": MASK2FORMER, "shortest_edge": 64, "longest_edge": 110},
        "sam2": {"architecture": SAM2, "side": 64},
    }
    words = []
    for name, arguments in models.items():
        node = {"_target_": f"pixel_sail.distillation.{name}.{name}", "random": True, **arguments}
        words += [
            f"+distillation.{name}.model={_word(node)}",
            f"distillation.{name}.channels={32 if name == 'mask2former' else 16}",
        ]
    return tuple(words)


def _word(value: object) -> str:
    """Return a value as Hydra reads it on a command line."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_word(own)}" for key, own in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_word, value)) + "]"
    return value if isinstance(value, str) else json.dumps(value)


def main() -> None:
    root = Path(sys.argv[1]).resolve()
    render_and_lay_out(root)
    command = ["torchrun", "--nproc-per-node=2", "scripts/train.py", "experiment=pixel_sail_0_5b"]
    print(f"PIXEL_SAIL_DATA={root}", shlex.join([*command, *TINY, *tiny_teachers(), *WHOLE_EPOCH, "--dry-run"]))


if __name__ == "__main__":
    main()
