"""Pixel-SAIL as a model of lmms-eval.

Lmms-eval finds the class through the manifest of `lmms_eval_plugin.py`, builds it from `--model_args`, and calls
`generate_until` with this rank's requests. `answering.py` computes the answers. Example:

    --model pixel_sail --model_args pretrained=runs/quickstart,precision=bf16,max_batch_tokens=65536

The kit distributes documents over ranks by stride and gathers the scores. There is no communication here.
"""

from typing import Any, NoReturn

import torch
from lmms_eval.api.model import lmms
from tqdm import tqdm

from pixel_sail import dist
from pixel_sail.config import ConfigError, PredictConfig
from pixel_sail.evaluation.predict import BatchPredictor
from pixel_sail.evaluation.run import checkpoint_folder
from pixel_sail.types import DTYPES
from pixel_sail.vqa.answering import answers
from pixel_sail.vqa.kit_requests import DEFAULT_MAX_NEW_TOKENS, to_request


class PixelSail(lmms):
    """Greedy answers about one image or none."""

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        precision: str = "fp32",
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_tokens: int = PredictConfig.max_batch_tokens,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
    ) -> None:
        """Load the run folder or exported folder `pretrained` onto the device of this process.

        `max_batch_tokens` limits a batch (see `PredictConfig`); the kit's `batch_size` must be 1. `max_new_tokens` is
        the default length limit. Raises: ConfigError for a missing checkpoint or a wrong setting.
        """
        super().__init__()
        if precision not in DTYPES:
            raise ConfigError(f"model_args: precision is {precision!r}, expected one of {sorted(DTYPES)}")
        if str(batch_size) != "1":
            raise ConfigError(
                f"--batch_size is {batch_size}, expected none: images differ in size, so tokens limit a batch; "
                "use --model_args max_batch_tokens=65536 instead"
            )
        # Several processes are often started with the same --device cuda, but each has its own GPU.
        self.device = dist.local_device() if device in (None, "cuda") else torch.device(device)
        self.max_new_tokens = max_new_tokens
        self.predictor = BatchPredictor.from_pretrained(
            checkpoint_folder(pretrained),
            config=PredictConfig(max_batch_tokens=max_batch_tokens),
            precision=precision,
            device=str(self.device),
        )
        self._rank, self._world_size = dist.rank(), dist.launched_world_size()

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Return one answer per request, in order. Raises: DataError for a request that the model cannot answer."""
        shown = tqdm(requests, desc="questions", disable=self.rank != 0)
        own = (
            to_request(request.args, self.task_dict, default_max_new_tokens=self.max_new_tokens) for request in shown
        )
        return list(answers(self.predictor, own))

    def loglikelihood(self, requests: list[Any]) -> NoReturn:
        """Raise DataError: answer probabilities are not supported."""
        _refuse(requests, "loglikelihood")

    def generate_until_multi_round(self, requests: list[Any]) -> NoReturn:
        """Raise DataError: multi-round dialogs are not supported."""
        _refuse(requests, "generate_until_multi_round")


def _refuse(requests: list[Any], kind: str) -> NoReturn:
    tasks = sorted({request.task_name for request in requests})
    raise NotImplementedError(
        f"tasks {tasks}: {kind} requests found, but this model supports generate_until only; exclude these tasks or "
        "use their variant with generated answers (MME, MMBench, SEED-Bench and MMStar have one)"
    )
