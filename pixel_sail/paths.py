"""Locates configs/, scripts/ and tools/, and expands `~` in paths.

In a checkout these folders are next to `pixel_sail/`; a wheel contains a copy inside it, made by `setup.py`:

    /home/me/pixel_sail/            {pixel_sail, configs, scripts, tools}     a checkout, also installed with `pip -e`
    .../site-packages/pixel_sail/bundled/      {configs, scripts, tools}      a wheel

Paths in settings and variables are not expanded by a shell: expanded("~/runs") == "/home/me/runs".
"""

import os
import pwd
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_BUNDLED = _PACKAGE / "bundled"


def is_bundled() -> bool:
    """Return whether the package comes from a wheel."""
    return _BUNDLED.is_dir()


def root_folder() -> Path:
    """Return the folder that holds configs/, scripts/ and tools/."""
    return _BUNDLED if is_bundled() else _PACKAGE.parent


def home_folder() -> Path | None:
    """Return the user's home folder, None if neither HOME nor the system has one, for example in a container with an
    unknown user id."""
    if given := os.environ.get("HOME"):
        return Path(given)
    try:
        return Path(pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:
        return None


def expanded(path: str) -> str | None:
    """Return a path with a leading `~` or `~user` expanded, None if there is no home folder.

    A name that only begins with `~`, such as `~tmp.jpg`, is not changed.
    """
    if path != "~" and not path.startswith("~/"):
        return os.path.expanduser(path)
    home = home_folder()
    return None if home is None else f"{home}{path[1:]}"
