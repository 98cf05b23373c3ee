"""Render the first packed batch of a training config as the model receives it.

    python tools/show_batch.py experiment=quickstart
    python tools/show_batch.py data=refcoco model=sail_0_5b out=runs/batch

Takes the overrides of scripts/train.py. Writes index.html, batch.txt, stages.png (source, sample, packed sequence,
batch in one figure) and one PNG per image to `out=FOLDER` (default: runs/first_batch). Tokens are decoded to text, with
supervised tokens marked. Exit status 2, with the reason, for a wrong config or wrong data.
"""

import logging
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from pixel_sail.cli import script_help, wants_help
from pixel_sail.config import TrainConfig, load_config
from pixel_sail.data.collate import collate
from pixel_sail.data.mixture import Mixture, StreamItem
from pixel_sail.data.packing import PackedStream
from pixel_sail.entry import one_message
from pixel_sail.evaluation.batch_view import batch_facts, write_batch_view
from pixel_sail.evaluation.stage_view import write_stages
from pixel_sail.model.processing_pixel_sail import PixelSailProcessor
from pixel_sail.planning.parameters import fill_in_vocabulary
from pixel_sail.training.build import configured_tokenizer
from pixel_sail.training.prepare import build_mixture, measure_length, sample_cost
from pixel_sail.types import Batch, DataError, Sample


@one_message
def main(arguments: Sequence[str] | None = None) -> int:
    """Write the view and return the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if wants_help(given):
        print(script_help(Path(__file__), "TrainConfig"))
        return 0
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    folders = [argument.removeprefix("out=") for argument in given if argument.startswith("out=")]
    overrides = [argument for argument in given if not argument.startswith("out=")]
    if not any(override.startswith(("name=", "experiment=")) for override in overrides):
        overrides.append("name=show_batch")
    folder = Path(folders[-1] if folders else "runs/first_batch")
    config = load_config("train", TrainConfig, overrides)
    processor = processor_of(config)
    fill_in_vocabulary(config.model)
    mixture = build_mixture(config.data, seed=config.seed)
    batch = first_batch(config, mixture, processor)
    write_batch_view(folder, batch, processor)
    print("\n".join(batch_facts(batch)))
    written = [folder / "index.html", folder / "batch.txt"]
    if (found := first_with_image(mixture, batch)) is not None:
        place, sample = found
        written.append(folder / "stages.png")
        num_items = len(mixture.sources[place.source])
        write_stages(written[-1], sample, batch, source=place.source_name, num_items=num_items, item=place.item)
    print(f"written: {', '.join(map(str, written))}")
    return 0


def processor_of(config: TrainConfig) -> PixelSailProcessor:
    """Return the model's processor. Raises: ConfigError if its tokenizer is missing or unusable."""
    return PixelSailProcessor.for_model(configured_tokenizer(config.model), config.model.architecture)


def first_with_image(mixture: Mixture, batch: Batch) -> tuple[StreamItem, Sample] | None:
    """Return the first sample of the mixture that has an image and is in the batch, and its place in the sources; None
    if it is not among the first thousand."""
    for position in range(1000):
        place = mixture.stream_item(position)
        if mixture.sources[place.source].image_path(place.item) is not None:
            with suppress(DataError):
                sample = mixture.item(position).sample
                if sample.sample_id in batch.sample_ids:
                    return place, sample
    return None


def first_batch(config: TrainConfig, mixture: Mixture, processor: PixelSailProcessor) -> Batch:
    """Return the first micro-batch of the first process. Raises: DataError."""
    data, sequences, cost = config.data, [], sample_cost(config)
    global_batch_size = data.global_batch_size
    if global_batch_size is None:
        global_batch_size = measure_length(config, mixture, processor).global_batch_size
    for index in range(data.micro_batch_size):
        stream = PackedStream(mixture, processor, data.packing, index=index, num_streams=global_batch_size, cost=cost)
        sequences.append(next(iter(stream)))
    return collate(sequences, seg_id=processor.seg_id)


if __name__ == "__main__":
    sys.exit(main())
