"""Builds the Accelerator and the complete DeepSpeed configuration from our config, without "auto" values.

`training/prepare.py` calls `build_accelerator`. Plain processes (no DeepSpeed) use the same training loop, which is how
the tests compare the two.
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
        # The number of upsampler calls depends on the image sizes in a rank's batch, so ranks could not agree on
        # gathers per call. The mask head is gathered once as a whole.
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
    """Return the timeout of collectives: longer than the watchdog's limit, as its report says more."""
    if config.peer_timeout_s is not None:
        return timedelta(seconds=config.peer_timeout_s)
    return timedelta(seconds=max(1800.0, 2.0 * config.limit_s * config.slow_factor))


def give_timeout(timeout: timedelta) -> None:
    """Set the timeout of every process group of this rank.

    DeepSpeed creates groups without a timeout, which would wait torch's default of 30 minutes (10 on GPUs) for a lost
    process. Torch offers no public way to change it.
    """
    if distributed.is_initialized():
        for group in list(distributed_c10d._world.pg_map):
            distributed_c10d._set_pg_timeout(timeout, group)


LAUNCHER_SETTINGS = (
    *("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_", "ACCELERATE_CONFIG_DS_FIELDS", "ACCELERATE_GRADIENT_"),
    *("ACCELERATE_MIXED_PRECISION", "ACCELERATE_DOWNCAST_BF16", "ACCELERATE_FP8_", "ACCELERATE_DYNAMO_"),
    *("ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG"),
)
"""Prefixes of the variables in which `accelerate launch`, or a file of `accelerate config`, sets training options."""


def leave_out_launcher_settings() -> None:
    """Remove the launcher's training options from the environment and log them; `optim` and `deepspeed` decide.

    Otherwise accelerate would raise for a second DeepSpeed section, or apply options that we do not set.
    """
    left_out = {name: os.environ.pop(name) for name in sorted(os.environ) if name.startswith(LAUNCHER_SETTINGS)}
    if left_out and dist.rank() == 0:
        said = " ".join(f"{name.removeprefix('ACCELERATE_').lower()}={value}" for name, value in left_out.items())
        logger.info("optim and deepspeed decide how to train; ignored settings of accelerate: %s", said)


def check_build_lock(folder: Path) -> None:
    """Raise ConfigError for the lock of a process that was killed while DeepSpeed compiled its CPU extension.

    torch would wait for it forever without a message. Compilation takes a minute or two.
    """
    for lock in folder.glob("**/deepspeed_shm_comm/lock"):
        age_s = time.time() - lock.stat().st_mtime
        if age_s > STALE_LOCK_S:
            raise ConfigError(
                f"{lock}: found the lock of a compilation that began {age_s / 60:.0f} minutes ago, expected none; the "
                "compiling process was killed. Delete this file"
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
        # Without `cpu`, accelerate silently trains a separate model in each of several CPU processes.
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
    # `accelerate launch --cpu` sets this variable, and accelerate then silently disables DeepSpeed. DeepSpeed itself
    # detects that there is no GPU.
    os.environ.pop("ACCELERATE_USE_CPU", None)
    plugin = DeepSpeedPlugin(hf_ds_config=deepspeed_dictionary(config, accumulation))
    accelerator = Accelerator(deepspeed_plugin=plugin, mixed_precision=mixed_precision, kwargs_handlers=handlers)
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        raise ConfigError(
            f"deepspeed.enabled is true, but under this launcher accelerate chose {accelerator.distributed_type}; "
            "launch without its own --cpu option, or set deepspeed=none"
        )
    return accelerator
