"""The Accelerator and the whole DeepSpeed dictionary, written from our config with nothing left to "auto".

`training/loop.py` calls `build_accelerator` first. Plain processes (no DeepSpeed) take the same loop, which is how the
tests compare the two.
"""

import logging
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import DistributedType, GradientAccumulationPlugin, InitProcessGroupKwargs
from torch import distributed
from torch.distributed import distributed_c10d
from torch.utils.cpp_extension import get_default_build_root

from pixel_sail import dist
from pixel_sail.config import ConfigError, TrainConfig, WatchdogConfig

STALE_LOCK_S = 900.0
logger = logging.getLogger(__name__)


def deepspeed_dictionary(config: TrainConfig, accumulation: int) -> dict[str, Any]:
    """Return the complete DeepSpeed configuration of a run."""
    zero: dict[str, Any] = {
        "stage": config.deepspeed.stage,
        "contiguous_gradients": True,
        "overlap_comm": False,
        "reduce_scatter": True,
        "reduce_bucket_size": 50_000_000,
        "allgather_bucket_size": 50_000_000,
    }
    if config.deepspeed.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if config.deepspeed.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    if config.deepspeed.stage == 3:
        zero |= {"stage3_gather_16bit_weights_on_model_save": True, "stage3_param_persistence_threshold": 10_000}
        # How often the upsampler runs depends on the image sizes of a rank's batch: its parameters are gathered once
        # for all of them, with the mask head as a whole.
        zero["leaf_module"] = {"classes": ["MaskHead"]}
    micro = config.data.micro_batch_size
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro * accumulation * dist.launched_world_size(),
        "gradient_clipping": config.optim.max_grad_norm,
        "bf16": {"enabled": config.optim.precision == "bf16"},
        "fp16": {"enabled": False},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


def collective_timeout(config: WatchdogConfig) -> timedelta:
    """Return how long a rank waits for the others: longer than the watchdog, which says more before it ends a run."""
    if config.peer_timeout_s is not None:
        return timedelta(seconds=config.peer_timeout_s)
    return timedelta(seconds=max(1800.0, 2.0 * config.limit_s * config.slow_factor))


def give_timeout(timeout: timedelta) -> None:
    """Let every process group of this rank wait as long as the first one.

    DeepSpeed makes groups of its own, without a timeout: they would wait for a lost process for torch's 30 minutes
    (10 on GPUs), whatever was configured. Torch has no other way to reach them than by these names.
    """
    if distributed.is_initialized():
        for group in list(distributed_c10d._world.pg_map):
            distributed_c10d._set_pg_timeout(timeout, group)


LAUNCHER_SETTINGS = (
    *("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_", "ACCELERATE_CONFIG_DS_FIELDS", "ACCELERATE_GRADIENT_"),
    *("ACCELERATE_MIXED_PRECISION", "ACCELERATE_DOWNCAST_BF16", "ACCELERATE_FP8_", "ACCELERATE_DYNAMO_"),
    *("ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG"),
)
"""Beginnings of the variables by which `accelerate launch`, or the file that `accelerate config` wrote once, says how
to train."""


def leave_out_launcher_settings() -> None:
    """Forget how the launcher would train, and log it: `optim` and `deepspeed` decide, whatever started the processes.

    Accelerate would refuse its own DeepSpeed section beside ours, and follow it, or compile, where we say nothing.
    """
    left_out = {name: os.environ.pop(name) for name in sorted(os.environ) if name.startswith(LAUNCHER_SETTINGS)}
    if left_out and dist.rank() == 0:
        said = " ".join(f"{name.removeprefix('ACCELERATE_').lower()}={value}" for name, value in left_out.items())
        logger.info("optim and deepspeed decide how to train; left out of what accelerate was told: %s", said)


def check_build_lock(folder: Path) -> None:
    """Raise ConfigError for the lock of a process that was killed while DeepSpeed compiled its extension for CPUs.

    torch would wait for it without end and without a word. The compiler takes a minute or two.
    """
    for lock in folder.glob("**/deepspeed_shm_comm/lock"):
        age_s = time.time() - lock.stat().st_mtime
        if age_s > STALE_LOCK_S:
            raise ConfigError(
                f"{lock}: found the lock of a compilation that began {age_s / 60:.0f} minutes ago, expected none; the "
                "process that compiled was killed. Delete this file"
            )


def build_accelerator(config: TrainConfig, accumulation: int) -> Accelerator:
    """Return the accelerator of this process; its process group exists afterwards."""
    for noisy in ("DeepSpeed", "deepspeed", "accelerate"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    leave_out_launcher_settings()
    if config.deepspeed.enabled and not torch.cuda.is_available():
        check_build_lock(Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()))
    handlers = [InitProcessGroupKwargs(timeout=collective_timeout(config.watchdog))]
    mixed_precision = "bf16" if config.optim.precision == "bf16" else "no"
    if not config.deepspeed.enabled:
        plugin = GradientAccumulationPlugin(num_steps=accumulation, sync_with_dataloader=False)
        # Without `cpu`, accelerate would leave several CPU processes each with a model of its own, and say nothing.
        cpu = not torch.cuda.is_available()
        accelerator = Accelerator(
            cpu=cpu, gradient_accumulation_plugin=plugin, mixed_precision=mixed_precision, kwargs_handlers=handlers
        )
        if accelerator.num_processes != dist.launched_world_size():
            raise ConfigError(
                f"accelerate trains {accelerator.num_processes} processes together and chose "
                f"{accelerator.distributed_type}, expected the {dist.launched_world_size()} that were launched; "
                "use another launcher, or DeepSpeed"
            )
        return accelerator
    # `accelerate launch --cpu` sets this variable, and accelerate then silently leaves DeepSpeed out. DeepSpeed finds
    # out by itself that there is no GPU.
    os.environ.pop("ACCELERATE_USE_CPU", None)
    plugin = DeepSpeedPlugin(hf_ds_config=deepspeed_dictionary(config, accumulation))
    accelerator = Accelerator(deepspeed_plugin=plugin, mixed_precision=mixed_precision, kwargs_handlers=handlers)
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        raise ConfigError(
            f"deepspeed.enabled is true, but under this launcher accelerate chose {accelerator.distributed_type}; "
            "launch without its own --cpu option, or set deepspeed=none"
        )
    return accelerator
