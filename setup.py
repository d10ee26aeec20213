"""Builds the packages: as they are; or, with ISTHMUS_COMPILE=1, with the modules that
pyproject.toml names as extension modules.

The extension modules are made by mypyc (docs/decisions/30-compiled.md), and lie in the wheel beside
their sources. What they do is what the sources say. It takes a C compiler, Python's headers, what
requirements/compile.txt names (so no build isolation), and a minute or two. Only wheels are built
so: beside the sources of a checkout, extension modules would hide what is edited.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

_ROOT = Path(__file__).parent
# mypyc makes no dataclasses with `slots=True`: its classes have no __dict__ anyway.
_SLOTS = re.compile(r"^(@dataclass\(.*?)(?:slots=True, |, slots=True|slots=True)", re.MULTILINE)


class ParallelBuild(build_ext):
    """Compiles the files of an extension side by side; setuptools does one after the other."""

    def build_extensions(self) -> None:
        compile_one_by_one = self.compiler.compile

        def compile_side_by_side(sources: list[str], **how: Any) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                done = pool.map(lambda source: compile_one_by_one([source], **how), sources)
                return [compiled for group in done for compiled in group]

        self.compiler.compile = compile_side_by_side
        super().build_extensions()


def extensions(project: dict[str, Any]) -> list[Extension]:
    """The named modules, compiled from copies that are ready for it."""
    from mypyc.build import mypycify  # noqa: PLC0415  # only the build has it

    copies = _ROOT / "build" / "sources"
    shutil.rmtree(copies, ignore_errors=True)
    for package in ("proxy", "loopguard", "tracing"):
        for source in (_ROOT / package).rglob("*.py"):
            copy = copies / source.relative_to(_ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(_SLOTS.sub(r"\1", source.read_text("utf-8")), "utf-8")
    modules = [
        str(path.relative_to(copies))
        for pattern in project["tool"]["isthmus"]["compiled"]
        for path in sorted(copies.glob(pattern))
    ]
    os.chdir(copies)  # mypy names modules by their paths from here
    try:
        return mypycify(
            ["--config-file=", "--follow-imports=silent", *modules],
            opt_level="2",
            debug_level="0",
            multi_file=True,
            group_name="isthmus",
            target_dir=str(_ROOT / "build" / "c"),
        )
    finally:
        os.chdir(_ROOT)


if os.environ.get("ISTHMUS_COMPILE") == "1" and "bdist_wheel" in sys.argv:
    setup(
        ext_modules=extensions(tomllib.loads((_ROOT / "pyproject.toml").read_text("utf-8"))),
        cmdclass={"build_ext": ParallelBuild},
    )
else:
    setup()
