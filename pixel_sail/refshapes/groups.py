"""Expressions of single attributes: "red things", "stars", "shapes with dots", each with all objects that have it.

`formats.py` writes them for the training images as a third referring dataset, in gRefCOCO's format. It replaces the
semantic segmentation of the paper's mixture: single words with large targets, from which a model trained from scratch
learns the words before it combines them. For example:

    Sentence(text="striped shapes", query=Query(attributes=(("texture", "striped"),)), targets=(1, 4), kind="group")
"""

import numpy as np

from pixel_sail.refshapes.kinds import VALUES
from pixel_sail.refshapes.queries import Query, SceneExpression
from pixel_sail.refshapes.scene import Scene
from pixel_sail.refshapes.templates import noun_phrase


def group_sentences(rng: np.random.Generator, scene: Scene) -> list[SceneExpression]:
    """Return one sentence for every attribute value that occurs in the scene but not on every object."""
    sentences = []
    for name, values in VALUES.items():
        for value in values:
            targets = tuple(item.index for item in scene.objects if getattr(item, name) == value)
            if 0 < len(targets) < len(scene.objects):
                query = Query(attributes=((name, value),))
                text = noun_phrase(rng, query.attributes, is_plural=True)
                sentences.append(SceneExpression(text=text, query=query, targets=targets, kind="group"))
    return sentences
