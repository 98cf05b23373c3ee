"""Replaces the names of regions in annotation texts by placeholders.

`data/sources/osprey.py` converts the texts of its records to texts with {region0}, {region1}, ..., for which
`data/regions.py` substitutes prompt tokens.

Example: with 12 regions, "Is <region1> left of Region10?" -> "Is {region0} left of {region9}?".

Files count from 1 and mostly write <region1>, sometimes <Region1>, <regon1>, <regin1>, and sometimes omit one or both
brackets. A name is replaced as a whole; the release replaces piece by piece and turns <region10> into "<<Prompt3>0>".
"""

import re
from collections.abc import Mapping

from pixel_sail.texts import shown
from pixel_sail.types import DataError

_WORD = "(?:region|regon|regin)"
_NUMBER = "([0-9]{1,9})"
_NAME = re.compile(
    rf"<\s*{_WORD}\s*{_NUMBER}?\s*>|(?<![A-Za-z0-9_<])<?{_WORD}{_NUMBER}(?![A-Za-z0-9_])>?", flags=re.IGNORECASE
)
_LABEL = re.compile(rf"\s*<?\s*{_WORD}\s*{_NUMBER}\s*>?\s*:\s*", flags=re.IGNORECASE)
_PLACEHOLDER = re.compile(r"\{region(\d+)\}")


def name_regions(text: str, num_regions: int, where: str) -> str:
    """Return the text with {region0}, {region1}, ... for its region names; <region> is the only region.

    Raises: DataError for a number without a region.
    """

    def placeholder(match: re.Match[str]) -> str:
        digits = match[1] or match[2]
        number = int(digits) if digits else 1
        if not 1 <= number <= num_regions or (not digits and num_regions > 1):
            raise DataError(
                f"{where}: found {shown(match[0])} in a text, expected one of {num_regions} regions; repair it"
            )
        return f"{{region{number - 1}}}"

    return _NAME.sub(placeholder, text)


def split_label(text: str) -> tuple[int | None, str]:
    """Return the region at the start of a text, counted from 0, and the rest: "<region2>: a dog" -> (1, "a dog")."""
    match = _LABEL.match(text)
    return (None, text.strip()) if match is None else (int(match[1]) - 1, text[match.end() :].strip())


def named_regions(*texts: str) -> set[int]:
    """Return the regions that the placeholders of these texts refer to."""
    return {int(number) for text in texts for number in _PLACEHOLDER.findall(text)}


def renumber(text: str, new_numbers: Mapping[int, int]) -> str:
    """Return the text with its placeholders renumbered."""
    return _PLACEHOLDER.sub(lambda match: f"{{region{new_numbers[int(match[1])]}}}", text)
