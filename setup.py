"""Adds the configuration to a built package; everything else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfiguration(build_py):
    """Copies ``conf`` beside the package's modules, where :func:`fimo.app.command.console` finds it."""

    def run(self) -> None:
        if self.editable_mode:  # reads the repository's own
            super().run()
            return
        package = Path(self.build_lib) / "fimo"
        shutil.rmtree(package, ignore_errors=True)  # modules of an earlier build would stay
        super().run()
        shutil.copytree("conf", package / "conf")


setup(cmdclass={"build_py": BuildWithConfiguration})
