"""User errors are turned into one message and an exit status in one place; a bug keeps its traceback."""

import ast
import errno

import pytest
from running import ROOT

from pixel_sail.config import ConfigError
from pixel_sail.entry import one_message
from pixel_sail.errors import WriteError
from pixel_sail.files import replace_text, writing
from pixel_sail.training.checkpoint import CheckpointError
from pixel_sail.training.finite import NonFiniteLossError
from pixel_sail.training.metric_bounds import MetricOutOfBoundsError
from pixel_sail.training.preemption import LostPeer, LostWorker, RequeueRun
from pixel_sail.types import DataError

STATUSES = {
    **dict.fromkeys(
        (ConfigError, DataError, CheckpointError, WriteError, MetricOutOfBoundsError, NonFiniteLossError), 2
    ),
    **{RequeueRun: 85, LostPeer: 86, LostWorker: 86},
}


def ending_with(error):
    @one_message
    def main():
        raise error

    return main


@pytest.mark.parametrize("kind", STATUSES)
def test_an_expected_error_is_one_message_with_its_status(kind, capsys):
    assert ending_with(kind("where: found a, expected b"))() == STATUSES[kind]
    assert capsys.readouterr().err == f"{kind.__name__}: where: found a, expected b\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_an_os_error_is_one_message_with_the_path(number, capsys):
    assert ending_with(OSError(number, "refused", "runs/a/log.jsonl"))() == 2
    assert "Error: runs/a/log.jsonl: refused; free disk space" in capsys.readouterr().err


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("x"), ValueError("x"), FileNotFoundError(2, "x", "y")])
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        ending_with(error)()


def test_a_write_error_is_reported_with_the_path(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        WriteError, match=rf"{tmp_path}/file/report.html: cannot be written \(.*\), expected a writable path"
    ):
        replace_text(tmp_path / "file" / "report.html", "text")
    (tmp_path / "folder").mkdir()
    with pytest.raises(WriteError, match="folder: cannot be written"):
        replace_text(tmp_path / "folder", "text")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"], "nothing is left beside it"
    with pytest.raises(WriteError, match="inner"), writing(tmp_path / "outer"):
        raise WriteError("inner: reported already")


def test_every_command_makes_its_status_in_that_place():
    without = []
    for path in (*(ROOT / "scripts").glob("*.py"), *(ROOT / "tools").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name == "main":
                decorators = {item.id for item in node.decorator_list if isinstance(item, ast.Name)}
                without += [] if "one_message" in decorators else [path.name]
    allowed = {"check_parity.py", "convert_refs.py", "screenshot_demo.py", "soak.py", "two_hosts.py"}
    assert set(without) == allowed, "these continue after an error, or are about processes that end with one"
