"""Puts the runnable scripts into the wheel, as `hf_vit/scripts/`, where the `hf-vit` command finds them.

Everything else of the build is in `pyproject.toml`.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithScripts(build_py):
    """Copies `conversion/` and `examples/` beside the package's modules."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # the command finds them in the checkout
            return
        for folder in ("conversion", "examples"):
            for source in sorted(Path(folder).rglob("*")):
                if source.is_file() and source.suffix in (".py", ".npz", ".yaml"):
                    target = Path(self.build_lib, "hf_vit", "scripts", source)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source, target)


setup(cmdclass={"build_py": BuildWithScripts})
