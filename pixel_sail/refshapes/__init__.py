"""RefShapes: an embedded referring-segmentation benchmark, rendered in minutes and written in the public formats.

Makes the data that sources and evaluations read; nothing else imports it. `focus.py` says which objects a scene has,
`scene.py` renders, `expressions.py` speaks, `formats.py` writes. What one image contributes, as an example of the data:

    images/train2014/COCO_train2014_000000000001.jpg with six objects, "the star below the blue ring" -> annotation 4
"""

from pixel_sail.refshapes.formats import RefShapesSpec, write_refshapes

__all__ = ["RefShapesSpec", "write_refshapes"]
