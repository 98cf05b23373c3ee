"""Convert a checkpoint to a folder that training and evaluation load, or export ours to the layout of the release.

    python tools/convert_checkpoint.py --from qwen2 --to runs/qwen2_5_0_5b  Qwen2.5-0.5B
    python tools/convert_checkpoint.py --from release --base Qwen2.5MM-0.5B --to exports/released  iter_139416.pth
    python tools/convert_checkpoint.py --to-release released  runs/mine/exports/step_00090000

SOURCE is a folder of safetensors, one .safetensors / .pth / .pt file, or a DeepSpeed ZeRO folder. Pickles that would
execute code are rejected. `conversion.json` in the new folder lists every key. See docs/conversion.md.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pixel_sail.conversion.convert import SHARD_BYTES, to_ours, to_release
from pixel_sail.conversion.report import REPORT, conversion_summary
from pixel_sail.conversion.sizes import DEFAULT_SIZES, Chosen
from pixel_sail.entry import one_message
from pixel_sail.model.configuration_pixel_sail import ATTENTION
from pixel_sail.model.mask_head import INITS

LAYOUT_NAMES = ("sail", "solo", "evev2", "qwen2", "release")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("--from", dest="layout", choices=LAYOUT_NAMES, help="layout of the checkpoint")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--to", type=Path, metavar="DIR", help="new folder in our layout")
    target.add_argument("--to-release", type=Path, metavar="DIR", help="new folder in the release's layout")
    parser.add_argument(
        "--base", type=Path, metavar="DIR", help="folder of config.json and tokenizer (default: SOURCE)"
    )
    defaults = Chosen()
    for option, kind, of_what in (
        ("patch_size", int, "in pixels, if the checkpoint has no patch embedding"),
        ("mask_stride", int, "in pixels, if it has no mask head"),
        ("mask_dim", int, "if it has no mask head"),
        ("max_long_side", int, "pixels"),
        ("attention", str, "between patches of an image"),
    ):
        usual = " or ".join(f"{own[option]} ({base})" for base, own in DEFAULT_SIZES.items())
        choices = ATTENTION if option == "attention" else None
        name = f"--{option.replace('_', '-')}"
        parser.add_argument(name, type=kind, choices=choices, help=f"{of_what}; default by base: {usual}")
    parser.add_argument("--visual-prompts", type=int, default=defaults.num_visual_prompts, help="0: without")
    parser.add_argument("--vocab-multiple", type=int, default=defaults.vocab_multiple)
    parser.add_argument("--seed", type=int, default=defaults.seed, help="seed of newly initialized parameters")
    parser.add_argument(
        "--init", choices=INITS, default=defaults.init, help="initialization of a new mask head, as model.init"
    )
    parser.add_argument("--shard-gb", type=float, default=SHARD_BYTES / 1e9, help="maximum file size in 1e9 bytes")
    options = parser.parse_args(arguments)
    if options.to is not None and options.layout is None:
        parser.error("--to needs --from, the layout of the checkpoint")
    return options


@one_message
def main(arguments: Sequence[str] | None = None) -> int:
    """Convert; wrong input ends with one message and exit status 2."""
    options = parse(arguments)
    shard_bytes = int(options.shard_gb * 1e9)
    if options.to_release is not None:
        folder, done = options.to_release, to_release(options.source, options.to_release, shard_bytes=shard_bytes)
    else:
        chosen = Chosen(
            patch_size=options.patch_size,
            mask_stride=options.mask_stride,
            mask_dim=options.mask_dim,
            num_visual_prompts=options.visual_prompts,
            max_long_side=options.max_long_side,
            attention=options.attention,
            vocab_multiple=options.vocab_multiple,
            seed=options.seed,
            init=options.init,
        )
        folder, base = options.to, options.base or options.source
        done = to_ours(options.source, options.layout, folder, base=base, chosen=chosen, shard_bytes=shard_bytes)
    for line in (*conversion_summary(done.plan), *done.remarks):
        print(line)
    print(f"{folder}: {len(done.plan.writes)} tensors, read back and equal; every key in {REPORT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
