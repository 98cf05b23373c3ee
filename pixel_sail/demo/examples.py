"""Synthetic example scenes, so that the demo can be tried without an image.

`scripts/demo.py` renders them with `pixel_sail/refshapes/`:

    render_examples(4, "short")[0]  ->  Example(image=<240x320>, text="large red star")
"""

import numpy as np
from PIL import Image

from pixel_sail.demo.server import DemoExample
from pixel_sail.evaluation.refer_seg import PROMPTS
from pixel_sail.refshapes.expressions import Describer
from pixel_sail.refshapes.focus import SceneRules
from pixel_sail.refshapes.scene import paint_scene, sample_scene

EXAMPLE_SEED = 20


def render_examples(count: int, prompt: str) -> list[DemoExample]:
    """Return deterministic scenes, each with a question about one object. prompt: see `PredictConfig`."""
    return [_render(index, prompt) for index in range(count)]


def _render(index: int, prompt: str) -> DemoExample:
    rng = np.random.default_rng((EXAMPLE_SEED, index))
    while True:
        scene = sample_scene(rng, SceneRules())
        describer = Describer(scene, rng, may_name_held_out=False)
        # Small models learn colors first.
        for item in scene.objects:
            if describer.by_filters.get((("colour", item.colour),)) == [item.index]:
                text = f"the {item.colour} {item.shape}"
                return DemoExample(
                    image=Image.fromarray(paint_scene(rng, scene)), text=PROMPTS[prompt].format(sent=text)
                )
