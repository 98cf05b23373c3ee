"""Changelog, lock file, licences, hooks and templates agree with the rest of the project."""

import re

import pytest
import yaml
from running import ROOT, load_tool

import pixel_sail

REQUIREMENTS = ROOT / "requirements"


def pins(name):
    found = re.findall(r"^([\w.-]+)==([^\s;]+)", (REQUIREMENTS / f"{name}.txt").read_text(), re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", package).lower(): version for package, version in found}


def test_the_lock_file_pins_exactly_the_packages_of_its_source_with_hashes():
    assert pins("lock-cpu") == pins("cpu")
    blocks = re.split(r"^(?=[\w.-]+==)", (REQUIREMENTS / "lock-cpu.txt").read_text(), flags=re.MULTILINE)[1:]
    for block in blocks:
        first, *hashes = [line.strip() for line in block.strip().replace("\\", "").splitlines()]
        assert hashes, first
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", line) for line in hashes), first


def test_the_site_takes_versions_the_project_pins_too():
    shared = pins("docs").keys() & (pins("cpu") | pins("dev")).keys()
    assert "jinja2" in shared
    assert {name: pins("docs")[name] for name in shared} == {name: (pins("cpu") | pins("dev"))[name] for name in shared}


def test_every_pinned_package_has_a_licence_on_the_page():
    tool = load_tool("list_licences")
    packages, known = tool.pinned(), tool.rows_of(tool.LICENCES_PAGE)
    assert {p.file for p in packages} == set(tool.FILES)
    assert len(packages) == len(known) > 100
    assert not [p.name for p in packages if f"{tool.normal(p.name)}=={p.version}" not in known]


def test_the_check_of_licences_names_what_is_missing(monkeypatch, tmp_path, capsys):
    tool = load_tool("list_licences")
    page = tmp_path / "licences.md"
    page.write_text(
        "".join(line for line in tool.LICENCES_PAGE.read_text().splitlines(True) if not line.startswith("| torch "))
    )
    monkeypatch.setattr(tool, "LICENCES_PAGE", page)
    assert tool.main(["--check"]) == 1
    assert "['torch']" in capsys.readouterr().err


def test_rows_of_packages_that_are_not_installed_are_kept():
    tool = load_tool("list_licences")
    absent = tool.Package(name="no-such-package", version="1.0", file="cuda")
    assert "| no-such-package | 1.0 | MIT | cuda |" in tool.table([absent], {"no-such-package==1.0": "MIT"})
    assert f"| 1.0 | {tool.NOT_READ} |" in tool.table([absent], {"no-such-package==2.0": "MIT"})


def test_the_changelog_has_the_version_of_the_package():
    versions = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == "Unreleased" and versions[1] == pixel_sail.__version__


def test_hooks_are_the_checks_of_the_makefile():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    makefile = (ROOT / "Makefile").read_text()
    assert [hook["id"] for hook in hooks] == ["ruff", "ruff-format", "mypy"]
    for hook in hooks:
        command = hook["entry"].removeprefix(".venv/bin/python ").removesuffix(" --force-exclude")
        assert f"$(VENV_PYTHON) {command}" in makefile, command


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.name
)
def test_issue_templates_have_the_fields_the_host_asks_for(path):
    template = yaml.safe_load(path.read_text())
    if path.name == "config.yml":
        assert template == {"blank_issues_enabled": False}
        return
    assert template["name"] and template["description"]
    names = [field["id"] for field in template["body"]]
    assert len(names) == len(set(names))
    for field in template["body"]:
        assert field["type"] in ("textarea", "input") and field["attributes"]["label"]
