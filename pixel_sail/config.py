"""Configuration schemas: one dataclass per config group, with every setting, its default and its meaning.

`configs/*.yaml` are merged onto these schemas, so an unknown key or a wrong type fails before anything is built.
Scripts call `load_config("train", TrainConfig, overrides)` and get a validated object:

    load_config("train", TrainConfig, ["experiment=quickstart", "optim.lr=1e-3"]).optim.lr == 1e-3

"(release)" marks the value of the released Pixel-SAIL code, "ours" the choice of this project.

Entries of `data.sources` and `evals` are arbitrary: each names a function by `_target_` and gives its arguments.
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
from pixel_sail.texts import has_lone_surrogate
from pixel_sail.types import DataError

CONFIG_FOLDER = root_folder() / "configs"

PRECISIONS = ("fp32", "bf16")
OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "wsd")


class ConfigError(ExpectedError, ValueError):
    """A setting is invalid. The message names the key, the value found and the value expected."""


def check_range(name: str, value: float, low: float = 0.0, high: float = math.inf) -> None:
    """Raise ConfigError unless a setting is a finite number in [low, high]."""
    if not (math.isfinite(value) and low <= value <= high):
        most = "" if high == math.inf else f" and at most {high:g}"
        raise ConfigError(f"{name} is {value}, expected a number of at least {low:g}{most}")


def check_patterns(where: str, patterns: Sequence[str]) -> None:
    """Raise ConfigError if the list is empty or an entry is not a regular expression."""
    if not patterns:
        raise ConfigError(f"{where} is empty, expected regular expressions on names, such as 'decoder\\.'")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"{where}: {pattern!r} is not a regular expression ({error})") from error


def matching(where: str, pattern: str, names: Sequence[str]) -> list[str]:
    """Return the names that a regular expression matches from their start. Raises: ConfigError, with close matches, if
    there are none."""
    found = [name for name in names if re.match(pattern, name)]
    if not found:
        near = get_close_matches(pattern.replace("\\", ""), names, n=5, cutoff=0.0)
        raise ConfigError(
            f"{where}: {pattern!r} matches none of {len(names)} names from their start; close names: {near}"
        )
    return found


@dataclass(kw_only=True)
class LoraConfig:
    """Low-rank adapters (LoRA). The adapted weights are frozen."""

    rank: int = 0
    """Rank of the adapters; 0 disables them."""
    alpha: float = 16.0
    """Scale: the update of a weight is alpha / rank * B @ A."""
    targets: list[str] = field(default_factory=lambda: [r"decoder\.layers\..*_proj"])
    """Regular expressions, matched from the start of the names of linear layers."""

    def __post_init__(self) -> None:
        """Check the values."""
        if self.rank < 0 or not 0 < self.alpha < math.inf:
            raise ConfigError(f"model.lora: rank is {self.rank}, alpha {self.alpha}; expected 0 or more, and above 0")
        check_patterns("model.lora.targets", self.targets)


LONGEST_NAME = 200
"""Bytes. File systems allow 255, and some file names add a prefix."""


def check_name(name: str) -> None:
    """Raise ConfigError unless a run's name is valid as a folder name."""
    if not name.strip() or name in (".", "..") or "/" in name or not name.isprintable():
        raise ConfigError(
            f"name is {name!r}, expected the name of one folder: printable characters, no '/'; set run_dir for a "
            "folder elsewhere"
        )
    if len(os.fsencode(name)) > LONGEST_NAME:
        raise ConfigError(f"name has {len(os.fsencode(name))} bytes, expected at most {LONGEST_NAME}: {name!r}")


FRESH_PARTS = ("mask_head", "prompt_projection", "patch_embedding")
"""Parts of a model whose weight shapes depend on settings that ablations change."""


@dataclass(kw_only=True)
class ModelConfig:
    """Model architecture and initial weights."""

    architecture: Architecture = field(default_factory=Architecture)
    """Sizes of the network. `vocab_size` and `token_ids` are set from the tokenizer."""
    tokenizer: str = MISSING
    """Folder of a Hugging Face tokenizer."""
    init_from: str | None = None
    """Exported Pixel-SAIL folder to initialize from. None: random weights."""
    init_fresh: list[str] = field(default_factory=list)
    """Parts that are randomly initialized, or dropped, if their weights in `init_from` do not fit `architecture`:
    mask_head, prompt_projection, patch_embedding. Weights that fit are loaded. Empty: a mismatch is an error."""
    init: str = "ours"
    """Initialization of a new mask head and new distillation layers. ours: variance-preserving, with independent
    weights for each upsample block. torch (release): PyTorch's defaults, with identical weights for all blocks.
    Weights loaded from `init_from` are not changed."""
    vocab_multiple: int = 64
    """The vocabulary is padded to a multiple of this."""
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        """Check part names and choices."""
        if self.init not in INITS:
            raise ConfigError(f"model.init is {self.init!r}, expected one of {INITS}")
        check_range("model.vocab_multiple", self.vocab_multiple, low=1)
        if unknown := sorted(set(self.init_fresh) - set(FRESH_PARTS)):
            raise ConfigError(f"model.init_fresh: found {unknown}, expected some of {FRESH_PARTS}")


@dataclass(kw_only=True)
class DataConfig:
    """Training sources, their mixture, packing and batch size."""

    sources: dict[str, Any] = field(default_factory=dict)
    """Name -> `_target_` and arguments of a function that returns a `types.Source`."""
    details: str = "ours"
    """ours or released: default of those options in `configs/source/` for which our data differ from the release's,
    for example `data.sources.coco_vp.candidates`. Each option can also be set on its own."""
    repeats: dict[str, float] = field(default_factory=dict)
    """Source name -> repetitions of its items per epoch (default 1; the fractional part is a random subset)."""
    weights: dict[str, float] = field(default_factory=dict)
    """Alternative to `repeats`: source name -> fraction of an epoch of `epoch_samples`. Must list every source."""
    epoch_samples: int = 0
    """Samples per epoch when `weights` is set."""
    decontamination: DecontaminationConfig = field(default_factory=DecontaminationConfig)
    """Evaluation images that are excluded from training."""
    max_skipped_fraction: float = 0.001
    """The run fails when more than this fraction of the samples read so far (of one epoch, if longer) is unusable."""
    packing: PackingSettings = field(default_factory=PackingSettings)
    global_batch_size: int | None = 8
    """Packed sequences per optimizer step, over all processes and accumulation steps. Set exactly one of this and
    `samples_per_step`."""
    samples_per_step: int | None = None
    """Samples per optimizer step. The number of sequences is computed from the measured samples per sequence and
    rounded to a multiple of processes x micro-batch size (planning/length.py)."""
    planned_samples: int | None = None
    """Samples per epoch that `tools/plan_run.py` assumes if the data files are missing. Training counts them."""
    micro_batch_size: int = 1
    """Packed sequences per forward pass and process."""
    stream_rounds: int = 1
    """Number of sets of data streams. Steps cycle through the sets and read one packed sequence from each stream of a
    set; more sets let more data workers prepare one step."""
    num_workers: int = 2
    """Maximum data workers per training process; the number used divides the micro-batches of all rounds."""

    def __post_init__(self) -> None:
        """Check ranges and choices."""
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
        """Return the packed sequences per step, once the length of the run is resolved (planning/length.py)."""
        assert self.global_batch_size is not None, "data.samples_per_step was not resolved"
        return self.global_batch_size


DEFAULT_GROUP = "default"


@dataclass(kw_only=True)
class GroupConfig:
    """A parameter group with its own learning rate, weight decay or freezing."""

    match: list[str] = MISSING
    """Regular expressions, matched from the start of parameter names."""
    lr_scale: float = 1.0
    """Multiplier of the scheduled learning rate."""
    weight_decay: float | None = None
    """Overrides `optim.weight_decay` for the parameters of the group that decay."""
    frozen: bool = False
    """True: not trained, without gradient and optimizer state."""

    def __post_init__(self) -> None:
        """Check the values."""
        check_patterns("optim.groups: match", self.match)
        if self.lr_scale <= 0:
            raise ConfigError(f"optim.groups: lr_scale is {self.lr_scale}, expected above 0, or frozen: true")
        if self.weight_decay is not None and self.weight_decay < 0:
            raise ConfigError(f"optim.groups: weight_decay is {self.weight_decay}, expected 0 or more")


@dataclass(kw_only=True)
class MuonConfig:
    """Muon (orthogonalized updates) for the weights listed in training/roles.py, with `optim.optimizer=muon`."""

    lr_scale: float = 1.0
    """Multiplier of their group's learning rate. Updates are scaled to match the RMS of AdamW's."""
    momentum: float = 0.95
    """Nesterov momentum."""
    ns_steps: int = 5
    """Newton-Schulz steps."""

    def __post_init__(self) -> None:
        """Check the values."""
        check_range("optim.muon.lr_scale", self.lr_scale, low=math.nextafter(0.0, 1.0))
        check_range("optim.muon.momentum", self.momentum, high=math.nextafter(1.0, 0.0))
        check_range("optim.muon.ns_steps", self.ns_steps, low=1, high=100)


@dataclass(kw_only=True)
class OptimConfig:
    """Optimizer, learning-rate schedule and length of the run."""

    optimizer: str = "adamw"
    """adamw, or muon: Muon for matrices (training/roles.py) and AdamW for the rest."""
    muon: MuonConfig = field(default_factory=MuonConfig)
    steps: int | None = 1000
    """Optimizer steps of the run. Set exactly one of this and `epochs`."""
    epochs: float | None = None
    """Passes over the data. The number of steps is computed from the measured samples per epoch and per step
    (planning/length.py) and fixed for the rest of the run."""
    lr: float = 4e-5
    """Peak learning rate."""
    final_lr: float = 0.0
    """Learning rate after the last step."""
    warmup_fraction: float = 0.05
    """Fraction of the steps with linear warm-up."""
    schedule: str = "cosine"
    """Schedule after the warm-up: cosine, or wsd (constant, then linear decay)."""
    decay_fraction: float = 0.2
    """Fraction of the steps over which wsd decays."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.05
    decay_all: bool = False
    """True (release): norms, biases and embeddings also get weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    precision: str = "fp32"
    """fp32 or bf16."""
    activation_checkpointing: str = "none"
    """Activations recomputed in the backward pass, with the same results and less memory. feed_forward: the
    feed-forward half of every decoder layer, which saves most of its memory and takes about 10 % longer. layers: whole
    layers, about 33 % longer."""
    groups: dict[str, GroupConfig] = field(default_factory=dict)
    """Parameter groups by name. A parameter belongs to the first group that matches it, otherwise to `default`."""
    ema_decay: float = 0.0
    """Above 0, for example 0.999: validation and export use an exponential moving average of the weights."""

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
        """Return the steps of the run, once its length is resolved (planning/length.py)."""
        assert self.steps is not None, "optim.epochs was not resolved"
        return self.steps


@dataclass(kw_only=True)
class DeepSpeedConfig:
    """ZeRO sharding. The complete DeepSpeed configuration is generated from these fields and `optim`."""

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
"""Prefixes of a training step's log keys. Other keys begin with the name of a source or eval."""


@dataclass(kw_only=True)
class LogConfig:
    """Logging. One JSON line per logged step is always written to `<run_dir>/log.jsonl`."""

    every: int = 10
    """Steps between log lines."""
    tensorboard: bool = True
    wandb: str = "disabled"
    """disabled, offline or online."""
    wandb_project: str = "pixel_sail"
    progress: bool = True
    """Show a progress bar with the remaining time, or one line per logged step if stderr is not a terminal."""
    overlays: int = 4
    """Images logged at each validation with their predicted and ground-truth masks."""
    peak_tflops: float | None = None
    """Peak bf16 TFLOP/s of one GPU, for `perf/mfu`. None: looked up by GPU name; `perf/mfu` is not logged for an
    unknown GPU."""

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
    """Checkpointing and resuming."""

    every: int = 500
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """Number of complete checkpoints to keep."""
    asynchronous: bool = True
    """Write checkpoints in the background. Rank 0 needs host memory for a copy of the state, 12 bytes per parameter."""
    resume: str = "auto"
    """auto: resume from the last complete checkpoint if there is one. never: fail if the run folder has one."""
    allow_changed_data: bool = False
    """True: a run may resume with annotation files that differ from those it started with. The log lists them."""
    max_rollbacks: int = 0
    """Maximum number of rollbacks: after a non-finite loss or gradient, the run exits with status 85 and resumes from
    its last checkpoint with the data after the failed step. 0: the run fails."""
    stop_after: int = 0
    """Save and exit after this many steps of the session; a later session resumes. 0: run to the end."""

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
    """Time limits after which a stalled run ends, see training/watchdog.py."""

    limit_s: float = 1800.0
    """Maximum seconds of an optimizer step, including the wait for data. 0: no limit."""
    slow_factor: float = 4.0
    """Multiplier of the limit for the first three steps of a session and for each save and validation."""
    peer_timeout_s: float | None = None
    """Timeout in seconds of collective operations, after which a process ends. Must exceed the time rank 0 needs to
    write a checkpoint. None: max(1800, 2 * limit_s * slow_factor), so the watchdog reports first."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_range("watchdog.limit_s", self.limit_s)
        check_range("watchdog.slow_factor", self.slow_factor, low=1)
        if self.peer_timeout_s is not None and self.peer_timeout_s <= 0:
            raise ConfigError(f"watchdog.peer_timeout_s is {self.peer_timeout_s}, expected more than 0 seconds")


@dataclass(kw_only=True)
class MetricBoundConfig:
    """Interval [low, high] in which a logged metric must lie, see training/metric_bounds.py."""

    metric: str = MISSING
    """Key of log.jsonl, for example `loss/total` or `refshapes_val/ciou`."""
    after: int = MISSING
    """The first value logged at or after this step is checked, once."""
    low: float | None = None
    high: float | None = None
    action: str = "warn"
    """warn: log a warning. stop: save a checkpoint and exit."""

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
    """Generation settings."""

    max_new_tokens: int | None = None
    """Maximum tokens of an answer. None: 32 for tasks with masks only, 512 for tasks with text."""
    prompt: str = "standard"
    """Question template. standard: a plain request. paper: as in the released evaluation, with its stray spaces.
    short: the expression or question alone, for referring segmentation and region choice only."""
    mask: str = "union"
    """union: the masks of all generated [SEG] tokens are merged. first: only the first is used, as in the released
    evaluation."""
    answer: str = "generated"
    """generated: the model writes the answer. forced: the answer is fixed to "It is [SEG]."."""
    max_batch_tokens: int = 16384
    """Maximum tokens per batch: image and text tokens, padding included."""
    compile: str = "off"
    """off, or decode: single-token passes use torch.compile. The first answer takes half a minute or more longer, and a
    CPU needs a C++ compiler."""

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
    """Validation during training."""

    every: int = 0
    """Steps between validations. 0: no validation."""
    max_images: int = 64
    """Maximum images per eval; the number is logged with the result."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("every", "max_images"):
            check_range(f"validation.{name}", getattr(self, name))


@dataclass(kw_only=True)
class PathsConfig:
    """Paths of this machine; `configs/paths` fills them from environment variables."""

    data: str = "data"
    """Folder of all datasets."""
    runs: str = "runs"
    """Folder of all runs."""


@dataclass(kw_only=True)
class TrainConfig:
    """One training run."""

    name: str = MISSING
    """Name of the run and of its folder in `paths.runs`."""
    run_dir: str = "${paths.runs}/${name}"
    """Folder of the run."""
    seed: int = 0
    paths: PathsConfig = field(default_factory=PathsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    distillation: dict[str, TeacherSettings] = field(default_factory=dict)
    """Teachers by name: frozen networks whose features are distilled into the model. Empty: no distillation."""
    allow_random_teachers: bool = False
    """True: teachers may have random weights. For tests only."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    kernels: Kernels = field(default_factory=Kernels)
    """Implementations to use; all of them compute the same results."""
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    metric_bounds: dict[str, MetricBoundConfig] = field(default_factory=dict)
    """Name -> interval in which a loss or validation score must lie. Empty: nothing is checked."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    predict: PredictConfig = field(default_factory=PredictConfig)
    evals: dict[str, Any] = field(default_factory=dict)
    """Name -> `_target_` and arguments of a function that returns expressions to score, or a task."""

    def __post_init__(self) -> None:
        """Check the name, the seed (32 bits, the limit of NumPy's legacy generator) and incompatible settings."""
        check_name(self.name)
        check_range("seed", self.seed, high=2**32 - 1)
        for name in (*self.data.sources, *self.evals):
            if name in LOG_GROUPS:
                raise ConfigError(
                    f"a source or eval is named {name!r}, expected a name other than {', '.join(LOG_GROUPS)}; these "
                    "are prefixes of other log keys; rename it"
                )
        if self.optim.optimizer == "muon" and self.deepspeed.enabled and self.deepspeed.stage == 3:
            raise ConfigError(
                "optim.optimizer is 'muon' and deepspeed.stage is 3, which shards every matrix; expected another "
                "stage; use deepspeed=zero2 or optim=adamw"
            )


@dataclass(kw_only=True)
class EvalConfig:
    """Evaluation of one checkpoint."""

    checkpoint: str = MISSING
    """Exported folder, or a run folder (its `export`)."""
    output: str | None = None
    """Output folder of predictions and results. None: `evaluation`, next to the exported folder."""
    precision: str = "fp32"
    """fp32 or bf16."""
    paths: PathsConfig = field(default_factory=PathsConfig)
    predict: PredictConfig = field(default_factory=PredictConfig)
    evals: dict[str, Any] = field(default_factory=dict)
    max_images: int = 0
    """Score only the first images of each eval; the number is part of the result. 0: all images."""
    missing_data: str = "stop"
    """If files of an eval are missing: stop, or skip that eval and list it in the report."""
    seed: int = 0
    """Seed of the bootstrap. Each eval has its own resamples, the same for all checkpoints."""
    resamples: int = 1000
    """Bootstrap resamples of the images for confidence intervals. 0: no intervals."""
    examples: int = 12
    """Images of each eval in the report: a third each with the best, median and worst scores."""
    progress: bool = True
    """Show a progress bar."""

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
    """Run folder or exported folder."""
    image: str = MISSING
    """Image file or folder of images."""
    question: str = MISSING
    """Question; regions are written `<Prompt0>`, `<Prompt1>`, ..."""
    boxes: list[Any] = field(default_factory=list)
    """Visual prompts 0, 1, ... as (x0, y0, x1, y1) in pixels."""
    points: list[Any] = field(default_factory=list)
    """Further visual prompts, after the boxes, as (x, y) in pixels."""
    output: str = "runs/predict"
    """Output folder."""
    precision: str = "fp32"
    """fp32 or bf16."""
    predict: PredictConfig = field(default_factory=PredictConfig)


PREDICT_TEXTS = ("checkpoint", "image", "question", "output")
"""Settings of `PredictCommandConfig` that scripts/predict.py also accepts as options."""


@dataclass(kw_only=True)
class DemoLimits:
    """Limits of the demo, per user and in total."""

    upload_mb: float = 20.0
    """Maximum size of an uploaded image."""
    megapixels: float = 24.0
    """Maximum size of an image as stored, checked before decoding."""
    header_s: float = 10.0
    """Seconds after which a connection without a request is closed."""
    transfer_s: float = 120.0
    """Seconds within which a request must be received completely and a response sent completely."""
    text_characters: int = 1000
    """Maximum length of a question."""
    turns: int = 50
    """Maximum questions about one image."""
    answer_s: float = 120.0
    """Maximum seconds of an answer; a longer one is cut off."""
    waiting: int = 16
    """Maximum questions in the queue, including the one being answered."""
    images: int = 16
    """Images kept in memory with their conversations; the least recently used is dropped first."""
    idle_s: float = 3600.0
    """Seconds without a question after which an image is dropped."""


@dataclass(kw_only=True)
class DemoConfig:
    """The browser demo."""

    checkpoint: str = MISSING
    """Run folder or exported folder."""
    host: str = "127.0.0.1"
    """Address to listen on. There is no access control: keep it local, or use a reverse proxy with authentication."""
    port: int = 7860
    """Port to listen on."""
    names: list[str] = field(default_factory=list)
    """Host names under which browsers may request the page, in addition to `host` and the local ones."""
    precision: str = "fp32"
    """fp32 or bf16."""
    examples: int = 4
    """Number of synthetic example images on the page."""
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
    # Empty: only its name is used, by `${program}` in the defaults of files that several programs share.
    _STORE.store(group="program", name=_name, node={}, package="_global_")


def load_config(
    name: str, schema: type[ConfigT], overrides: Sequence[str], *, given: Mapping[str, str] = types.MappingProxyType({})
) -> ConfigT:
    """Compose `configs/<name>.yaml` with command-line overrides into a validated object.

    Text settings keep the text that was typed, see `overrides.py`. A leading `~` of a path is expanded. An empty
    `paths.data` or `paths.runs`, for example from an empty variable, counts as unset.
    given: texts by key of the schema that are used verbatim, without resolving `${...}`.
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
                # Hydra raises this for `recipe=null`.
                raise ConfigError(
                    f"{where}: {error}; to choose none of a group omit it, or put ~ before its name"
                ) from error
            _check_files(composed, schema, {override.partition("=")[0] for override in overrides})
        # Needed to resolve ${hydra:runtime.choices.model} and the like; not part of the result.
        HydraConfig.instance().set_config(composed)
        with open_dict(composed):
            del composed["hydra"]
        if "paths" in composed:
            for key, default in asdict(PathsConfig()).items():
                composed.paths[key] = _path(f"paths.{key}", composed.paths[key] or default)
        OmegaConf.resolve(composed)
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            raise ConfigError(f"configs/{name}.yaml: no value for {missing}; set each as key=value")
        _expand_homes(composed)
        result = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException) as error:
        plain = f"; --{', --'.join(PREDICT_TEXTS)} TEXT are used verbatim" if schema is PredictCommandConfig else ""
        cause = f": {str(error.__cause__).splitlines()[0]}" if str(error.__cause__ or "") else ""
        raise ConfigError(f"{where}: {error}{cause}{hint(str(error))}{plain}") from error
    assert is_dataclass(result) and isinstance(result, schema)
    if isinstance(result, TrainConfig) and not result.data.decontamination.enabled:
        for override in overrides:
            if override.startswith("decontamination@data.decontamination="):
                raise ConfigError(
                    f"{where}: {override} has no effect, as data.decontamination.enabled is false (recipe=released "
                    "sets it); add data.decontamination.enabled=true to exclude evaluation images, or omit it"
                )
    texts: dict[str, Any] = {key: text if key in _NO_PATHS else _path(key, text) for key, text in given.items()}
    config = replace(result, **texts)
    if has_lone_surrogate(getattr(config, "run_dir", "")):
        raise ConfigError(f"{where}: run_dir holds bytes that are not UTF-8, expected text; rename the folder")
    for key in _NEVER_EMPTY:
        if getattr(config, key, None) == "":
            raise ConfigError(f"{where}: {key} is empty, expected a value; check that the shell variable in it is set")
    return config


def _check_forms(where: str, overrides: Sequence[str], given: Mapping[str, str]) -> None:
    """Raise ConfigError for arguments that are not overrides, and for a setting that is also given as an option."""
    for override in overrides:
        if override.startswith("-") or ("=" not in override and not override.startswith("~")):
            raise ConfigError(f"{where}: found {override!r}, expected key=value; --help lists the keys")
        if (new := renamed_override(override)) is not None:
            raise ConfigError(f"{where}: found {override!r}, which was renamed; write {new}")
        if (key := override.partition("=")[0]) in given:
            raise ConfigError(f"{where}: {key} is given twice, as {override!r} and as --{key}")


_NEVER_EMPTY = ("name", "run_dir", "checkpoint", "output", "image")
"""Settings for which an empty text would mean the current folder."""
_NO_PATHS = ("name", "question")
"""Settings whose leading `~` is part of the text."""


def _composed(name: str, schema: type, overrides: Sequence[str]) -> DictConfig:
    """Return the configuration that Hydra composes from overrides as typed. Raises: HydraException,
    OmegaConfBaseException."""
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
    """Raise ConfigError where a chosen file has a number for a text setting that no override sets. YAML reads
    `name: 2024_11_05` as 20241105, which may be the name of another run."""
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
    """Return a path with `~` expanded. Raises: ConfigError if there is no home folder."""
    found = expanded(path)
    if found is None:
        raise ConfigError(
            f"{key} is {path!r}, but HOME is not set and the system does not know this user; give the full path"
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
    """Return the overrides of this process, without the deepspeed launcher's own --local_rank argument."""
    return [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]


def plain_options(arguments: Sequence[str], names: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Return the options `--name TEXT` and `--name=TEXT` among arguments, and the other arguments.

    The text may begin with a dash. Raises: ConfigError for an option without a text.
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
            raise ConfigError(f"{argument}: found nothing after it, expected {argument} TEXT")
        found.append((name, value))
    return found, rest


def check_plain(settings: Any, where: str) -> None:
    """Raise DataError if settings read from a file contain interpolations or functions to call."""
    waiting = [settings]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if special := [key for key in value if key.startswith("_")]:
                raise DataError(
                    f"{where}: found {special[0]!r:.80} among the settings, expected plain values; settings read from "
                    "a file cannot call functions"
                )
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str) and ("${" in value or "\0" in value):
            raise DataError(
                f"{where}: found the setting {value!r:.80}, expected plain text; settings read from a file cannot use "
                "interpolation"
            )


def build(node: Any, where: str) -> Any:
    """Call the function that an entry names in `_target_`. Raises: ConfigError for a wrong target or argument.

    Only for the user's own configuration, as the named function is executed. Settings from files of runs and
    evaluations are untrusted and go through `check_plain` instead (`evaluation/loaders.py`).
    """
    if not isinstance(node, dict) or "_target_" not in node:
        raise ConfigError(
            f"{where}: found no _target_ in {node}, expected a function and its arguments; an override changes an "
            "entry that no config file defines, choose a config file that does"
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
