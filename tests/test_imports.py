"""The direction of imports is the architecture. These are its rules, read from the source text: nothing is imported to check them.

    loopguard -> nothing            wire -> h11, h2, hpack            mesh -> what reads files and makes certificates
    tracing -> opentelemetry        net -> trio, OpenSSL              exchange -> wire, net
    flows (inbound, outbound) -> all of these; app -> flows; nothing -> app but the command
    control.kube -> h11, trio, msgspec; proxy never -> control

and the sizes that say when a room holds two things.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("control", "proxy", "tracing", "loopguard", "lab")
OURS = frozenset(PACKAGES)

# Room -> the first-party rooms it may import, and the third-party packages. `proxy.X` stands for module or package X.
RULES: dict[str, tuple[set[str], set[str]]] = {
    "loopguard": ({"loopguard"}, set()),
    "tracing": ({"tracing"}, {"opentelemetry"}),
    "proxy.wire": ({"proxy.wire"}, {"h11", "h2", "hpack"}),
    "proxy.net": ({"proxy.net"}, {"trio", "OpenSSL", "cryptography"}),
    "proxy.mesh": (
        {"proxy.mesh", "proxy.net", "proxy.settings", "proxy.units", "proxy.describe", "loopguard"},
        {"trio", "OpenSSL", "cryptography", "msgspec", "yaml", "dns"},
    ),
    "proxy.exchange": ({"proxy.exchange", "proxy.wire", "proxy.net", "proxy.errors", "loopguard", "tracing"}, {"trio"}),
    "proxy.fast": ({"proxy.fast", "proxy.exchange", "proxy.wire", "proxy.net", "proxy.errors"}, {"trio"}),
    "proxy.detect": ({"proxy.net", "proxy.wire"}, {"trio"}),
    "proxy.totals": (set(), {"msgspec", "prometheus_client"}),
    "proxy.errors": ({"proxy.net", "proxy.wire"}, set()),
    "control.kube": ({"control.kube"}, {"trio", "h11", "msgspec"}),
}
# Not even by way of somebody who may: these never meet.
STDLIB_FORBIDDEN = {
    "loopguard": {"socket", "ssl", "time", "logging", "asyncio", "threading", "os"},
    "proxy.wire": {"socket", "ssl", "time", "asyncio", "selectors", "threading", "os", "logging"},
}
NEVER = [
    ("proxy.inbound", "proxy.outbound"),
    ("proxy.outbound", "proxy.inbound"),
    ("proxy.wire", "proxy.net"),
    ("proxy.net", "proxy.wire"),
    ("loopguard", "proxy"),
    ("tracing", "proxy"),
    ("proxy.exchange", "proxy.mesh"),
    ("proxy", "control"),
    ("control", "lab"),
]
MAY_IMPORT_APP = {"proxy.cli", "proxy.app", "proxy.worker"}
MAY_IMPORT_LAB = {"proxy.cli"}

MOST_LINES, MOST_FUNCTION_LINES, MOST_PARAMETERS = 400, 50, 5
# Longer files that hold one thing. A list of settings has one entry for each setting.
LONGER = {"proxy/sections.py": 600}


def sources() -> Iterator[tuple[str, Path, ast.Module]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            yield name, path, ast.parse(path.read_text("utf-8"))


SOURCES = list(sources())


def imported(tree: ast.Module) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the direction"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def within(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


def test_there_is_something_to_check() -> None:
    assert {name.split(".")[0] for name, _, _ in SOURCES} == OURS
    assert len(SOURCES) > 40


@pytest.mark.parametrize("room", RULES)
def test_a_room_imports_only_what_it_may(room: str) -> None:
    first_party, third_party = RULES[room]
    wrong = []
    for name, path, tree in SOURCES:
        if not within(name, room):
            continue
        for target, line in imported(tree):
            top = target.split(".")[0]
            if top in OURS:
                allowed = any(within(target, other) for other in first_party)
            elif top in sys.stdlib_module_names:
                allowed = top not in STDLIB_FORBIDDEN.get(room, set())
            else:
                allowed = top in third_party
            if not allowed:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {target}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("who", "whom"), NEVER)
def test_rooms_that_never_meet(who: str, whom: str) -> None:
    importers = [(path, tree) for name, path, tree in SOURCES if within(name, who)]
    wrong = [f"{path}:{line}" for path, tree in importers for target, line in imported(tree) if within(target, whom)]
    assert not wrong, wrong


def test_nothing_imports_the_composition_root() -> None:
    wrong = [
        f"{path}:{line} imports {target}"
        for name, path, tree in SOURCES
        if name not in MAY_IMPORT_APP
        for target, line in imported(tree)
        if within(target, "proxy.app")
    ]
    assert not wrong, "\n".join(wrong)


def test_the_proxy_does_not_know_the_laboratory() -> None:
    wrong = [
        f"{path}:{line} imports {target}"
        for name, path, tree in SOURCES
        if within(name, "proxy") and name not in MAY_IMPORT_LAB
        for target, line in imported(tree)
        if within(target, "lab")
    ]
    assert not wrong, "\n".join(wrong)


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring: the contract is not what makes it long."""
    lines = (function.end_lineno or 0) - function.lineno + 1
    first = function.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        lines -= (first.end_lineno or 0) - first.lineno + 1
    return lines


def test_no_module_no_function_and_no_parameter_list_holds_two_things() -> None:
    wrong = []
    for _, path, tree in SOURCES:
        length = len(path.read_text("utf-8").splitlines())
        if length > LONGER.get(str(path.relative_to(ROOT)), MOST_LINES):
            wrong.append(f"{path.relative_to(ROOT)} has {length} lines")
        for function in functions(tree):
            where = f"{path.relative_to(ROOT)}:{function.lineno} {function.name}"
            if body_lines(function) > MOST_FUNCTION_LINES:
                wrong.append(f"{where} has {body_lines(function)} lines")
            arguments = function.args
            names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs) if a.arg not in ("self", "cls")]
            if len(names) > MOST_PARAMETERS:
                wrong.append(f"{where} has {len(names)} parameters")
    assert not wrong, "\n".join(wrong)
