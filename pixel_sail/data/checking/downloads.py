"""What each dataset is, where it comes from and where it belongs.

The table of `data/README.md`, and what the data check says about something that is missing.

`evaluation/data_check.py` asks `advice_for` about paths that do not exist. Example:

    advice_for("data/ref_seg/refcocog/refs(umd).p: found no such file ...")
    ->  ("data/ref_seg/refcocog: refs(umd).p (or refs(google).p), instances.json. From github.com/...",)

Addresses stand here only where a publisher is known to use them; other datasets are named by their project.
"""

import re
from dataclasses import dataclass

REFER = "github.com/lichengunc/refer"
COCO = "cocodataset.org"
IMAGE_LICENCE = "images: the Flickr licence of each"
UNKNOWN_LICENCE = "not known here: read the publisher's terms"


@dataclass(frozen=True, kw_only=True)
class Download:
    """One folder of the data tree."""

    folder: str
    """Below the data folder."""
    holds: str
    origin: str
    licence: str
    size: str
    sources: str
    """What to check it with: sources of configs/source."""
    aliases: tuple[str, ...] = ()
    """Other paths that mean the same, or lie in the folder and would be taken for another one's."""
    is_synthetic: bool = False
    """Made by this project, nothing to download."""

    def advice(self) -> str:
        """Return what to get and where to put it."""
        size = f" ({self.size})" if self.size else ""
        return f"data/{self.folder}: {self.holds}. From {self.origin}{size}; licence: {self.licence}."

    def table_row(self) -> str:
        """Return the row of data/README.md."""
        check = f"`python tools/check_data.py source={self.sources}`" if self.sources else ""
        return f"| `{self.folder}` | {self.holds} | {self.origin} | {self.licence} | {self.size or '-'} | {check} |"


DOWNLOADS = (
    Download(
        folder="ref_seg/images/train2014",
        holds="the images of COCO train2014, COCO_train2014_*.jpg",
        origin=f"{COCO}, train images 2014",
        licence=IMAGE_LICENCE,
        size="82,783 files, about 13 GB",
        sources="refcoco",
        aliases=("images/train2014", "images/mscoco/images/train2014", "coco2014/train2014"),
    ),
    Download(
        folder="ref_seg/refcoco",
        holds="refs(unc).p, instances.json",
        origin=REFER,
        licence="toolbox Apache-2.0, COCO annotations CC BY 4.0",
        size="142,210 sentences",
        sources="refcoco",
        aliases=("refcoco",),
    ),
    Download(
        folder="ref_seg/refcoco+",
        holds="refs(unc).p, instances.json",
        origin=REFER,
        licence="toolbox Apache-2.0, COCO annotations CC BY 4.0",
        size="141,564 sentences",
        sources="refcoco_plus",
        aliases=("refcoco+",),
    ),
    Download(
        folder="ref_seg/refcocog",
        holds="refs(umd).p (or refs(google).p), instances.json",
        origin=REFER,
        licence="toolbox Apache-2.0, COCO annotations CC BY 4.0",
        size="95,010 sentences",
        sources="refcocog",
        aliases=("refcocog",),
    ),
    Download(
        folder="ref_seg/grefcoco",
        holds="grefs(unc).json, instances.json",
        origin="github.com/henghuiding/gRefCOCO",
        licence=UNKNOWN_LICENCE,
        size="259,859 sentences",
        sources="grefcoco",
        aliases=("ref_seg/grefs", "grefcoco"),
    ),
    Download(
        folder="coco",
        holds="annotations/panoptic_train2017.json, annotations/panoptic_train2017/*.png, train2017/*.jpg, "
        "val2017/*.jpg",
        origin=f"{COCO}, images 2017 and panoptic annotations 2017",
        licence=f"annotations CC BY 4.0, {IMAGE_LICENCE}",
        size="118,287 + 5,000 images, about 19 GB",
        sources="coco_panoptic",
    ),
    Download(
        folder="glamm_data/annotations",
        holds="GranDf_HA_GCG_train.json, RefCOCOg_GCG_train.json, OpenPsgGCG_train.json, "
        "flickr_mergedGT_GCG_train.json, gcg_val_test/{val,test}_gcg_coco_{mask,caption}_gt.json",
        origin="the GLaMM project, github.com/mbzuai-oryx/groundingLMM",
        licence=UNKNOWN_LICENCE,
        size="",
        sources="grandf,refcocog_gcg,openpsg_gcg,flickr30k_gcg",
    ),
    Download(
        folder="glamm_data/images",
        holds="grandf/train, grandf/val_test (SA-1B), coco2014/train2014, coco2017 (may be links), flickr30k/Flickr30K",
        origin=f"the GLaMM project, {COCO}, and Flickr30k",
        licence=f"SA-1B and Flickr30k: their own terms; {IMAGE_LICENCE}",
        size="",
        sources="grandf,refcocog_gcg,openpsg_gcg,flickr30k_gcg",
    ),
    Download(
        folder="muse",
        holds="MUSE_train.json; its images are those of coco and of COCO train2014",
        origin="the PixelLM project",
        licence=UNKNOWN_LICENCE,
        size="",
        sources="muse",
    ),
    Download(
        folder="pixel2cap",
        holds="pix2cap_coco_train.json; its masks and images are those of coco",
        origin="the Pix2Cap-COCO project",
        licence=UNKNOWN_LICENCE,
        size="",
        sources="pix2cap_seg,pix2cap_vp",
    ),
    Download(
        folder="lisa_reasoning",
        holds="train, val and test, each *.jpg with a *.json of the same name",
        origin="ReasonSeg of the LISA project",
        licence="none seen: treat as research only",
        size="239 + 200 + 779 images",
        sources="reasonseg",
    ),
    Download(
        folder="osprey-724k",
        holds="osprey_conversation.json, osprey_part_level.json, osprey_lvis_positive_negative.json, "
        "osprey_short_form.json, osprey_detail_description.json",
        origin="huggingface.co/datasets/AntGroup-MI/Osprey-724K, described in github.com/CircleRadon/Osprey",
        licence="project Apache-2.0; data: read the publisher's terms",
        size="106 + 153 + 140 + 57 + 63.4 MB",
        sources="osprey_conversation,osprey_part_level,osprey_positive_negative,osprey_short_form,osprey_detail",
    ),
    Download(
        folder="llava_data",
        holds="LLaVA-Instruct-150K/llava_v1_5_mix665k.json, llava_images with the folders that file names",
        origin="the LLaVA-1.5 project",
        licence=UNKNOWN_LICENCE,
        size="about 1 GB without the images",
        sources="llava_mix665k",
    ),
    Download(
        folder="llava_data/LLaVA-Pretrain",
        holds="blip_laion_cc_sbu_558k.json, images with the folders that file names",
        origin="the LLaVA project",
        licence=UNKNOWN_LICENCE,
        size="558,000 images",
        sources="llava_pretrain",
        aliases=("LLaVA-Pretrain",),
    ),
    Download(
        folder="region_caption",
        holds="finetune_refcocog_val_with_mask.json, mdetr_annotations/finetune_refcocog_val_captions.json",
        origin="the region captions of RefCOCOg as used by the GLaMM and Osprey projects",
        licence=UNKNOWN_LICENCE,
        size="",
        sources="",
    ),
    Download(
        folder="perbench",
        holds="STBench_Detailed_Caption.json, STBench_MCQ.json, STBench_VRES.json, "
        "object_caption_data_train_split.json, and in images the SA-1B images they name (masa_sam_500k)",
        origin="the authors of Pixel-SAIL (the released code names the Hugging Face datasets zhangtao-whu/st_train and "
        "Dense-World/Sa2VA-Training)",
        licence=UNKNOWN_LICENCE,
        size="",
        sources="sam_captions",
    ),
    Download(
        folder="refshapes",
        holds="images/train2014, refshapes, grefshapes, groupshapes, perbench, osprey, llava, panoptic, pix2cap, "
        "attribute_maps, glamm_data, muse, reason_seg, tokenizer",
        origin="this project: `python tools/make_refshapes.py --out data/refshapes`, or `make quickstart`",
        licence="that of this project",
        size="about 460 MB",
        sources="refshapes,grefshapes,groupshapes",
        aliases=("refshapes/images/train2014", "refshapes/glamm_data/annotations"),
        is_synthetic=True,
    ),
    Download(
        folder="tokenizers/qwen2_5",
        holds="the tokenizer files of a Qwen2.5 checkpoint, for the real model sizes",
        origin="the Qwen2.5 project",
        licence=UNKNOWN_LICENCE,
        size="",
        sources="",
    ),
)


def downloads_of(text: str) -> list[Download]:
    """Return the datasets whose folder a path or a message names; the most exact match of each path counts."""
    matches = [
        (len(name), entry) for entry in DOWNLOADS for name in (entry.folder, *entry.aliases) if _names(text, name)
    ]
    longest = max((length for length, _ in matches), default=0)
    return [entry for length, entry in matches if length == longest]


def advice_for(text: str) -> tuple[str, ...]:
    """Return what to download for the paths in a text, nothing for paths of no known dataset."""
    return tuple(dict.fromkeys(entry.advice() for entry in downloads_of(text)))


def _names(text: str, folder: str) -> bool:
    return re.search(rf"(?:^|[/\s]){re.escape(folder)}(?=[/:;,\s]|$)", text) is not None
