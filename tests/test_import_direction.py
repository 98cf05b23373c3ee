"""Modules import only from modules below them in one list, so the code can be read in one direction."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "pixel_sail"

LAYERS = (
    ("errors", "texts"),
    ("types", "dist", "entry", "files", "paths", "overrides", "renamed"),
    ("provenance",),
    ("rle",),
    ("model",),
    ("distillation", "conversion"),
    ("refshapes", "losses", "metrics", "data"),
    ("config", "predictor_io"),
    ("planning",),
    ("training", "evaluation", "sweep"),
    ("vqa", "model_card"),
    ("predictor",),
    ("predict_files", "demo", "cli"),
)
"""Lowest first; a module may import lower layers and its own subpackage."""

EXCEPTIONS = {("evaluation", "training"): {"validation.py", "run.py"}}
"""(importing, imported): files that may. Validation logs through the training run's log; an evaluation locks its folder
as a run does."""


def layer_of(name: str) -> int:
    return next(index for index, layer in enumerate(LAYERS) if name in layer)


def imported_parts(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "pixel_sail" else [f"pixel_sail.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("pixel_sail.")}
    return found


def test_every_part_of_the_package_has_a_layer():
    parts = {path.stem if path.suffix == ".py" else path.name for path in PACKAGE.iterdir() if path.name[0] not in "._"}
    assert parts == {name for layer in LAYERS for name in layer}


def test_imports_point_downwards():
    upwards = []
    for path in PACKAGE.rglob("*.py"):
        relative = path.relative_to(PACKAGE)
        own = relative.parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for part in imported_parts(path):
            allowed = path.name in EXCEPTIONS.get((own, part), set())
            if part != own and layer_of(part) >= layer_of(own) and not allowed:
                upwards.append(f"{relative} imports {part}")
    assert not upwards


def test_training_and_evaluation_do_not_import_scripts_or_tools():
    for path in PACKAGE.rglob("*.py"):
        modules = [
            node.module or "" for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)
        ]
        assert not [name for name in modules if name.split(".")[0] in ("scripts", "tools", "tests")], path
