"""Where the files beside the package lie (configs/, scripts/ and tools/), and folders as users name them.

The lowest layer, imports nothing of the project. In a checkout they stand beside `pixel_sail/`; a wheel carries a copy
within it, put there by `setup.py`:

    /home/me/pixel_sail/            {pixel_sail, configs, scripts, tools}     a checkout, also installed with `pip -e`
    .../site-packages/pixel_sail/bundled/      {configs, scripts, tools}      a wheel

Users' folders come from settings and variables that no shell has expanded: expanded("~/runs") == "/home/me/runs".
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
    """Return the user's home folder, None where neither HOME nor the system knows one, as in a container that runs
    under a number of its own."""
    if given := os.environ.get("HOME"):
        return Path(given)
    try:
        return Path(pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:
        return None


def expanded(path: str) -> str | None:
    """Return a path whose leading `~` or `~user` is replaced by the home folder, None where `~` has none.

    A name that only begins with `~`, such as `~tmp.jpg`, stays as it is.
    """
    if path != "~" and not path.startswith("~/"):
        return os.path.expanduser(path)
    home = home_folder()
    return None if home is None else f"{home}{path[1:]}"
