"""The data check: all sources and evals of a plan, with one report each.

`tools/check_data.py` -> `check_plan.py` -> here -> `data_report.py`. The annotation files of REFER folders are read
first, each once, because other sources are compared with their evaluation splits. Example: a plan with the sources
refcoco and coco_panoptic gives two reports, and the second states how many of its images are in refcoco(unc) val.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from pixel_sail.config import build
from pixel_sail.data.checking.contamination import coco_key, contamination_key, note_contamination
from pixel_sail.data.checking.downloads import advice_for
from pixel_sail.data.checking.files import (
    ABSENT_IMAGE,
    ABSENT_IMAGES,
    annotation_files,
    check_image,
    check_source_paths,
    file_fact,
)
from pixel_sail.data.checking.findings import FileFact, FindingKind, Findings, Lengths, SoundFraction, SourceReport
from pixel_sail.data.checking.items import ItemCheck, check_items, chosen_items, note_remarks
from pixel_sail.data.checking.known import is_known, refer_name
from pixel_sail.data.checking.refer_files import ReferCheck, ReferFolder, check_refer, refs_files
from pixel_sail.data.checking.refs import check_refs
from pixel_sail.data.remarks import collect_remarks
from pixel_sail.evaluation.check_plan import CheckPlan, CheckSettings, Node
from pixel_sail.evaluation.refer_seg import as_task
from pixel_sail.evaluation.task import Task
from pixel_sail.types import Sample, Source

Built = TypeVar("Built")

TRAINING_SPLIT = "train"
Evaluated = dict[tuple[str, str], frozenset[str]]
"""Image keys of every known evaluation split, by (dataset, split)."""


@dataclass(kw_only=True)
class CheckResult:
    """Reports, and samples to render, by source."""

    reports: list[SourceReport] = field(default_factory=list)
    samples: dict[str, list[Sample]] = field(default_factory=dict)


def run_check(plan: CheckPlan, settings: CheckSettings) -> CheckResult:
    """Check every source of the plan."""
    folders = {name: folder for name, node in plan.sources.items() if (folder := refer_folder(node)) is not None}
    found: dict[ReferFolder, tuple[ReferCheck, Findings]] = {}
    for folder in dict.fromkeys(folders.values()):
        findings = Findings()
        with collect_remarks() as heard:
            check = check_refer(folder, findings, sample=settings.sample, progress=settings.progress)
        note_remarks(heard, findings)
        found[folder] = (check, findings)
    evaluated = evaluation_images(plan, {folder: check for folder, (check, _) in found.items()})
    result = CheckResult()
    for name, node in tqdm(_split_up(plan, folders, found), desc="sources", disable=not settings.progress):
        folder = refer_folder(node)
        # The files of a folder are reported once, for the first source that reads them.
        files = found.pop(folder, None) if folder is not None else None
        is_trained_on = plan.are_trained_on or node.get("split", TRAINING_SPLIT) == TRAINING_SPLIT
        report, samples = _check_source(name, node, files, evaluated if is_trained_on else {}, settings)
        result.reports.append(report)
        result.samples[name] = samples
    for name, node in plan.checked_evals.items():
        result.reports.append(_check_eval(name, node, settings))
    return result


def refer_folder(node: Node) -> ReferFolder | None:
    """Return the REFER folder that a source or eval reads, None for another format."""
    if not isinstance(node, dict) or not {"root", "dataset"} <= set(node):
        return None
    root, image_dir = Path(node["root"]), node.get("image_dir")
    names = [node["dataset"]] if isinstance(node["dataset"], str) else list(node["dataset"])
    return ReferFolder(
        root=root,
        dataset=next((name for name in names if (root / name).is_dir()), names[0]),
        split_by=node.get("split_by"),
        image_dir=None if image_dir is None else Path(image_dir),
    )


def evaluation_images(plan: CheckPlan, checked: dict[ReferFolder, ReferCheck]) -> Evaluated:
    """Return the images of all evaluation splits of the checked folders, the evals and data/ref_seg."""
    evaluated: dict[tuple[str, str], set[str]] = defaultdict(set)
    for check in checked.values():
        for key, images in check.images_by_split.items():
            evaluated[key] |= {contamination_key(image) for image in images}
    others = [refer_folder(node) for node in plan.evals.values()]
    ref_seg = plan.data_folder / "ref_seg"
    if ref_seg.is_dir():
        others += [ReferFolder(root=ref_seg, dataset=path.name) for path in sorted(ref_seg.iterdir()) if path.is_dir()]
    for folder in dict.fromkeys(folder for folder in others if folder is not None and folder not in checked):
        for split_by, path in refs_files(folder):
            if is_known(folder.dataset, split_by):
                # Only splits matter here. Errors in the file are reported when one of its sources is checked.
                for row in check_refs(path, Findings()):
                    evaluated[refer_name(folder.dataset, split_by), row.split].add(coco_key(row.image_id))
    return {key: frozenset(images) for key, images in evaluated.items() if key[1] != TRAINING_SPLIT}


def _split_up(
    plan: CheckPlan, folders: dict[str, ReferFolder], found: dict[ReferFolder, tuple[ReferCheck, Findings]]
) -> list[tuple[str, Node]]:
    """Return the sources. A REFER folder without a split becomes one source per split."""
    result: list[tuple[str, Node]] = []
    for name, node in plan.sources.items():
        splits = {count.split for count in found[folders[name]][0].splits} if name in folders else set()
        if "split" in node or len(splits) == 0:
            result.append((name, node))
        else:
            result += [(f"{name}/{split}", {**node, "split": split}) for split in sorted(splits)]
    return result


def _check_source(
    name: str,
    node: Node,
    files: tuple[ReferCheck, Findings] | None,
    evaluated: Evaluated,
    settings: CheckSettings,
) -> tuple[SourceReport, list[Sample]]:
    findings = Findings() if files is None else files[1]
    source: Source | None = _build(name, node, findings, lambda: build(node, name))
    items = None
    if source is not None:
        items = check_items(
            source, findings, sample=settings.sample, num_shown=settings.sheet, progress=settings.progress
        )
        own = _own_dataset(node)
        note_contamination(
            items.image_keys, {key: keys for key, keys in evaluated.items() if key[0] != own}, name, findings
        )
    items = ItemCheck() if items is None else items
    check = None if files is None else files[0]
    facts = check.files if check is not None else _facts(source, node, findings)
    report = SourceReport(
        name=name,
        reads=_reads(node),
        items=None if source is None else len(source),
        files=facts,
        splits=() if check is None else check.splits,
        images=items.images if check is None else check.images,
        masks=items.masks if check is None else check.masks,
        empty_masks=items.empty_masks if check is None else check.empty_masks,
        texts=items.texts if check is None else check.texts,
        milliseconds=items.milliseconds,
        findings=findings.all(),
        to_download=_advice(findings),
    )
    return report, items.shown


def _check_eval(name: str, node: Node, settings: CheckSettings) -> SourceReport:
    """Check an eval: whether it can be read, the warnings of its reader, and its images."""
    findings = Findings()
    task: Task[Any, Any] | None = _build(name, node, findings, lambda: as_task(build(node, name), name))
    requests = [] if task is None else task.requests("standard")
    source_images = list({request.source_image.path: request.source_image for request in requests}.values())
    opened = set(chosen_items(len(source_images), settings.sample, seed=0))
    images = SoundFraction()
    for number, source_image in enumerate(
        tqdm(source_images, desc=f"{name}: images", disable=not settings.progress, leave=False)
    ):
        if not source_image.path.parent.is_dir():
            findings.trouble(FindingKind.MISSING_FILE, source_image.path.parent, ABSENT_IMAGES)
        elif number in opened:
            is_sound = check_image(
                source_image.path, None if source_image.is_upright else source_image.size_hw, findings
            )
            images += SoundFraction(checked=1, sound=int(is_sound))
        elif not source_image.path.is_file():
            findings.trouble(FindingKind.MISSING_IMAGE, source_image.path, ABSENT_IMAGE)
    return SourceReport(
        name=name,
        reads=_reads(node),
        items=None if task is None else len(task.items),
        files=_facts(task, node, findings),
        splits=(),
        images=images,
        masks=SoundFraction(),
        empty_masks=0,
        texts=Lengths.of([len(request.text) for request in requests]),
        milliseconds=None,
        findings=findings.all(),
        to_download=_advice(findings),
    )


def _reads(node: Node) -> str:
    """Return a function and its arguments as text."""
    return f"{node['_target_']}({', '.join(f'{k}={v}' for k, v in node.items() if k != '_target_')})"


def _own_dataset(node: Node) -> str | None:
    """Return the dataset whose training split a source is. The overlap of splits is reported with its files."""
    folder = refer_folder(node)
    if folder is None or node.get("split", TRAINING_SPLIT) != TRAINING_SPLIT:
        return None
    names = [refer_name(folder.dataset, split_by) for split_by, _ in refs_files(folder)]
    return names[0] if len(names) == 1 else None


def _build(name: str, node: Node, findings: Findings, make: Callable[[], Built]) -> Built | None:
    """Build the source or eval as a run does. On failure add trouble and return None. Warnings become notes."""
    if refer_folder(node) is None:
        is_complete = check_source_paths(node, findings)
    else:
        # Only annotation files have a suffix. These sources can be built without the image folder.
        is_complete = not any(Path(subject).suffix for subject in findings.subjects(FindingKind.MISSING_FILE))
    if not is_complete:
        return None
    with _warnings() as warned, collect_remarks() as heard:
        try:
            built: Built | None = make()
        except ValueError as error:
            # DataError and ConfigError are ValueErrors, as are the errors of sources for wrong settings.
            findings.trouble(FindingKind.SOURCE, name, f"cannot be built: {error}")
            built = None
    for message in warned:
        findings.note(FindingKind.LOADER, name, message)
    note_remarks(heard, findings)
    return built


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collect the package's warnings instead of logging them."""
    messages: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    package, collector = logging.getLogger("pixel_sail"), Collector(level=logging.WARNING)
    package.addHandler(collector)
    package.propagate, before = False, package.propagate
    try:
        yield messages
    finally:
        package.propagate = before
        package.removeHandler(collector)


def _facts(built: Any, node: Node, findings: Findings) -> tuple[FileFact, ...]:
    """Return the annotation files of a source or eval: those in its attributes and in its arguments."""
    if refer_folder(node) is not None:
        return ()
    named = [Path(value) for key, value in node.items() if key != "_target_" and isinstance(value, str)]
    paths = dict.fromkeys([path for path in named if path.is_file()] + annotation_files(built))
    return tuple(fact for path in paths if (fact := file_fact(path, findings)) is not None)


def _advice(findings: Findings) -> tuple[str, ...]:
    """Return the downloads of everything that is missing or unreadable."""
    kinds = (FindingKind.MISSING_FILE, FindingKind.UNREADABLE_FILE, FindingKind.SOURCE)
    texts = [f"{finding.subject} {finding.message}" for finding in findings.all() if finding.kind in kinds]
    return tuple(dict.fromkeys(advice for text in texts for advice in advice_for(text)))
