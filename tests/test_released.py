"""`recipe=released` agrees with the page that lists every difference from the release."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from running import ROOT
from test_configs import names

from pixel_sail.config import EvalConfig, TrainConfig, load_config

PROGRAMS = {"train": ("Model and training", TrainConfig), "evaluate": ("Evaluation", EvalConfig)}
"""Program -> heading of its table in docs/faq.md, and its schema."""

NO_SWITCH = re.compile(r"(none needed|no switch|no switch in the recipe): [\w`]")
START = {"train": ("name=x", "model=sail_0_5b", "data=cotrain_0_5b", "optim.steps=1"), "evaluate": ("checkpoint=x",)}


def leaves(node: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield each setting of a YAML file as a command-line override."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={str(value).lower() if isinstance(value, bool) else value}"


def recipe(program: str) -> list[str]:
    """Return the settings of `recipe=released`."""
    return list(leaves(yaml.safe_load((ROOT / f"configs/recipe/released/{program}.yaml").read_text())))


def rows(program: str) -> list[dict[str, str]]:
    """Return the rows of a table of docs/faq.md, column -> cell."""
    heading = PROGRAMS[program][0]
    section = (ROOT / "docs/faq.md").read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    columns, _, *found = ([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines)
    return [dict(zip(columns, cells, strict=True)) for cells in found]


def named(switch: str) -> list[str]:
    """Return the settings that a cell names."""
    return re.findall(r"`([\w.]+=[^`]*)`", switch)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_setting_of_the_recipe_has_a_row_that_names_it(program):
    switches = {setting for row in rows(program) for setting in named(row["switch"])}
    assert set(recipe(program)) <= switches


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_difference_is_a_setting_of_the_recipe_or_explained(program):
    switched = set(recipe(program))
    for row in rows(program):
        found = set(named(row["switch"])) & switched
        assert found or NO_SWITCH.match(row["switch"]), f"{row['question']}: {row['switch']!r}"


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_rows_name_exactly_the_settings_of_the_recipe(program):
    schema = PROGRAMS[program][1]
    plain = [load_config(program, schema, [*START[program], setting]) for setting in recipe(program)]
    assert load_config(program, schema, [*START[program], "recipe=released"]) == load_config(
        program, schema, [*START[program], *recipe(program)]
    )
    assert all(config != load_config(program, schema, [*START[program]]) for config in plain), (
        "a setting changes nothing"
    )


def test_every_detail_of_the_data_has_a_row():
    table = " ".join(row["switch"] for row in rows("train"))
    for name in names("source"):
        node = yaml.safe_load((ROOT / f"configs/source/{name}.yaml").read_text())
        for source in (value for value in node.values() if isinstance(value, dict)):
            details = [key for key, value in source.items() if value == "${data.details}"]
            assert not [key for key in details if f"`{key}`" not in table], name
