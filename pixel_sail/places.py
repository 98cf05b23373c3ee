"""Where the files beside the package lie: configs/, scripts/ and tools/.

Place in the flow: the lowest layer, imports nothing of the project. In a checkout they stand beside `pixel_sail/`; a
wheel carries a copy within it, put there by `setup.py`:

    /home/me/pixel_sail/            {pixel_sail, configs, scripts, tools}     a checkout, also installed with `pip -e`
    .../site-packages/pixel_sail/bundled/      {configs, scripts, tools}      a wheel
"""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_BUNDLED = _PACKAGE / "bundled"


def is_bundled() -> bool:
    """Return whether the package comes from a wheel."""
    return _BUNDLED.is_dir()


def root_folder() -> Path:
    """Return the folder that holds configs/, scripts/ and tools/."""
    return _BUNDLED if is_bundled() else _PACKAGE.parent
