"""The modules that setup.py compiles exist, and can be compiled as they are written
(docs/decisions/30-compiled.md)."""

from __future__ import annotations

import ast
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILED = [
    ROOT / path
    for path in tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["isthmus"][
        "compiled"
    ]
]


def test_compiled_modules_exist_and_are_listed_once() -> None:
    assert len(COMPILED) > 10
    assert all(path.is_file() for path in COMPILED)
    assert len(set(COMPILED)) == len(COMPILED)


@pytest.mark.parametrize("path", COMPILED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_sources_avoid_what_the_compiler_treats_differently(path: Path) -> None:
    """What mypyc 2.4 accepts, but does not do as Python does."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            assert not _weakly_referred(node), (
                f"{node.name}: a compiled class has no weak references"
            )
            if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
                assert not any("Generic" in ast.unparse(base) for base in node.bases), (
                    f"{node.name}: no dataclass that is generic"
                )
                plain = [
                    field
                    for field in node.body
                    if isinstance(field, ast.AnnAssign)
                    and ast.unparse(field.annotation) == "object"
                ]
                assert not plain, f"{node.name}: no field of a dataclass is an `object` (Any is)"
        if isinstance(node, ast.AsyncFunctionDef):
            assert not _reused(node), (
                f"{node.name}: one name for errors of several types, of which the first is believed"
            )
        if isinstance(node, ast.Try):
            assert not _narrowed(node), (
                f"line {node.lineno}: what is None at the end of `try` is None to its `finally`, too"
            )


def _weakly_referred(node: ast.ClassDef) -> bool:
    return any(
        isinstance(inner, ast.Constant) and inner.value == "__weakref__" for inner in ast.walk(node)
    )


def _reused(node: ast.AsyncFunctionDef) -> list[str]:
    """Names that are bound to errors of several types."""
    types: dict[str, set[str]] = defaultdict(set)
    for inner in ast.walk(node):
        if isinstance(inner, ast.ExceptHandler) and inner.name and inner.type is not None:
            types[inner.name].add(ast.unparse(inner.type))
    return [name for name, several in types.items() if len(several) > 1]


def _narrowed(node: ast.Try) -> set[str]:
    """Names that are None at the end of `try`, and that `finally` reads."""
    cleared: set[str] = set()
    for statement in (inner for part in (*node.body, *node.orelse) for inner in ast.walk(part)):
        if isinstance(statement, ast.Assign | ast.AnnAssign | ast.NamedExpr):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            if isinstance(statement.value, ast.Constant) and statement.value.value is None:
                cleared.update(target.id for target in targets if isinstance(target, ast.Name))
    return cleared & {
        inner.id
        for part in node.finalbody
        for inner in ast.walk(part)
        if isinstance(inner, ast.Name)
    }


def test_no_class_that_is_compiled_has_a_subclass_that_is_not() -> None:
    """Among compiled modules: perf's programs have some subclasses, but they run the sources."""
    trees = {
        path: ast.parse(path.read_text("utf-8"))
        for room in ("proxy", "loopguard", "tracing")
        for path in (ROOT / room).rglob("*.py")
    }
    classes = [
        (path, node)
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    ]
    compiled = {node.name for path, node in classes if path in COMPILED and not _is_free(node)}
    assert {"Exchange", "FastConnection", "Headers"} <= compiled
    wrong = [
        node.name
        for path, node in classes
        if path not in COMPILED and compiled & {ast.unparse(base) for base in node.bases}
    ]
    assert not wrong


def _is_free(node: ast.ClassDef) -> bool:
    """Whether it stays an ordinary Python class: protocols, enumerations and exceptions do."""
    bases = {ast.unparse(base) for base in node.bases}
    return any(
        base.startswith("Protocol") or base.endswith(("Enum", "Exception", "Error"))
        for base in bases
    )
