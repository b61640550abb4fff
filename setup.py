"""Builds the package `dn_dino`, described in `pyproject.toml`; `ops/setup.py` builds only `ops/`.

The package is `models/`, with `ops/` and its compiled libraries as `dn_dino.ops` and the published
configs as `dn_dino.configs`.
"""

import importlib.util
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

spec = importlib.util.spec_from_file_location("operator_setup", Path("ops", "setup.py"))
assert spec and spec.loader
operator = importlib.util.module_from_spec(spec)
spec.loader.exec_module(operator)


class Build(operator.Build):
    """Installs the package without the compiled operator if the C++ compiler fails."""

    def build_extensions(self) -> None:
        try:
            super().build_extensions()
        except CompileError as reason:
            self.extensions = []
            print(f"Deformable attention will run on its PyTorch reference: {reason}")


class BuildModules(build_py):
    """Excludes `ops/setup.py` and whatever an earlier build left in the build directory."""

    def run(self) -> None:
        shutil.rmtree(Path(self.build_lib, "dn_dino"), ignore_errors=True)
        super().run()

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        found = super().find_package_modules(package, package_dir)
        return [module for module in found if module[:2] != ("dn_dino.ops", "setup")]


class Wheel(bdist_wheel):
    """Tagged for any Python version, because the libraries are loaded with ctypes."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=operator.extensions("dn_dino.ops", "ops/src"),
    cmdclass={"build_ext": Build, "build_py": BuildModules, "bdist_wheel": Wheel},
)
