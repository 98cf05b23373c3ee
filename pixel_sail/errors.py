"""Errors that are told in one message.

The lowest layer, imports nothing of the project. Every error that a person can mend derives from `ExpectedError`, so
that an entry point needs no list of them, see `entry.py`:

    class DataError(ExpectedError, ValueError)        ->  "DataError: refs.p: found ..., expected ...", exit status 2
    KeyError of a bug                                 ->  traceback, exit status 1
"""

import errno


class ExpectedError(Exception):
    """Something a person can mend. The message names where, what was found, what was expected, what to do."""

    status = 2
    """Exit status of a program that ends with it, see docs/reliability.md."""


class WriteError(ExpectedError, OSError):
    """A file or folder cannot be written: no room, no right, or something else in its place."""


REFUSALS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EIO, errno.ESTALE),
)
"""What an operating system answers where the machine refuses: no room, no right, a broken disk. No bug of ours."""
