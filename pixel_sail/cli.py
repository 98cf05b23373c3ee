"""The command `pixel-sail`: the scripts and tools as subcommands, with or without a checkout.

A subcommand replaces this process by that of its script, so arguments, output, signals and exit status are the
script's own:

    pixel-sail train experiment=quickstart      is      python scripts/train.py experiment=quickstart
    pixel-sail completion bash                  prints the completion script for bash
    pixel-sail predict --help                   prints the script's docstring, then every setting:

      image               needed            Image file or folder of images.
      predict.mask        'union'           union: the masks of all generated [SEG] tokens are merged. ...

The exit status is 2 for a subcommand that does not exist.
"""

import ast
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pixel_sail
from pixel_sail.paths import root_folder

COMMANDS = {
    "train": ("scripts/train.py", "train a model, or resume a run"),
    "evaluate": ("scripts/evaluate.py", "score a checkpoint on benchmarks"),
    "predict": ("scripts/predict.py", "ask a checkpoint about an image or a folder of images"),
    "demo": ("scripts/demo.py", "ask a checkpoint in a browser"),
    "doctor": ("tools/doctor.py", "check this machine for problems before a run"),
    "check-data": ("tools/check_data.py", "check datasets for damage"),
    "plan": ("tools/plan_run.py", "estimate time, memory and disk space of a run"),
    "convert": ("tools/convert_checkpoint.py", "convert public weights to ours, and back"),
    "publish": ("tools/publish_model.py", "write the card of a trained model, and upload it to the hub"),
    "export": ("tools/export_checkpoint.py", "export a checkpoint as a Hugging Face folder"),
    "tables": ("tools/make_tables.py", "print the paper's tables, and those of sweeps"),
    "score": ("tools/score.py", "score stored predictions again"),
    "compare": ("tools/compare_runs.py", "compare two evaluations, item by item"),
    "make-data": ("tools/make_refshapes.py", "render the RefShapes benchmark"),
    "make-tokenizer": ("tools/make_tokenizer.py", "train a small tokenizer for models with random weights"),
}

SCHEMAS = {
    "train": "TrainConfig",
    "evaluate": "EvalConfig",
    "predict": "PredictCommandConfig",
    "demo": "DemoConfig",
    "check-data": None,
}
"""Commands with settings, whose help is generated here, and their class in `config.py`. Other commands have options and
help of their own."""

BASH = """_pixel_sail() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}"
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{names}" -- "$word"))
    else
        COMPREPLY=($(compgen -f -- "$word"))
    fi
}}
complete -o filenames -F _pixel_sail pixel-sail
"""
ZSH = """_pixel_sail() {{
    if (( CURRENT == 2 )); then
        compadd {names}
    else
        _files
    fi
}}
compdef _pixel_sail pixel-sail
"""
SHELLS = {"bash": BASH, "zsh": ZSH}

PAGE_OF_SETTINGS = Path(__file__).with_name("config.py")
"""Parsed as text instead of imported, so that help is fast."""
WIDEST_DEFAULT = 16


def usage() -> str:
    """Return the help text."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: pixel-sail COMMAND [ARGUMENTS]",
            "       pixel-sail COMMAND --help",
            "",
            *lines,
            f"  {'completion':<{width}}print shell completion: source <(pixel-sail completion bash)",
            "",
            "Training and evaluation accept Hydra overrides, for example experiment=quickstart optim.steps=100.",
        ]
    )


def completion(shell: str) -> str:
    """Return the completion script of a shell. Raises: KeyError for one of another name."""
    return SHELLS[shell].format(names=" ".join([*COMMANDS, "completion"]))


def wants_help(arguments: Sequence[str]) -> bool:
    """Return whether a command line asks for help."""
    return any(argument in ("-h", "--help") for argument in arguments)


def script_help(script: Path, schema: str | None = None, *, command: str | None = None) -> str:
    """Return a script's docstring, and every setting of a class of `config.py` with default and description."""
    about = ast.get_docstring(ast.parse(script.read_text())) or ""
    lines = [f"usage: {command or script.name} KEY=VALUE ...", "", about]
    if schema is not None:
        page = ast.parse(PAGE_OF_SETTINGS.read_text())
        classes = {item.name: item for item in page.body if isinstance(item, ast.ClassDef)}
        rows = list(_settings(classes, schema, ""))
        width = max(len(name) for name, _, _ in rows)
        lines += ["", "Settings and their defaults:", ""]
        lines += [f"  {name:<{width}}  {default:<{WIDEST_DEFAULT}}  {about}".rstrip() for name, default, about in rows]
    return "\n".join(lines)


def _settings(classes: dict[str, ast.ClassDef], schema: str, prefix: str) -> Iterator[tuple[str, str, str]]:
    """Yield name, default and description of every setting; those of groups as `group.name`."""
    body = classes[schema].body
    for item, following in zip(body, [*body[1:], None], strict=True):
        if not isinstance(item, ast.AnnAssign):
            continue
        name, kind = prefix + ast.unparse(item.target), ast.unparse(item.annotation)
        if kind in classes:
            yield from _settings(classes, kind, f"{name}.")
        elif isinstance(item.value, ast.Call):
            # A default factory: an empty list or dict, or a group that is defined in another file.
            yield (name, "", _meaning(following)) if kind.startswith(("list", "dict")) else (f"{name}.*", "", kind)
        else:
            default = "needed" if item.value is None else ast.unparse(item.value).replace("MISSING", "needed")
            yield name, default, _meaning(following)


def _meaning(following: ast.stmt | None) -> str:
    """Return the text below a field, on one line."""
    if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
        return " ".join(str(following.value.value).split())
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Replace this process by a subcommand; return the exit status if none is run."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given:
        print(usage(), file=sys.stderr)
        return 2
    name, *rest = given
    if name in ("-h", "--help", "help"):
        print(usage())
    elif name == "--version":
        print(f"pixel-sail {pixel_sail.__version__}")
    elif name == "completion" and rest in ([shell] for shell in SHELLS):
        print(completion(rest[0]), end="")
    elif name in SCHEMAS and wants_help(rest):
        script = root_folder() / COMMANDS[name][0]
        print(script_help(script, SCHEMAS[name], command=f"pixel-sail {name}"))
    elif name in COMMANDS:
        script = root_folder() / COMMANDS[name][0]
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, str(script), *rest])
    else:
        expected = f"completion and one of {', '.join(SHELLS)}" if name == "completion" else ", ".join(COMMANDS)
        print(f"pixel-sail: found {' '.join(given)!r}, expected {expected}; see pixel-sail --help", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
