"""Adds the configuration to a built package; everything else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfiguration(build_py):
    """Copies ``conf`` beside the package's modules, where :func:`fimo.command.console` finds it."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # an editable install reads the repository's own
            target = Path(self.build_lib) / "fimo" / "conf"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree("conf", target, ignore=shutil.ignore_patterns("__pycache__"))


setup(cmdclass={"build_py": BuildWithConfiguration})
