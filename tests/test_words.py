"""The project uses the field's words, one name has one meaning, and what was renamed does not come back.

`retired_words.toml` lists words and phrases with what replaces them. `python tests/test_words.py` prints how often each
is used, `python tests/test_words.py stream rollback` also where those with such a replacement are used:

    pixel_sail/data/loader.py:41: found "lanes", expected "stream" (lingua, torchtitan)
"""

import ast
import io
import re
import sys
import tokenize
import tomllib
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from itertools import accumulate
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIST = tomllib.loads((ROOT / "tests" / "retired_words.toml").read_text())
SEARCHED = ("*.py", "*.md", "*.yaml", "*.yml", "*.toml", "*.sh", "*.sbatch", "*.html", "*.js", "*.css")
FOLDERS = ("pixel_sail", "configs", "scripts", "tools", "tests", "docs", ".github", "requirements")

_TEXTS = {tokenize.STRING, tokenize.COMMENT} | {
    code for name, code in vars(tokenize).items() if name.startswith("FSTRING_") and isinstance(code, int)
}
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_LITERAL = re.compile(r"```.*?```|`[^`]+`", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Term:
    """A retired word, for example `\\blanes?\\b` that became "stream"."""

    pattern: str
    """Regular expression. It is searched in lower-case text in which `merge_lanes` and `mergeLanes` are "merge lanes"
    and lines are joined by a space. With `where = "names"`: must match a whole identifier as it is written."""
    use: str
    why: str
    where: str = "all"
    """all; code: Python without strings and comments, keys and values of YAML, names of files; prose: the rest; names:
    identifiers of Python."""
    only: Sequence[str] = ("*",)
    """Files it is looked for in."""
    allowed: Sequence[str] = ()
    """Files in which it may be used."""
    left: int = 0
    """Uses that are still to be replaced. More than these fail; lower it with every one that goes."""


@dataclass(frozen=True)
class Source:
    """A file by what its text is for; in each text, everything else is blank, so that lines keep their numbers."""

    path: str
    code: str
    prose: str
    names: tuple[tuple[int, str], ...]
    """(line, identifier) of Python."""


TERMS = tuple(Term(**row) for row in LIST["term"])


@cache
def sources() -> tuple[Source, ...]:
    paths = [path for path in ROOT.iterdir() if path.is_file()]
    paths += [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    names = sorted(str(path.relative_to(ROOT)) for path in paths if path.is_file())
    return tuple(read(name) for name in names if listed(name, SEARCHED) and not listed(name, LIST["allowed"]))


def listed(path: str, globs: Sequence[str]) -> bool:
    return any(fnmatch(path, glob) for glob in globs)


def read(path: str) -> Source:
    return parse(path, (ROOT / path).read_text())


def parse(path: str, text: str) -> Source:
    if path in LIST["records"]:
        text = _LITERAL.sub(lambda found: blank(found[0]), text)
    if path.endswith(".py"):
        return parse_python(path, text)
    if path.endswith((".yaml", ".yml")):
        lines = [re.match(r"((?:[^#]|(?<=\S)#)*)(.*)", line).groups() for line in text.splitlines()]  # type: ignore[union-attr]
        return Source(path, "\n".join(a for a, _ in lines), "\n".join(blank(a) + b for a, b in lines), ())
    return Source(path, "", text, ())


def parse_python(path: str, text: str) -> Source:
    rows = [list(line) for line in text.splitlines()]
    prose = [[" "] * len(row) for row in rows]
    names = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NAME:
            names.append((token.start[0], token.string))
        if token.type in _TEXTS:
            for number in range(token.start[0], token.end[0] + 1):
                row = rows[number - 1]
                start = token.start[1] if number == token.start[0] else 0
                end = token.end[1] if number == token.end[0] else len(row)
                prose[number - 1][start:end], row[start:end] = row[start:end], [" "] * (end - start)
    code, said = ("\n".join("".join(row) for row in part) for part in (rows, prose))
    return Source(path, code, said, tuple(names))


def blank(text: str) -> str:
    return re.sub(r"[^\n]", " ", text)


@cache
def words(text: str) -> tuple[str, list[int]]:
    """Return the text as one line of lower-case words, and where in it each line of the text begins."""
    spaced = _CAMEL.sub(" ", text).replace("_", " ").lower()
    lines = [" ".join(line.lstrip(" #").split()) + " " for line in spaced.split("\n")]
    return "".join(lines), list(accumulate(map(len, lines), initial=0))


def uses(term: Term, files: Sequence[Source] | None = None) -> Iterator[tuple[str, int, str]]:
    """Yield (file, line, what was found), in the project unless other files are given; line 0 is the file's name."""
    pattern = re.compile(term.pattern)
    for source in sources() if files is None else files:
        if not listed(source.path, term.only) or listed(source.path, term.allowed):
            continue
        if term.where == "names":
            yield from ((source.path, line, name) for line, name in source.names if pattern.fullmatch(name))
            continue
        if term.where != "prose" and (found := pattern.search(words(source.path)[0])):
            yield source.path, 0, found[0]
        for kind, text in (("code", source.code), ("prose", source.prose)):
            if term.where in ("all", kind):
                line, starts = words(text)
                yield from (
                    (source.path, bisect_right(starts, found.start()), found[0]) for found in pattern.finditer(line)
                )


@cache
def definitions() -> dict[str, list[str]]:
    """Return where public classes and names of modules are defined: {"Batch": ["pixel_sail/types.py:302"]}."""
    found = defaultdict(list)
    for source in sources():
        if not source.path.endswith(".py") or not source.path.startswith(("pixel_sail/", "scripts/", "tools/")):
            continue
        for node in ast.parse((ROOT / source.path).read_text()).body:
            if isinstance(node, ast.ClassDef):
                names = [node.name]
            elif isinstance(node, ast.Assign):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names = [node.target.id]
            else:
                continue
            for name in names:
                if not name.startswith("_"):
                    found[name].append(f"{source.path}:{node.lineno}")
    return found


@pytest.mark.parametrize("term", TERMS, ids=lambda term: f"{term.use}-{term.pattern[:30]}")
def test_a_retired_word_is_not_used(term):
    found = list(uses(term))
    assert len(found) <= term.left, "\n" + "\n".join(
        f'{path}:{line}: found "{what}", expected "{term.use}" ({term.why})' for path, line, what in found
    )


PYTHON = '''"""Lanes go
on."""
def merge_lanes(x):  # see Lane
    return "a lane", LaneState(x)
'''


@pytest.mark.parametrize(
    ("path", "text", "pattern", "where", "lines"),
    [
        ("a.py", PYTHON, r"\blanes?\b", "all", [1, 3, 3, 4, 4]),
        ("a.py", PYTHON, r"\blanes?\b", "code", [3, 4]),
        ("a.py", PYTHON, r"\bgo on\b", "prose", [1]),
        ("a.py", PYTHON, "merge_.*|LaneState", "names", [3, 4]),
        ("lane.md", "A lane_round.", r"\blane\b", "all", [0, 1]),
        ("a.yaml", "x: 1  # a lane\nlane_rounds: 2\n", r"\blane\b", "code", [2]),
        ("a.yaml", "x: 1  # a lane\nlane_rounds: 2\n", r"\blane\b", "prose", [1]),
    ],
)
def test_words_are_found_in_names_texts_and_over_the_end_of_a_line(path, text, pattern, where, lines):
    term = Term(pattern=pattern, use="", why="", where=where)
    assert sorted(line for _, line, _ in uses(term, [parse(path, text)])) == lines


def test_one_name_has_one_meaning():
    repeated = {name: where for name, where in definitions().items() if len(where) > 1 and name not in LIST["repeated"]}
    assert not repeated, "\n" + "\n".join(
        f"{', '.join(where)}: found {name} defined {len(where)} times, expected a name of its own for each"
        for name, where in sorted(repeated.items())
    )


def test_names_that_may_repeat_do():
    assert [name for name in LIST["repeated"] if len(definitions().get(name, [])) < 2] == []


if __name__ == "__main__":
    for chosen in TERMS:
        shown = list(uses(chosen))
        print(f"{len(shown):5d}  {chosen.use:32.32}  {chosen.where:5}  {chosen.pattern}")
        if any(word in chosen.use for word in sys.argv[1:]):
            for path, line, what in shown:
                print(f"       {path}:{line}: {what}")
