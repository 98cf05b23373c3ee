"""Errors that users can fix, reported as one message without a traceback.

This module imports nothing from the project. Every such error derives from `ExpectedError`, so entry points need not
list them, see `entry.py`:

    class DataError(ExpectedError, ValueError)        ->  "DataError: refs.p: found ..., expected ...", exit status 2
    KeyError of a bug                                 ->  traceback, exit status 1
"""

import errno


class ExpectedError(Exception):
    """An error that a user can fix. The message says where, what was found, what was expected and what to do."""

    status = 2
    """Exit status of a program that ends with this error, see docs/reliability.md."""


class WriteError(ExpectedError, OSError):
    """A file or folder cannot be written: no space, no permission, or another kind of file at its path."""


REFUSALS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EIO, errno.ESTALE),
)
"""Error numbers of problems with the machine and not our code: no space, no permission, a broken disk."""
