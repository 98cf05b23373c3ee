"""Writes the card of a trained model, and uploads both to the Hugging Face hub.

`tools/publish_model.py` calls it. The content of the card is read from the files of the run and its evaluation:

    runs/mine/{config.json, starts.jsonl, export/, evaluation/results.jsonl}  ->  runs/mine/export/README.md
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from pixel_sail.config import ConfigError
from pixel_sail.errors import ExpectedError
from pixel_sail.evaluation.results import EVALUATION, RESULTS_FILE, SCORED, ResultRow, read_rows
from pixel_sail.evaluation.run import EXPORT
from pixel_sail.evaluation.tables import scores_table
from pixel_sail.files import read_json, read_json_lines, replace_text
from pixel_sail.model.folder import MODEL_FILES, hash_of, holds_model, model_hashes, weights_hash
from pixel_sail.model.reading import weight_shapes
from pixel_sail.provenance import STARTS
from pixel_sail.renamed import current_config
from pixel_sail.types import DataError

CARD = "README.md"
MADE_BY = "<!-- Made by tools/publish_model.py:"
"""Marks a card of this tool, which may be replaced."""
UPLOADED = (*MODEL_FILES, CARD)

LIMITS = """\
- It knows what the data above show, and was scored on nothing but the table above.
- A score beside a mask is the mean probability of its pixels. It is not calibrated, and says nothing about the words.
- The model predicts a mask for what a question names. It learns to decline questions about absent objects only from
  data with such questions.
- Answers can be wrong or offensive; nothing filters them."""


_ROW = SCORED | dict.fromkeys(("weights_sha256", "prompt", "precision", "code"), str)
"""Fields of a row of results that the card uses."""


def write_card(run_dir: Path, *, name: str, license_name: str) -> Path:
    """Write the card into the exported folder of a run, and return its file.

    Raises: ConfigError for a run without export or configuration, and for a card that was written by hand.
    """
    card = run_dir / EXPORT / CARD
    if card.is_file() and MADE_BY not in card.read_text():
        raise ConfigError(f"{card} was not made by this tool and is not replaced; move it away to write a new one")
    replace_text(card, card_text(run_dir, name=name, license_name=license_name))
    return card


def card_text(run_dir: Path, *, name: str, license_name: str) -> str:
    """Return the card of a run's exported model. Raises: ConfigError as `write_card`."""
    export = run_dir / EXPORT
    remedy = "give the folder of a run whose training finished, with the files it wrote"
    if not holds_model(export):
        raise ConfigError(f"{export}: the model is not there; {remedy}")
    kinds = dict.fromkeys(("model", "data", "optim", "predict"), dict) | {"seed": int}
    config = current_config(read_json(run_dir / "config.json", kinds, fail=ConfigError, remedy=remedy))
    head = {
        "license": license_name,
        "library_name": "pixel_sail",
        "pipeline_tag": "image-segmentation",
        "tags": ["pixel-sail", "referring-segmentation", "arxiv:2504.10465"],
    }
    # JSON is valid YAML.
    front = [f"{key}: {json.dumps(value)}" for key, value in head.items()]
    shapes = weight_shapes(export)
    try:
        sections = [
            _model(config, num_parameters=sum(map(math.prod, shapes.values()))),
            _use(name, config["predict"]["prompt"]),
            _data(config["data"]),
            _recipe(run_dir, config),
        ]
    except ExpectedError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{run_dir / 'config.json'}: found no configuration of a run ({type(error).__name__}: {error}); {remedy}"
        ) from error
    parts = [
        "\n".join(["---", *front, "---", f"{MADE_BY} replaced by each call. -->", ""]),
        f"# {name.rpartition('/')[2]}\n",
        *sections,
        _scores(run_dir, export),
        f"## Limits\n\n{LIMITS}\n",
    ]
    return "\n".join(parts)


def _model(config: Mapping[str, Any], *, num_parameters: int) -> str:
    """Return the description of the model."""
    own = config["model"]["architecture"]
    return (
        "A Pixel-SAIL model ([arXiv 2504.10465](https://arxiv.org/abs/2504.10465)): one decoder-only transformer that "
        f"answers questions about images with text and masks. {num_parameters / 1e6:,.1f} M parameters, base "
        f"{own['base']}, {own['num_hidden_layers']} layers of width {own['hidden_size']}, "
        f"patches of {own['patch_size']} pixels, mask "
        f"logits every {own['mask_stride']} pixels, images up to {own['max_long_side']} pixels long, up to "
        f"{own['num_visual_prompts']} marked regions.\n"
    )


def _use(name: str, prompt: str) -> str:
    """Return the usage example, with the model's question template if it is not the default."""
    lines, given = ["from pixel_sail import Predictor"], ""
    if prompt != "standard":
        lines.append("from pixel_sail.config import PredictConfig")
        given = f', config=PredictConfig(prompt="{prompt}")'
    lines += [
        "",
        f'predictor = Predictor.from_pretrained("{name}"{given})',
        'predictor.segment("image.jpg", "the dog on the left").mask',
    ]
    return "## Use\n\n```python\n" + "\n".join(lines) + "\n```\n"


def _data(data: Mapping[str, Any]) -> str:
    """Return the training data, without paths of the machine."""
    lines = ["## Data", "", "| source | kind | how often |", "|---|---|---|"]
    for name, source in data["sources"].items():
        details = [str(source[key]) for key in ("dataset", "split", "split_by") if source.get(key)]
        kind = source["_target_"].removeprefix("pixel_sail.data.sources.").removesuffix(".load")
        often = f"weight {data['weights'][name]}" if data["weights"] else f"{data['repeats'].get(name, 1)} x per epoch"
        lines.append(f"| {name} | {' '.join([kind, *details])} | {often} |")
    filtered = data["decontamination"]["enabled"]
    lines += [
        "",
        "Images of the RefCOCO family's evaluation splits were left out of every source."
        if filtered
        else "**Images of evaluation splits were not left out.**",
        "",
    ]
    return "\n".join(lines)


def _recipe(run_dir: Path, config: Mapping[str, Any]) -> str:
    """Return the training recipe, and code and packages of every start of the run."""
    optim, data = config["optim"], config["data"]
    decay = f", decay over the last {optim['decay_fraction']}" if optim.get("schedule") == "wsd" else ""
    muon = {"Muon for matrices": str(optim["muon"])} if optim.get("optimizer") == "muon" else {}
    rows = {
        "steps": optim["steps"],
        "sequences per step, tokens per sequence": f"{data['global_batch_size']}, {data['packing']['seq_len']}",
        "learning rate": (
            f"{optim['lr']} to {optim['final_lr']}, warm-up {optim['warmup_fraction']} of the steps{decay}"
        ),
        "AdamW betas, weight decay": f"{optim['betas']}, {optim['weight_decay']}",
        **muon,
        "largest gradient norm": optim["max_grad_norm"],
        "precision": optim["precision"],
        "seed": config["seed"],
        "started from": Path(config["model"]["init_from"]).name if config["model"]["init_from"] else "random weights",
        "distillation": ", ".join(config["distillation"]) or "none",
        "averaged weights": optim["ema_decay"] or "no",
    }
    file = run_dir / STARTS
    kinds = {"step": int, "packages": dict, "code": str, "world_size": int, "device": str}
    starts = read_json_lines(file, kinds, fail=ConfigError, remedy="correct or delete that line")
    for start in starts:
        versions = ", ".join(f"{name} {version}" for name, version in start["packages"].items())
        rows[f"from step {start['step']}"] = (
            f"code {start['code']}, {start['world_size']} x {start['device']}, {versions}"
        )
    if not starts:
        rows["code"] = "not recorded"
    return "\n".join(
        ["## Recipe", "", "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items()), ""]
    )


def _scores(run_dir: Path, export: Path) -> str:
    """Return the scores of this exact model; older rows without `model_sha256` identify only the weights."""
    hashes = model_hashes(export)
    weights_sha256, model_sha256 = weights_hash(export, hashes), hash_of(hashes)
    folder = run_dir / EVALUATION
    rows = read_rows(folder, fields=_ROW) if (folder / RESULTS_FILE).is_file() else {}
    own = {
        name: row
        for name, row in rows.items()
        if row["weights_sha256"] == weights_sha256 and row.get("model_sha256", model_sha256) == model_sha256
    }
    if not own:
        return "## Scores\n\nThese weights were not scored.\n"
    table = scores_table("Scores", {name: row["scores"] for name, row in own.items()}, _intervals(own))
    settings = sorted({f"prompt {row['prompt']}, {row['precision']}, code {row['code']}" for row in own.values()})
    limited = [f"{name} on {row['limit_images']} images only" for name, row in own.items() if row.get("limit_images")]
    lines = [
        *table.markdown(),
        "",
        "In brackets 95 % intervals over images. Names with `paper_` are computed as the released scripts do, the "
        f"others by the usual definitions. Asked with: {'; '.join([*settings, *limited])}. "
        f"Weights: sha256 {weights_sha256[:16]}.",
        "",
    ]
    return "\n".join(lines)


def _intervals(rows: Mapping[str, ResultRow]) -> dict[str, dict[str, tuple[float, float]]]:
    return {
        name: {score: (low, high) for score, (low, high) in row.get("intervals", {}).items()}
        for name, row in rows.items()
    }


def push_model(folder: Path, name: str, *, public: bool) -> str:
    """Upload an exported folder with its card to the hub, and return the commit that holds it.

    Only the model's files (weights as safetensors) and the card are uploaded. Raises: DataError if the upload fails.
    """
    try:
        api = HfApi()
        api.create_repo(name, private=not public, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name, folder_path=folder, allow_patterns=list(UPLOADED), commit_message="Upload with pixel_sail"
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise DataError(
            f"hub {name}: {error}; use owner/name of a model that you may write, and log in with `hf auth login`"
        ) from error
    return str(commit.oid)
