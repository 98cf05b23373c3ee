"""RefShapes: a synthetic referring-segmentation benchmark, rendered in minutes and written in the public formats.

`tools/make_refshapes.py` generates the data, which sources and evaluations read. `focus.py` samples the objects of a
scene, `scene.py` renders it, `expressions.py` finds expressions, `formats.py` writes the files. One image contributes,
for example:

    images/train2014/COCO_train2014_000000000001.jpg with six objects, "the star below the blue ring" -> annotation 4
"""

from pixel_sail.refshapes.formats import RefShapesSpec, write_refshapes

__all__ = ["RefShapesSpec", "write_refshapes"]
