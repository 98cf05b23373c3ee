"""Records of what the data check finds.

`instances.py`, `refer_files.py` and `items.py` add to `Findings`; `report.py` formats them. Example:

    Finding(kind=Kind.MISSING_IMAGE, subject="images/train2014/COCO_train2014_000000000009.jpg",
            message="found no such file, expected the image of 3 refs; unpack the images again", is_trouble=True)
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median

from pixel_sail.texts import limited


class FindingKind(StrEnum):
    """Kinds of defects, in the order of the report."""

    MISSING_FILE = "missing file"
    UNREADABLE_FILE = "unreadable file"
    FILE_SIZE = "file size"
    MISSING_IMAGE = "missing image"
    UNREADABLE_IMAGE = "unreadable image"
    IMAGE_SIZE = "image size"
    IMAGE_RECORD = "image record"
    DUPLICATE_IMAGE_ID = "duplicate image id"
    ANNOTATION_RECORD = "annotation record"
    DUPLICATE_ANNOTATION_ID = "duplicate annotation id"
    MASK_SIZE = "mask size"
    BAD_MASK = "undecodable mask"
    FRACTIONS = "coordinates within 0..1"
    SHORT_POLYGON = "short polygon"
    AREA = "stated area"
    OUTSIDE_IMAGE = "polygon outside image"
    EMPTY_MASK = "empty mask"
    REF_RECORD = "ref record"
    DUPLICATE_REF_ID = "duplicate ref_id"
    DUPLICATE_SENTENCE = "duplicate sentence"
    NO_SENTENCE = "sentence missing"
    EMPTY_TEXT = "empty text"
    UNKNOWN_ID = "unknown id"
    COUNT = "known count"
    CONTAMINATION = "contamination"
    SOURCE = "source"
    ITEM = "item"
    LOADER = "loader warns"
    REMARK = "remark"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A defect (trouble) or an observation (note)."""

    kind: FindingKind
    subject: str
    """File, record or item."""
    message: str
    """What was found, what was expected, what to do."""
    is_trouble: bool = True


class Findings:
    """Collects findings of a dataset; repeated findings are stored once."""

    def __init__(self) -> None:
        self._found: dict[Finding, None] = {}

    def trouble(self, kind: FindingKind, subject: object, message: str) -> None:
        """Add a defect that must be fixed."""
        self._add(kind, subject, message, is_trouble=True)

    def note(self, kind: FindingKind, subject: object, message: str) -> None:
        """Add an observation."""
        self._add(kind, subject, message, is_trouble=False)

    def _add(self, kind: FindingKind, subject: object, message: str, *, is_trouble: bool) -> None:
        subject, message = limited(str(subject)), limited(message)
        self._found[Finding(kind=kind, subject=subject, message=message, is_trouble=is_trouble)] = None

    def all(self) -> tuple[Finding, ...]:
        """Return all findings: troubles first, by kind, in the order of discovery."""
        order = list(FindingKind)
        return tuple(sorted(self._found, key=lambda finding: (not finding.is_trouble, order.index(finding.kind))))

    def subjects(self, kind: FindingKind) -> set[str]:
        """Return the subjects of all findings of one kind."""
        return {finding.subject for finding in self._found if finding.kind is kind}


@dataclass(frozen=True, kw_only=True)
class FileFact:
    """One checked file."""

    path: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class SoundFraction:
    """Number of sound items among the checked ones."""

    checked: int = 0
    sound: int = 0

    def __add__(self, other: "SoundFraction") -> "SoundFraction":
        """Return the sum of both."""
        return SoundFraction(checked=self.checked + other.checked, sound=self.sound + other.sound)

    def __str__(self) -> str:
        """Return for example 199/200."""
        return f"{self.sound}/{self.checked}" if self.checked else "-"


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Lengths of texts in characters."""

    shortest: int
    median: int
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "Lengths | None":
        """Return the summary of these lengths, None without any."""
        if not lengths:
            return None
        return cls(shortest=min(lengths), median=round(median(lengths)), longest=max(lengths))

    def __str__(self) -> str:
        """Return for example 3/27/112."""
        return f"{self.shortest}/{self.median}/{self.longest}"


@dataclass(frozen=True, kw_only=True)
class SplitCount:
    """Size of one split of a REFER file, next to the published one."""

    file: str
    split: str
    images: int
    refs: int
    """With at least one sentence."""
    sentences: int
    refs_without_target: int
    refs_with_several: int
    """Refs with more than one annotation."""
    known_images: int | None = None
    known_refs: int | None = None
    known_sentences: int | None = None
    origin: str = ""
    """Origin of the published numbers."""


@dataclass(frozen=True, kw_only=True)
class SourceReport:
    """All results of the check for one source."""

    name: str
    reads: str
    """The function that reads it, and its arguments."""
    items: int | None
    files: tuple[FileFact, ...]
    splits: tuple[SplitCount, ...]
    images: SoundFraction
    masks: SoundFraction
    empty_masks: int
    """Masks without pixels among the checked ones, except those of no-target answers."""
    texts: Lengths | None
    milliseconds: float | None
    """Mean time to sample one item and open its image."""
    findings: tuple[Finding, ...]
    to_download: tuple[str, ...] = ()
    """What to download, from where and into which folder."""

    @property
    def num_troubles(self) -> int:
        """Return the number of defects."""
        return sum(finding.is_trouble for finding in self.findings)

    @property
    def num_notes(self) -> int:
        """Return the number of observations."""
        return len(self.findings) - self.num_troubles

    def kinds(self) -> Counter[FindingKind]:
        """Return the number of troubles by kind."""
        return Counter(finding.kind for finding in self.findings if finding.is_trouble)
