"""Turns errors into a message on stderr and an exit status.

`main` of every script and tool is decorated with `one_message`.

    ConfigError("optim.lr is -1, expected ...")    ->  stderr "ConfigError: optim.lr is -1, expected ...", status 2
    RequeueRun("preempted after step 500")         ->  stderr "RequeueRun: preempted ...", status 85
    OSError of a full disk                         ->  stderr "OSError: runs/a/log.jsonl: No space left ...", status 2
    anything else                                  ->  traceback, status 1
"""

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

from pixel_sail.errors import REFUSALS, ExpectedError

Arguments = ParamSpec("Arguments")


def one_message(main: Callable[Arguments, int]) -> Callable[Arguments, int]:
    """Return `main` with expected errors printed to stderr and turned into their exit status."""

    @wraps(main)
    def wrapped(*arguments: Arguments.args, **options: Arguments.kwargs) -> int:
        try:
            return main(*arguments, **options)
        except ExpectedError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return error.status
        except OSError as error:
            if error.errno not in REFUSALS:
                raise
            where = f"{error.filename}: " if error.filename is not None else ""
            print(
                f"{type(error).__name__}: {where}{error.strerror}; free disk space, fix the permissions, or use "
                "another folder",
                file=sys.stderr,
            )
            return ExpectedError.status

    return wrapped
