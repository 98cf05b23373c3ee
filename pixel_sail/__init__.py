"""Pixel-SAIL: pixel-grounded understanding with one decoder-only transformer (arXiv 2504.10465).

Subpackages in the order of the data flow: `types` (shared data types), `data` (files to batches), `model` (batches to
text and mask logits), `losses`, `training`, `evaluation` and `metrics`. The public API is `Predictor`:

    predictor = pixel_sail.Predictor.from_pretrained("runs/mine")
    predictor.segment("image.jpg", "the dog on the left").mask
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pixel_sail.predictor import Chat, Predictor, PredictorRequest
    from pixel_sail.predictor_io import Box, Point, PredictorOutput

__all__ = ["Box", "Chat", "Point", "Predictor", "PredictorOutput", "PredictorRequest"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import public names on first use, so that tools without a model start without torch."""
    if name not in __all__:
        raise AttributeError(f"module 'pixel_sail' has no attribute {name!r}")
    from pixel_sail import predictor, predictor_io

    return getattr(predictor_io if hasattr(predictor_io, name) else predictor, name)
