"""Everything that the docs name exists: links, anchors, tests, scripts, config groups and keys."""

import ast
import inspect
import re
import shlex
from pathlib import Path

import pytest
import yaml
from running import ROOT

from pixel_sail.config import ConfigError, DemoConfig, EvalConfig, PredictCommandConfig, TrainConfig, load_config

SKIPPED = {".venv", ".venv-docs", "site", "runs", "build", ".pytest_cache", "wandb"}
PAGES = [
    path
    for path in sorted(ROOT.rglob("*.md"))
    if not SKIPPED & set(path.relative_to(ROOT).parts) and path.relative_to(ROOT).parts[0] != "data"
] + [ROOT / "data" / "README.md"]
FENCE = re.compile(r"^ *(```+)([^\n]*)\n(.*?)^ *\1 *$", re.MULTILINE | re.DOTALL)
SCHEMAS = {
    "scripts/train.py": ("train", TrainConfig),
    "scripts/evaluate.py": ("evaluate", EvalConfig),
    "scripts/predict.py": ("predict", PredictCommandConfig),
    "scripts/demo.py": ("demo", DemoConfig),
    "tools/plan_run.py": ("train", TrainConfig),
    "tools/doctor.py": ("train", TrainConfig),
    "tools/show_batch.py": ("train", TrainConfig),
    "tools/cache_teacher_features.py": ("train", TrainConfig),
}
OWN_KEYS = {"gpu", "gpus", "mfu", "sequences"}
"""Keys of plan_run that are not keys of a run."""
PLACEHOLDERS = {"experiment": "quickstart", "image": "x.png", "checkpoint": "x"}


def name(page):
    return str(page.relative_to(ROOT))


def prose(page):
    """Return the text of a page without its code."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text()))


def anchors(page):
    """Return the anchors of a page's headings, as GitHub and MkDocs generate them."""
    found = set()
    for title in re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE):
        words = re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", title).lower())
        found.add(re.sub(r" +", "-", words.strip()))
    return found


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_relative_link_leads_to_a_file_and_its_anchor(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{name(page)} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{name(page)} links to {target}; there are {sorted(anchors(file))}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_test_file_a_page_names_exists(page):
    for file, test in re.findall(r"\b(test_\w+\.py)(::\w+)?", page.read_text()):
        assert (ROOT / "tests" / file).is_file(), f"{name(page)} names tests/{file}"
        assert not test, f"{name(page)} names {file}{test}: pages name test files only"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_file_of_the_project_a_page_names_exists(page):
    folders = "scripts|tools|configs|docs|requirements|tests|pixel_sail"
    pattern = rf"(?<![\w/.])((?:{folders})/[\w./+-]*\.(?:py|sh|sbatch|yaml|txt|md|json))\b"
    for path in re.findall(pattern, page.read_text()):
        assert (ROOT / path).is_file(), f"{name(page)} names {path}"


def commands(page):
    """Return (script, arguments) of every command line of the project that a page shows."""
    text = page.read_text()
    blocks = [body for _, language, body in FENCE.findall(text) if language in ("", "bash", "sh", "console")]
    lines = [line for body in blocks for line in body.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    found = []
    for line in lines:
        try:
            words = shlex.split(line.removeprefix("$ "), comments=True)
        except ValueError:
            continue
        places = [place for place, word in enumerate(words) if word in SCHEMAS]
        if places:
            found.append((words[places[0]], words[places[0] + 1 :], line.strip()))
    return found


def overrides(script, words):
    """Return the overrides of a command line, with a placeholder if the page leaves a value open."""
    kept = []
    is_sweep = "-m" in words
    if "--evaluate" in words:
        words = [word for place, word in enumerate(words) if place == 0 or words[place - 1] != "--evaluate"]
    for word in words:
        if is_sweep and not re.search(r"=[\[{]", word):
            word = word.partition(",")[0]
        key, equals, value = word.partition("=")
        if key.startswith("-") or not equals or (script == "tools/plan_run.py" and key in OWN_KEYS):
            continue
        if "searchpath" in key or "$" in word or re.fullmatch(r"[A-Z_]+", value):
            word = f"{key}={PLACEHOLDERS[key]}" if key in PLACEHOLDERS else ""
        if word:
            kept.append(word)
    return kept


ALL_COMMANDS = [(page, *command) for page in PAGES for command in commands(page)]


def test_the_pages_show_commands():
    assert len(ALL_COMMANDS) > 40
    assert {script for _, script, _, _ in ALL_COMMANDS} == set(SCHEMAS)


def is_named(words):
    """Whether the line is a whole command, not one cut short by three dots, nor one whose source the reader brings."""
    return "..." not in words and not any(word.startswith("+source@") for word in words)


@pytest.mark.parametrize("page", sorted({page for page, _, words, _ in ALL_COMMANDS if is_named(words)}), ids=name)
def test_every_command_a_page_shows_composes(page):
    for script, words, line in commands(page):
        if not is_named(words):
            continue
        config, schema = SCHEMAS[script]
        given = overrides(script, words)
        keys = {word.partition("=")[0] for word in given}
        if config == "train" and not {"name", "experiment"} & keys:
            given.append("name=x")
        if config != "train" and "checkpoint" not in keys:
            given.append("checkpoint=x")
        if config == "predict":
            given += [f"{key}=x" for key in ("image", "question") if key not in keys]
        try:
            load_config(config, schema, given)
        except ConfigError as error:
            raise AssertionError(f"{name(page)}: {line}\n{error}") from error


def test_every_script_a_command_starts_exists():
    for page in PAGES:
        for path in re.findall(
            r"(?:python3?|bash|sbatch)\s+((?:\S+\s+)??(?:scripts|tools|docs/examples)/\S+\.\w+)", page.read_text()
        ):
            assert (ROOT / path.split()[-1].strip("`,;")).is_file(), f"{name(page)}: {path}"


def test_every_single_setting_in_a_page_composes():
    """Settings in inline code, `key=value`, of the question-and-answer pages."""
    for page in (ROOT / "docs" / "faq.md", ROOT / "docs" / "troubleshooting.md"):
        for setting in re.findall(r"`([\w.@]+=[\w.\[\],]+)`", page.read_text()):
            needs_data = ["data=refcoco"] if "decontamination" in setting else []
            if source := re.match(r"data\.sources\.(\w+)", setting):
                needs_data = [f"+source@data.sources={source[1]}"]
            attempts = []
            for config, schema, base in (
                ("train", TrainConfig, ["name=x", *needs_data]),
                ("evaluate", EvalConfig, ["checkpoint=x"]),
            ):
                try:
                    load_config(config, schema, [*base, setting])
                    break
                except ConfigError as error:
                    attempts.append(str(error))
            else:
                raise AssertionError(f"{name(page)}: {setting}\n" + "\n".join(attempts))


def test_every_page_is_in_the_contents_of_the_site():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = set(re.findall(r"[\w/]+\.md", str(site["nav"])))
    there = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert listed == there


def test_every_module_of_the_api_pages_exists():
    for page in (ROOT / "docs" / "api").glob("*.md"):
        named = re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
        assert named
        for module in named:
            *parts, last = module.split(".")
            file = ROOT.joinpath(*parts, f"{last}.py")
            owner = ROOT.joinpath(*parts).with_suffix(".py")
            assert file.is_file() or f"class {last}" in owner.read_text(), module


def test_snippets_name_files_that_exist():
    for page in PAGES:
        for path in re.findall(r'^--8<-- "([^":]+)', page.read_text(), re.MULTILINE):
            assert Path(ROOT / path).is_file(), f"{name(page)}: {path}"


def test_every_example_is_shown_on_a_page():
    shown = set(re.findall(r'^--8<-- "docs/examples/(\w+)\.py"', "".join(p.read_text() for p in PAGES), re.MULTILINE))
    assert shown == {path.stem for path in (ROOT / "docs" / "examples").glob("*.py")} - {"tiny"}


def test_a_wrong_link_anchor_test_file_or_setting_is_found(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    monkeypatch.setattr("test_docs.name", lambda path: path.name)
    for text, check in (
        ("[x](absent.md)", test_every_relative_link_leads_to_a_file_and_its_anchor),
        ("# Here\n[x](#there)", test_every_relative_link_leads_to_a_file_and_its_anchor),
        ("`test_absent.py`", test_every_test_file_a_page_names_exists),
        ("`test_docs.py::test_every_page_is_in_the_contents_of_the_site`", test_every_test_file_a_page_names_exists),
        ("see tools/absent.py", test_every_file_of_the_project_a_page_names_exists),
        ("```\npython scripts/train.py optim.absent=1\n```", test_every_command_a_page_shows_composes),
    ):
        page.write_text(text + "\n")
        with pytest.raises(AssertionError, match=r"page\.md"):
            check(page)


API_PAGES = sorted((ROOT / "docs" / "api").glob("*.md"))
MODULES = [
    name for page in API_PAGES for name in re.findall(r"^::: pixel_sail\.([\w.]+)", page.read_text(), re.MULTILINE)
]


@pytest.mark.parametrize("module", MODULES)
def test_tags_in_docstrings_of_the_site_are_written_as_code(module):
    # Elsewhere, Markdown reads <Prompt0> as HTML and drops it.
    path = ROOT / "pixel_sail" / f"{module.replace('.', '/')}.py"
    path = path if path.is_file() else path.parent.with_suffix(".py")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            text = inspect.cleandoc(node.value.value)
            # Examples are indented blocks, which Markdown keeps verbatim.
            prose = "\n".join(line for line in text.split("\n") if not line.startswith("    "))
            found = re.search(r"</?[A-Za-z|][^ ]*>", re.sub(r"`[^`]*`", "", prose))
            assert not found, f"{path}:{node.lineno}: put {found[0]} into backticks"
