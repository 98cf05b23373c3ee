"""The page a user reads to know what can be configured: one dataclass per config group.

`configs/*.yaml` are merged onto these schemas, so that an unknown key or a wrong type fails before anything is built.
Scripts call `load_config("train", TrainConfig, overrides)` and get a checked object back:

    load_config("train", TrainConfig, ["experiment=quickstart", "optim.lr=1e-3"]).optim.lr == 1e-3

`data.sources` and `evals` are open sets: each entry names a function by `_target_` and its arguments.
"""

import math
import os
import re
import sys
import types
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from pixel_sail.data.decontamination import DecontaminationConfig
from pixel_sail.data.details import DETAIL_CHOICES
from pixel_sail.data.packing import PackingSettings
from pixel_sail.distillation.settings import TeacherSettings
from pixel_sail.errors import ExpectedError
from pixel_sail.losses.total import LossConfig
from pixel_sail.model.configuration_pixel_sail import Architecture
from pixel_sail.model.kernels import CHECKPOINTING, Kernels
from pixel_sail.model.mask_head import INITS
from pixel_sail.overrides import as_typed, kind_of, needs_look, quoted
from pixel_sail.paths import expanded, root_folder
from pixel_sail.renamed import hint, renamed_log_key, renamed_override, renamed_target
from pixel_sail.texts import has_half_character
from pixel_sail.types import DataError

CONFIG_FOLDER = root_folder() / "configs"

PRECISIONS = ("fp32", "bf16")
OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "wsd")


class ConfigError(ExpectedError, ValueError):
    """A configuration is wrong; the message names the key, what was found and what was expected."""


def check_range(name: str, value: float, low: float = 0.0, high: float = math.inf) -> None:
    """Raise ConfigError unless a setting is a finite number of this range."""
    if not (math.isfinite(value) and low <= value <= high):
        most = "" if high == math.inf else f" and at most {high:g}"
        raise ConfigError(f"{name} is {value}, expected a number of at least {low:g}{most}")


def check_patterns(where: str, patterns: Sequence[str]) -> None:
    """Raise ConfigError unless there are patterns and all are regular expressions."""
    if not patterns:
        raise ConfigError(f"{where} is empty, expected regular expressions on names, such as 'decoder\\.'")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"{where}: {pattern!r} is not a regular expression ({error})") from error


def matching(where: str, pattern: str, names: Sequence[str]) -> list[str]:
    """Return the names whose start a regular expression matches. Raises: ConfigError, with near names, for none."""
    found = [name for name in names if re.match(pattern, name)]
    if not found:
        near = get_close_matches(pattern.replace("\\", ""), names, n=5, cutoff=0.0)
        raise ConfigError(f"{where}: {pattern!r} matches none of {len(names)} names from its start; near ones: {near}")
    return found


@dataclass(kw_only=True)
class LoraConfig:
    """Low-rank adapters; what they adapt is frozen."""

    rank: int = 0
    """0: none."""
    alpha: float = 16.0
    """The change of a weight is alpha / rank times the product of its two matrices."""
    targets: list[str] = field(default_factory=lambda: [r"decoder\.layers\..*_proj"])
    """Regular expressions on the names of linear layers, read from the name's start."""

    def __post_init__(self) -> None:
        """Check the values."""
        if self.rank < 0 or not 0 < self.alpha < math.inf:
            raise ConfigError(f"model.lora: rank is {self.rank}, alpha {self.alpha}; expected 0 or more, and above 0")
        check_patterns("model.lora.targets", self.targets)


LONGEST_NAME = 200
"""Bytes; file systems allow 255, and some names are made longer."""


def check_name(name: str) -> None:
    """Raise ConfigError unless a run's name can be the name of its folder."""
    if not name.strip() or name in (".", "..") or "/" in name or not name.isprintable():
        raise ConfigError(
            f"name is {name!r}, expected the name of one folder: printable characters, no '/'; a folder elsewhere is "
            "named by run_dir"
        )
    if len(os.fsencode(name)) > LONGEST_NAME:
        raise ConfigError(f"name has {len(os.fsencode(name))} bytes, expected at most {LONGEST_NAME}: {name!r}")


FRESH_PARTS = ("mask_head", "prompt_projection", "patch_embedding")
"""Parts of a model whose weights depend on choices that ablations change."""


@dataclass(kw_only=True)
class ModelConfig:
    """What is trained, and from which weights."""

    architecture: Architecture = field(default_factory=Architecture)
    """Sizes; `vocab_size` and `token_ids` are filled in from the tokenizer."""
    tokenizer: str = MISSING
    """Folder of a Hugging Face tokenizer."""
    init_from: str | None = None
    """Exported Pixel-SAIL folder whose weights training starts from; None starts from random weights."""
    init_fresh: list[str] = field(default_factory=list)
    """Parts that are initialized anew, or left out, where the weights of `init_from` were made for another
    `architecture`: mask_head, prompt_projection, patch_embedding. Where they fit they are taken. Empty: what does not
    fit is an error."""
    init: str = "ours"
    """How the mask head and the layers towards teachers are initialized where they are new. ours: the signal keeps its
    variance, each upsample block has weights of its own. torch (release): PyTorch's defaults, all blocks start alike.
    Weights taken from `init_from` stay as they are."""
    vocab_multiple: int = 64
    """The vocabulary is padded to a multiple of this."""
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        """Check the names of parts and the choice."""
        if self.init not in INITS:
            raise ConfigError(f"model.init is {self.init!r}, expected one of {INITS}")
        check_range("model.vocab_multiple", self.vocab_multiple, low=1)
        if unknown := sorted(set(self.init_fresh) - set(FRESH_PARTS)):
            raise ConfigError(f"model.init_fresh: found {unknown}, expected some of {FRESH_PARTS}")


@dataclass(kw_only=True)
class DataConfig:
    """Which sources, how often each, packed how."""

    sources: dict[str, Any] = field(default_factory=dict)
    """Name -> `_target_` and arguments of a function that returns a `types.Source`."""
    details: str = "ours"
    """ours or released: what the options of `configs/source/` stand at in which the project's data differ from the
    release's, such as `data.sources.coco_vp.candidates`; each can be set by itself."""
    repeats: dict[str, float] = field(default_factory=dict)
    """Name -> how often its items occur in an epoch (default 1; fractions sample a random part)."""
    weights: dict[str, float] = field(default_factory=dict)
    """Instead of repeats: name -> fraction of an epoch of `epoch_samples`, for every source."""
    epoch_samples: int = 0
    """Samples of an epoch where `weights` is set."""
    decontamination: DecontaminationConfig = field(default_factory=DecontaminationConfig)
    """Evaluation images that training must not see."""
    max_skipped_fraction: float = 0.001
    """The run fails when more of the mixture's samples than this (of an epoch at least) could not be used."""
    packing: PackingSettings = field(default_factory=PackingSettings)
    global_batch_size: int | None = 8
    """Packed sequences of one optimizer step, over all processes and accumulation steps. Exactly one of this and
    `samples_per_step` is set."""
    samples_per_step: int | None = None
    """Instead: samples of one optimizer step. The number of sequences follows from how many samples a sequence holds,
    which is measured, and is rounded to what the processes can share (planning/length.py)."""
    planned_samples: int | None = None
    """Samples of an epoch that `tools/plan_run.py` assumes where the files are not there. Training counts them."""
    micro_batch_size: int = 1
    """Packed sequences of one forward pass on one process."""
    stream_rounds: int = 1
    """Sets of data streams that are read in turn, one packed sequence from each stream of a set per step; more of them
    let more workers share the work of one step."""
    num_workers: int = 2
    """Loader processes per training process; as many are used as divide the micro-batches of all rounds."""

    def __post_init__(self) -> None:
        """Check the numbers and the choice."""
        if self.details not in DETAIL_CHOICES:
            raise ConfigError(f"data.details is {self.details!r}, expected one of {DETAIL_CHOICES}")
        if (self.global_batch_size is None) == (self.samples_per_step is None):
            raise ConfigError(
                f"data.global_batch_size is {self.global_batch_size}, data.samples_per_step is {self.samples_per_step};"
                " expected exactly one of them: data.global_batch_size=32 data.samples_per_step=null for a number of "
                "sequences, data.global_batch_size=null data.samples_per_step=128 for a number of samples"
            )
        for name in ("micro_batch_size", "stream_rounds"):
            check_range(f"data.{name}", getattr(self, name), low=1)
        for name in ("num_workers", "epoch_samples"):
            check_range(f"data.{name}", getattr(self, name))
        check_range("data.max_skipped_fraction", self.max_skipped_fraction, high=1)
        for name in ("global_batch_size", "samples_per_step", "planned_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"data.{name} is {value}, expected 1 or more")

    @property
    def resolved_batch_size(self) -> int:
        """Return the sequences of a step, which are known once the length of the run is (planning/length.py)."""
        assert self.global_batch_size is not None, "data.samples_per_step was not resolved"
        return self.global_batch_size


DEFAULT_GROUP = "default"


@dataclass(kw_only=True)
class GroupConfig:
    """Parameters that are trained in their own way."""

    match: list[str] = MISSING
    """Regular expressions on parameter names, read from the name's start."""
    lr_scale: float = 1.0
    """Factor on the schedule's learning rate."""
    weight_decay: float | None = None
    """In place of `optim.weight_decay`, for those parameters that decay at all."""
    frozen: bool = False
    """Kept as they are: no gradient, no optimizer state."""

    def __post_init__(self) -> None:
        """Check the values."""
        check_patterns("optim.groups: match", self.match)
        if self.lr_scale <= 0:
            raise ConfigError(f"optim.groups: lr_scale is {self.lr_scale}, expected above 0, or frozen: true")
        if self.weight_decay is not None and self.weight_decay < 0:
            raise ConfigError(f"optim.groups: weight_decay is {self.weight_decay}, expected 0 or more")


@dataclass(kw_only=True)
class MuonConfig:
    """Orthogonal updates of the weights that training/roles.py names, under `optim.optimizer=muon`."""

    lr_scale: float = 1.0
    """Factor on the learning rate of their group. Updates are scaled to be as large as AdamW's."""
    momentum: float = 0.95
    """Of the mean of gradients, in Nesterov's form."""
    ns_steps: int = 5
    """Newton-Schulz steps."""

    def __post_init__(self) -> None:
        """Check the values."""
        check_range("optim.muon.lr_scale", self.lr_scale, low=math.nextafter(0.0, 1.0))
        check_range("optim.muon.momentum", self.momentum, high=math.nextafter(1.0, 0.0))
        check_range("optim.muon.ns_steps", self.ns_steps, low=1, high=100)


@dataclass(kw_only=True)
class OptimConfig:
    """The optimizer, and the learning rate over the steps."""

    optimizer: str = "adamw"
    """adamw; or muon: orthogonal updates for matrices (training/roles.py), AdamW for the rest."""
    muon: MuonConfig = field(default_factory=MuonConfig)
    steps: int | None = 1000
    """Optimizer steps of the run. Exactly one of this and `epochs` is set."""
    epochs: float | None = None
    """Instead: passes over the data. The number of steps follows from the samples of an epoch and of a step, which are
    measured (planning/length.py), and is part of the run from then on."""
    lr: float = 4e-5
    final_lr: float = 0.0
    warmup_fraction: float = 0.05
    schedule: str = "cosine"
    """What follows the warm-up: cosine; or wsd: the rate stays, and decays linearly at the end."""
    decay_fraction: float = 0.2
    """Fraction of the steps over which wsd decays."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.05
    decay_all: bool = False
    """True (release): weight decay also on norms, biases and embeddings."""
    max_grad_norm: float = 1.0
    precision: str = "fp32"
    """fp32 or bf16."""
    activation_checkpointing: str = "none"
    """What the backward pass computes again instead of keeping it: same numbers, less memory. feed_forward: the second
    half of every decoder layer, most of its memory for about a tenth more time. layers: everything but what goes into
    each layer, about a third more time."""
    groups: dict[str, GroupConfig] = field(default_factory=dict)
    """Parameter groups by name; a parameter belongs to the first that matches it, the others to the group `default`."""
    ema_decay: float = 0.0
    """Above 0: validation and export use an exponential moving average of the weights, such as 0.999."""

    def __post_init__(self) -> None:
        """Check the choices."""
        if self.optimizer not in OPTIMIZERS:
            raise ConfigError(f"optim.optimizer is {self.optimizer!r}, expected one of {OPTIMIZERS}")
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"optim.schedule is {self.schedule!r}, expected one of {SCHEDULES}")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"optim.precision is {self.precision!r}, expected one of {PRECISIONS}")
        if self.activation_checkpointing not in CHECKPOINTING:
            raise ConfigError(
                f"optim.activation_checkpointing is {self.activation_checkpointing!r}, expected one of {CHECKPOINTING}"
            )
        for name in ("lr", "final_lr", "eps", "weight_decay", "max_grad_norm"):
            check_range(f"optim.{name}", getattr(self, name))
        for beta in self.betas:
            check_range("optim.betas", beta, high=math.nextafter(1.0, 0.0))
        if (self.steps is None) == (self.epochs is None):
            raise ConfigError(
                f"optim.steps is {self.steps}, optim.epochs is {self.epochs}; expected exactly one of them: "
                "optim.steps=100 optim.epochs=null for a number of steps, optim.steps=null optim.epochs=1 for passes "
                "over the data"
            )
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"optim.steps is {self.steps}, expected 1 or more")
        if self.epochs is not None and not 0.0 < self.epochs < math.inf:
            raise ConfigError(f"optim.epochs is {self.epochs}, expected a number above 0")
        if not 0.0 <= self.warmup_fraction <= 1.0:
            raise ConfigError(f"optim.warmup_fraction is {self.warmup_fraction}, expected 0 .. 1")
        check_range("optim.decay_fraction", self.decay_fraction, high=1.0)
        if self.schedule == "wsd" and self.warmup_fraction + self.decay_fraction > 1.0:
            raise ConfigError(
                f"optim.warmup_fraction is {self.warmup_fraction} and optim.decay_fraction {self.decay_fraction}, "
                "expected at most 1 together"
            )
        if not 0.0 <= self.ema_decay < 1.0:
            raise ConfigError(f"optim.ema_decay is {self.ema_decay}, expected 0 (off) or more, and less than 1")
        if DEFAULT_GROUP in self.groups:
            raise ConfigError(
                f"optim.groups: {DEFAULT_GROUP!r} is the name of the parameters in no group; rename yours"
            )

    @property
    def num_steps(self) -> int:
        """Return the steps of the run, which are known once its length is (planning/length.py)."""
        assert self.steps is not None, "optim.epochs was not resolved"
        return self.steps


@dataclass(kw_only=True)
class DeepSpeedConfig:
    """Sharding; the whole DeepSpeed dictionary is written from these fields and `optim`."""

    enabled: bool = True
    stage: int = 2
    """ZeRO stage 0 .. 3."""
    offload_optimizer: bool = False
    offload_parameters: bool = False

    def __post_init__(self) -> None:
        """Check the choices."""
        if self.stage not in (0, 1, 2, 3):
            raise ConfigError(f"deepspeed.stage is {self.stage}, expected 0, 1, 2 or 3")


LOG_GROUPS = ("loss", "optim", "data", "perf", "time")
"""What the keys of a training step's numbers begin with in the log; names of sources and evals begin the others."""


@dataclass(kw_only=True)
class LogConfig:
    """Where progress goes; one JSON line per logged step is always written to `<run_dir>/log.jsonl`."""

    every: int = 10
    """Steps between log lines."""
    tensorboard: bool = True
    wandb: str = "disabled"
    """disabled, offline or online."""
    wandb_project: str = "pixel_sail"
    progress: bool = True
    """Show a progress bar with the time left, or where stderr is no terminal a plain line per logged step."""
    overlays: int = 4
    """Images with predicted and true mask that are logged at each validation."""
    peak_tflops: float | None = None
    """bf16 TFLOP/s of one GPU that `perf/mfu` is a fraction of; None: from its name where known, else it is not
    logged."""

    def __post_init__(self) -> None:
        """Check the choices."""
        check_range("log.every", self.every, low=1)
        check_range("log.overlays", self.overlays)
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise ConfigError(f"log.peak_tflops is {self.peak_tflops}, expected a number above 0")
        if self.wandb not in ("disabled", "offline", "online"):
            raise ConfigError(f"log.wandb is {self.wandb!r}, expected disabled, offline or online")


@dataclass(kw_only=True)
class CheckpointConfig:
    """When the state is saved, and whether a run continues from it."""

    every: int = 500
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """How many complete checkpoints stay."""
    asynchronous: bool = True
    """Write in the background while training goes on; rank 0 holds a copy of the state, 12 bytes per parameter, in
    host memory meanwhile."""
    resume: str = "auto"
    """auto: continue from the last complete checkpoint if there is one. never: refuse a used run folder."""
    allow_changed_data: bool = False
    """True: a run may go on although annotation files differ from those it was started with; the log names them."""
    max_rollbacks: int = 0
    """How often a run may go back to its last checkpoint and past the data that made a loss or gradient not finite;
    each time it ends with status 85. 0: it stops."""
    stop_after: int = 0
    """Save and end this session after so many steps, 0 to go on to the end; a later session continues."""

    def __post_init__(self) -> None:
        """Check the choices."""
        if self.resume not in ("auto", "never"):
            raise ConfigError(f"checkpoint.resume is {self.resume!r}, expected auto or never")
        if self.keep < 1 or self.every < 1 or self.max_rollbacks < 0:
            raise ConfigError(
                "checkpoint.keep and checkpoint.every must be 1 or more, checkpoint.max_rollbacks 0 or more"
            )


@dataclass(kw_only=True)
class WatchdogConfig:
    """When a run that stands still is ended, see training/watchdog.py."""

    limit_s: float = 1800.0
    """Seconds that an optimizer step may take, waiting for its data included; 0: for ever."""
    slow_factor: float = 4.0
    """So many times longer may the first three steps of a session take, and each save and validation."""
    peer_timeout_s: float | None = None
    """A process that waited so long for another one takes it for lost and ends. Must be longer than rank 0 needs to
    write a checkpoint. None: twice what the watchdog allows, so that it speaks first, and half an hour at least."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_range("watchdog.limit_s", self.limit_s)
        check_range("watchdog.slow_factor", self.slow_factor, low=1)
        if self.peer_timeout_s is not None and self.peer_timeout_s <= 0:
            raise ConfigError(f"watchdog.peer_timeout_s is {self.peer_timeout_s}, expected more than 0 seconds")


@dataclass(kw_only=True)
class MetricBoundConfig:
    """Where a number of the log is expected, see training/metric_bounds.py."""

    metric: str = MISSING
    """Key of log.jsonl, for example `loss/total` or `refshapes_val/ciou`."""
    after: int = MISSING
    """The first value at this step or later is judged, once."""
    low: float | None = None
    high: float | None = None
    action: str = "warn"
    """warn, or stop: save and end the run."""

    def __post_init__(self) -> None:
        """Check the choices."""
        if self.action not in ("warn", "stop"):
            raise ConfigError(f"metric_bounds: action is {self.action!r}, expected warn or stop")
        if self.low is None and self.high is None:
            raise ConfigError(f"metric_bounds: the bound of {self.metric} has neither low nor high")
        if (new := renamed_log_key(self.metric)) is not None:
            raise ConfigError(f"metric_bounds: metric is {self.metric!r}, which was renamed; write {new}")


@dataclass(kw_only=True)
class PredictConfig:
    """How answers are generated."""

    max_new_tokens: int | None = None
    """Longest answer; None: as long as the task needs, 32 for masks alone and 512 where there is text to be said."""
    prompt: str = "standard"
    """standard: a plain request. paper: with the stray blanks of the released evaluation. short: the expression
    or the question alone, for referring segmentation and region choices only."""
    mask: str = "union"
    """union of all generated [SEG], or only the `first` one as in the released evaluation."""
    answer: str = "generated"
    """generated, or `forced` to "It is [SEG]."."""
    max_batch_tokens: int = 16384
    """Most tokens worked on at once: those of the images of a batch and of all their texts, padding included."""
    compile: str = "off"
    """off, or `decode`: the passes that read one token each go through torch.compile, half a minute or more before the
    first answer and a C++ compiler on a CPU."""

    def __post_init__(self) -> None:
        """Check the choices."""
        choices = {
            "prompt": ("standard", "paper", "short"),
            "mask": ("union", "first"),
            "answer": ("generated", "forced"),
            "compile": ("off", "decode"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"predict.{name} is {getattr(self, name)!r}, expected one of {allowed}")
        if self.max_new_tokens is not None and self.max_new_tokens < 0:
            raise ConfigError(f"predict.max_new_tokens is {self.max_new_tokens}, expected 0 or more, or null")


@dataclass(kw_only=True)
class ValidationConfig:
    """Scoring during training."""

    every: int = 0
    """Steps between validations, 0 for none."""
    max_images: int = 64
    """Images of each eval that are scored during training; the number is part of the logged result."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("every", "max_images"):
            check_range(f"validation.{name}", getattr(self, name))


@dataclass(kw_only=True)
class PathsConfig:
    """The only place with machine paths; `configs/paths` fills it from environment variables."""

    data: str = "data"
    runs: str = "runs"


@dataclass(kw_only=True)
class TrainConfig:
    """One training run."""

    name: str = MISSING
    """Of the run, and of its folder in `paths.runs`."""
    run_dir: str = "${paths.runs}/${name}"
    seed: int = 0
    paths: PathsConfig = field(default_factory=PathsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    distillation: dict[str, TeacherSettings] = field(default_factory=dict)
    """Frozen networks whose features the model learns to predict as well, by name; empty: none."""
    allow_random_teachers: bool = False
    """True: teachers may have random weights, which only a test of the machinery wants."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    kernels: Kernels = field(default_factory=Kernels)
    """Which way of computing the same numbers is taken."""
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    metric_bounds: dict[str, MetricBoundConfig] = field(default_factory=dict)
    """Name -> where a loss or validation score is expected after so many steps; empty: nothing is judged."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    predict: PredictConfig = field(default_factory=PredictConfig)
    evals: dict[str, Any] = field(default_factory=dict)
    """Name -> `_target_` and arguments of a function that returns expressions to score, or a task."""

    def __post_init__(self) -> None:
        """Check the name, the seed, of which NumPy's old generator takes 32 bits, and what must fit together."""
        check_name(self.name)
        check_range("seed", self.seed, high=2**32 - 1)
        for name in (*self.data.sources, *self.evals):
            if name in LOG_GROUPS:
                raise ConfigError(
                    f"a source or eval is named {name!r}, expected a name other than {', '.join(LOG_GROUPS)}: with "
                    "these begin keys of the log that are not its own; rename it"
                )
        if self.optim.optimizer == "muon" and self.deepspeed.enabled and self.deepspeed.stage == 3:
            raise ConfigError(
                "optim.optimizer is 'muon' and deepspeed.stage is 3, which cuts every matrix into parts; expected "
                "another stage: take deepspeed=zero2, or optim=adamw"
            )


@dataclass(kw_only=True)
class EvalConfig:
    """One evaluation of one checkpoint."""

    checkpoint: str = MISSING
    """Exported folder, or a run folder (its `export`)."""
    output: str | None = None
    """Folder for predictions and results; by default `evaluation` beside the exported folder."""
    precision: str = "fp32"
    paths: PathsConfig = field(default_factory=PathsConfig)
    predict: PredictConfig = field(default_factory=PredictConfig)
    evals: dict[str, Any] = field(default_factory=dict)
    max_images: int = 0
    """Score only the first images of each eval, 0 for all; the number is part of the result."""
    missing_data: str = "stop"
    """What to do when files of an eval are not there: stop, or skip these evals and say so in the report."""
    seed: int = 0
    """Of the resampling; evals have resamples of their own, equal for all checkpoints."""
    resamples: int = 1000
    """How often images are sampled for the intervals of the scores, 0 for none."""
    examples: int = 12
    """Images of each eval in the report: a third each of its best, median and worst answers."""
    progress: bool = True

    def __post_init__(self) -> None:
        """Check the choices."""
        if self.missing_data not in ("stop", "skip"):
            raise ConfigError(f"missing_data is {self.missing_data!r}, expected stop or skip")
        for name in ("max_images", "resamples", "examples"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected 0 or more")


@dataclass(kw_only=True)
class PredictCommandConfig:
    """One question about one image, or about every image of a folder."""

    checkpoint: str = MISSING
    image: str = MISSING
    """Image file or folder of images."""
    question: str = MISSING
    boxes: list[Any] = field(default_factory=list)
    """Visual prompts 0, 1, ... as (x0, y0, x1, y1) in pixels."""
    points: list[Any] = field(default_factory=list)
    """Further visual prompts as (x, y) in pixels."""
    output: str = "runs/predict"
    precision: str = "fp32"
    predict: PredictConfig = field(default_factory=PredictConfig)


PREDICT_TEXTS = ("checkpoint", "image", "question", "output")
"""Settings of `PredictCommandConfig` that scripts/predict.py also takes as options."""


@dataclass(kw_only=True)
class DemoLimits:
    """How much one user of the demo may ask for, and all together."""

    upload_mb: float = 20.0
    megapixels: float = 24.0
    """Of an image as stored, checked before it is decoded."""
    header_s: float = 10.0
    """A connection that has not asked for anything after so many seconds is ended."""
    transfer_s: float = 120.0
    """A request with its image must have come within so many seconds, and what is sent must be taken."""
    text_characters: int = 1000
    turns: int = 50
    """Questions about one image."""
    answer_s: float = 120.0
    """An answer that takes longer is broken off."""
    waiting: int = 16
    """Questions in the queue, the one being answered included."""
    images: int = 16
    """Images in memory with what was said about them; the one not asked about for longest goes first."""
    idle_s: float = 3600.0
    """An image nobody asked about for so long is forgotten."""


@dataclass(kw_only=True)
class DemoConfig:
    """The demo in a browser."""

    checkpoint: str = MISSING
    host: str = "127.0.0.1"
    """Address to listen at. Everybody who reaches it can ask: leave it local, or put a server with passwords before."""
    port: int = 7860
    names: list[str] = field(default_factory=list)
    """Names under which browsers may call it beside `host` and the local ones."""
    precision: str = "fp32"
    examples: int = 4
    """Synthetic scenes that the page offers."""
    predict: PredictConfig = field(default_factory=PredictConfig)
    limits: DemoLimits = field(default_factory=DemoLimits)


ConfigT = TypeVar("ConfigT", TrainConfig, EvalConfig, PredictCommandConfig, DemoConfig)

_STORE = ConfigStore.instance()
for _name, _node in (
    ("train", TrainConfig),
    ("evaluate", EvalConfig),
    ("predict", PredictCommandConfig),
    ("demo", DemoConfig),
):
    _STORE.store(name=f"{_name}_schema", node=_node)
    # Empty: its name alone is read, by `${program}` in the defaults of a file that several programs take.
    _STORE.store(group="program", name=_name, node={}, package="_global_")


def load_config(
    name: str, schema: type[ConfigT], overrides: Sequence[str], *, given: Mapping[str, str] = types.MappingProxyType({})
) -> ConfigT:
    """Compose `configs/<name>.yaml` with command-line overrides into a checked object.

    Settings that hold text get the text that was typed, see `overrides.py`. A leading `~` of a path is the home
    folder, and an empty `paths.data` or `paths.runs`, as of an empty variable, counts as not given.
    given: texts by key of the schema that are taken as they are, without even `${...}`.
    Raises: ConfigError for unknown keys, wrong types, missing values and choices that do not exist.
    """
    where = f"configs/{name}.yaml {[*overrides, *(f'--{key}={text}' for key, text in given.items())]}"
    _check_forms(where, overrides, given)
    stand_ins: list[str] = [f"{key}={quoted('given')}" for key in given]
    try:
        with initialize_config_dir(str(CONFIG_FOLDER), version_base=None):
            try:
                composed = _composed(name, schema, [*overrides, *stand_ins])
            except OmegaConfBaseException:
                raise
            except ValueError as error:
                # What Hydra raises for `recipe=null`.
                raise ConfigError(
                    f"{where}: {error}; to choose none of a group leave it out, or put ~ before its name"
                ) from error
            _check_files(composed, schema, {override.partition("=")[0] for override in overrides})
        # For names of what was chosen, such as ${hydra:runtime.choices.model}; not part of the result.
        HydraConfig.instance().set_config(composed)
        with open_dict(composed):
            del composed["hydra"]
        if "paths" in composed:
            for key, default in asdict(PathsConfig()).items():
                composed.paths[key] = _path(f"paths.{key}", composed.paths[key] or default)
        OmegaConf.resolve(composed)
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            raise ConfigError(f"configs/{name}.yaml: no value for {missing}; give each as key=value")
        _expand_homes(composed)
        result = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException) as error:
        plain = (
            f"; --{', --'.join(PREDICT_TEXTS)} TEXT are taken as they stand" if schema is PredictCommandConfig else ""
        )
        cause = f": {str(error.__cause__).splitlines()[0]}" if str(error.__cause__ or "") else ""
        raise ConfigError(f"{where}: {error}{cause}{hint(str(error))}{plain}") from error
    assert is_dataclass(result) and isinstance(result, schema)
    if isinstance(result, TrainConfig) and not result.data.decontamination.enabled:
        for override in overrides:
            if override.startswith("decontamination@data.decontamination="):
                raise ConfigError(
                    f"{where}: {override} is without effect, as data.decontamination.enabled is false (recipe=released "
                    "sets it); add data.decontamination.enabled=true to keep evaluation images out, or leave it out"
                )
    texts: dict[str, Any] = {key: text if key in _NO_PATHS else _path(key, text) for key, text in given.items()}
    config = replace(result, **texts)
    if has_half_character(getattr(config, "run_dir", "")):
        raise ConfigError(f"{where}: run_dir holds bytes that are no UTF-8, expected a name that is text")
    for key in _NEVER_EMPTY:
        if getattr(config, key, None) == "":
            raise ConfigError(f"{where}: {key} is empty, expected a value; a shell variable may not have been set")
    return config


def _check_forms(where: str, overrides: Sequence[str], given: Mapping[str, str]) -> None:
    """Raise ConfigError for what is no override, and for a setting that is also given as an option."""
    for override in overrides:
        if override.startswith("-") or ("=" not in override and not override.startswith("~")):
            raise ConfigError(f"{where}: found {override!r}, expected key=value; --help lists the keys")
        if (new := renamed_override(override)) is not None:
            raise ConfigError(f"{where}: found {override!r}, which was renamed; write {new}")
        if (key := override.partition("=")[0]) in given:
            raise ConfigError(f"{where}: {key} is given twice, as {override!r} and as --{key}")


_NEVER_EMPTY = ("name", "run_dir", "checkpoint", "output", "image")
"""Settings whose empty text would be read as the current folder."""
_NO_PATHS = ("name", "question")
"""Settings whose leading `~` is part of the text."""


def _composed(name: str, schema: type, overrides: Sequence[str]) -> DictConfig:
    """Return what Hydra composes of overrides as they were typed. Raises: HydraException, OmegaConfBaseException."""
    before = OmegaConf.create()
    if any(needs_look(override, schema) for override in overrides):
        before = compose(name, as_typed([o for o in overrides if not needs_look(o, schema)], schema, lambda key: False))

    def text_before(key: str) -> bool:
        try:
            return isinstance(OmegaConf.select(before, key), str)
        except OmegaConfBaseException:
            return False

    return compose(name, as_typed(overrides, schema, text_before), return_hydra_config=True)


def _check_files(composed: DictConfig, schema: type, given: Collection[str]) -> None:
    """Raise ConfigError where a chosen file has a number for a text that no override gives: `name: 2024_11_05` is
    20241105 by the rules of YAML, and another run's name may be the same."""
    chosen = [(group, name) for group, name in composed.hydra.runtime.choices.items() if isinstance(name, str)]
    folders = [Path(source.path) for source in composed.hydra.runtime.config_sources if source.schema == "file"]
    for file in (folder / group / f"{name}.yaml" for group, name in chosen for folder in folders):
        text = file.read_text() if file.is_file() else ""
        content = OmegaConf.create(text) if "@package _global_" in text else OmegaConf.create()
        settings: Any = OmegaConf.to_container(content)
        for key, value in settings.items():
            if kind_of(schema, str(key)) is str and isinstance(value, int | float) and key not in given:
                raise ConfigError(
                    f"{file}: {key} is {value!r} as YAML reads it, expected text; put the value in quotation marks"
                )


def _path(key: str, path: str) -> str:
    """Return a path with the home folder for `~`. Raises: ConfigError where there is none."""
    found = expanded(path)
    if found is None:
        raise ConfigError(
            f"{key} is {path!r}, but HOME is not set and the system does not know this user; write it out"
        )
    return found


def _expand_homes(node: Any, where: str = "") -> None:
    """Replace `~` in every path below a node."""
    for key in range(len(node)) if isinstance(node, ListConfig) else list(node):
        own, value = f"{where}{key}", node[key]
        if isinstance(value, DictConfig | ListConfig):
            _expand_homes(value, f"{own}.")
        elif isinstance(value, str) and value.startswith("~") and own not in _NO_PATHS:
            node[key] = _path(own, value)


def command_line_overrides() -> list[str]:
    """Return the overrides of this process; the deepspeed launcher's own --local_rank argument is left out."""
    return [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]


def plain_options(arguments: Sequence[str], names: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Return the options `--name TEXT` and `--name=TEXT` among arguments, and the other arguments.

    The text is whatever stands there, also when it begins with a dash. Raises: ConfigError for an option without one.
    """
    found: list[tuple[str, str]] = []
    rest: list[str] = []
    left = iter(arguments)
    for argument in left:
        option, separator, text = argument.partition("=")
        name = option.removeprefix("--")
        if option == name or name not in names:
            rest.append(argument)
            continue
        value = text if separator else next(left, None)
        if value is None:
            raise ConfigError(f"{argument}: found nothing behind it, expected {argument} TEXT")
        found.append((name, value))
    return found, rest


def check_plain(settings: Any, where: str) -> None:
    """Raise DataError where settings of a file ask for anything to be looked up or called."""
    waiting = [settings]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if special := [key for key in value if key.startswith("_")]:
                raise DataError(
                    f"{where}: found {special[0]!r:.80} among the settings, expected plain ones; settings of a file "
                    "call nothing"
                )
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str) and ("${" in value or "\0" in value):
            raise DataError(
                f"{where}: found the setting {value!r:.80}, expected plain text; settings of a file look nothing up"
            )


def build(node: Any, where: str) -> Any:
    """Call the function an open-set entry names; ConfigError for a wrong target or argument.

    For entries of the user's own configuration only: what it names is run. Files of runs and evaluations, which may be
    somebody else's, pass `check_plain` and name nothing that is called (`evaluation/loaders.py`).
    """
    if not isinstance(node, dict) or "_target_" not in node:
        raise ConfigError(
            f"{where}: found no _target_ in {node}, expected a function and its arguments; the entry was changed where "
            "no config file defines it"
        )
    if (new := renamed_target(str(node["_target_"]))) is not None:
        raise ConfigError(f"{where}: _target_ is {node['_target_']!r}, which was renamed; write {new}")
    try:
        return instantiate(node, _convert_="all")
    except HydraException as error:
        cause = error.__cause__ or error
        if isinstance(cause, ValueError):
            raise cause from None
        raise ConfigError(f"{where}: {error}{hint(str(error), where)}") from error
