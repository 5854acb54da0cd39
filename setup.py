"""Build hook: wheels carry the code, not the tests beside it. Everything else is in pyproject.toml."""

from __future__ import annotations

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithoutTests(build_py):
    """Leaves ``*_test.py`` and ``conftest.py`` out of a wheel."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules = super().find_package_modules(package, package_dir)
        return [module for module in modules if not module[1].endswith(("_test", "conftest"))]


setup(cmdclass={"build_py": BuildWithoutTests})
