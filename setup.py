"""Copy configs/, scripts/ and tools/ into wheels as pixel_sail/bundled/; everything else is in pyproject.toml.

In a checkout they are next to the package, where users edit them; `pixel_sail/paths.py` finds either.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CARRIED = {"configs": "*.yaml", "scripts": "*.py", "tools": "*.py"}


class BuildWithConfigs(build_py):
    """Copies the package and the bundled folders."""

    def run(self) -> None:
        """Copy; an editable install uses the files of the checkout."""
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
