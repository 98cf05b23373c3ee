"""Put configs/, scripts/ and tools/ into wheels, as pixel_sail/bundled/; all else stands in pyproject.toml.

A checkout keeps them beside the package, where people look for them and edit them; `pixel_sail/paths.py` finds either.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CARRIED = {"configs": "*.yaml", "scripts": "*.py", "tools": "*.py"}


class BuildWithConfigs(build_py):
    """The usual copy of the package, and what lies beside it."""

    def run(self) -> None:
        """Copy; an editable install uses the checkout's own files."""
        super().run()
        if self.editable_mode:
            return
        bundled = Path(self.build_lib) / "pixel_sail" / "bundled"
        shutil.rmtree(bundled, ignore_errors=True)
        for folder, pattern in CARRIED.items():
            for source in sorted((ROOT / folder).rglob(pattern)):
                target = bundled / source.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)


setup(cmdclass={"build_py": BuildWithConfigs})
