"""The direction of imports is the architecture. These are its rules. They are checked in the source
text, without importing anything.

Imports go up in the table of RULES and never down: a package may import only packages above it, and
of those only the ones in its row. Data goes the other way: app builds the flows and gives each part
what it needs. Modules have no import cycles. The sizes at the end are hints that a module holds two
things."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("control", "proxy", "tracing", "loopguard", "lab")
OURS = frozenset(PACKAGES)

# Package, or module beside them -> what it may import of our own packages, and of third parties.
# The order is the direction: see above.
RULES: dict[str, tuple[set[str], set[str]]] = {
    "loopguard": (set(), set()),
    "tracing": (set(), {"opentelemetry"}),
    "proxy.wire": (set(), {"h11", "hpack"}),
    "proxy.net": (set(), {"trio", "OpenSSL", "cryptography"}),
    "proxy.files": (set(), set()),
    "proxy.metric_families": (set(), {"prometheus_client"}),
    "proxy.intercept": (set(), set()),
    "proxy.errors": ({"proxy.net", "proxy.wire"}, set()),
    "proxy.identity": ({"proxy.files", "proxy.net"}, {"trio", "OpenSSL", "cryptography"}),
    "proxy.settings": ({"proxy.files", "proxy.identity", "proxy.net"}, {"msgspec", "yaml"}),
    "proxy.config": (
        {"proxy.settings", "proxy.files", "proxy.identity", "proxy.net"},
        {"msgspec"},
    ),
    "proxy.enrollment": (
        {"proxy.config", "proxy.files", "proxy.identity", "proxy.net", "proxy.wire"},
        {"trio", "msgspec", "h11", "cryptography"},
    ),
    "proxy.directory": (
        {
            "proxy.config",
            "proxy.settings",
            "proxy.files",
            "proxy.identity",
            "proxy.net",
            "loopguard",
        },
        {"trio", "msgspec"},
    ),
    "control.kube": ({"proxy.settings"}, {"trio", "h11", "msgspec"}),
    "control.contract": ({"proxy.directory", "proxy.identity"}, set()),
    "control.discovery": (
        {"control.kube", "control.contract", "proxy.settings"},
        {"trio", "msgspec"},
    ),
    "control.channel": (
        {
            "control.kube",
            "control.discovery",
            "control.contract",
            "proxy.directory",
            "proxy.identity",
            "proxy.net",
            "proxy.settings",
        },
        {"trio"},
    ),
    "control.identity": (
        {
            "control.kube",
            "control.contract",
            "proxy.enrollment",
            "proxy.files",
            "proxy.identity",
            "proxy.net",
            "proxy.settings",
        },
        {"trio", "h11", "cryptography"},
    ),
    "control.metrics": (
        {
            "control.kube",
            "control.discovery",
            "control.channel",
            "control.identity",
            "proxy.metric_families",
        },
        {"trio"},
    ),
    "control.admin": ({"proxy.metric_families", "proxy.settings"}, {"trio", "h11"}),
    "control.config": (
        {
            "control.kube",
            "control.discovery",
            "control.channel",
            "control.identity",
            "control.admin",
            "proxy.settings",
        },
        set(),
    ),
    "control.app": (
        {
            "control.kube",
            "control.discovery",
            "control.channel",
            "control.identity",
            "control.admin",
            "control.metrics",
            "control.config",
            "control.contract",
            "proxy.enrollment",
            "proxy.directory",
            "proxy.identity",
            "proxy.net",
        },
        {"trio"},
    ),
    "control.command": (
        {
            "control.app",
            "control.channel",
            "control.config",
            "control.kube",
            "control.contract",
            "proxy.identity",
            "proxy.net",
            "proxy.settings",
        },
        {"trio"},
    ),
    "proxy.balancing": ({"proxy.directory", "proxy.net"}, {"trio"}),
    "proxy.exchange": (
        {"proxy.wire", "proxy.net", "proxy.errors", "loopguard", "tracing"},
        {"trio"},
    ),
    "proxy.fastpath": ({"proxy.exchange", "proxy.wire", "proxy.net", "proxy.errors"}, {"trio"}),
    "proxy.telemetry": (
        {
            "proxy.metric_families",
            "proxy.config",
            "proxy.exchange",
            "proxy.wire",
            "proxy.net",
            "proxy.errors",
            "tracing",
        },
        {"trio", "OpenSSL", "prometheus_client"},
    ),
    "proxy.workers": (
        {"proxy.metric_families", "proxy.config", "proxy.net"},
        {"msgspec", "prometheus_client"},
    ),
    "proxy.process": (
        {
            "proxy.telemetry",
            "proxy.exchange",
            "proxy.directory",
            "proxy.enrollment",
            "proxy.identity",
            "proxy.config",
            "proxy.net",
            "proxy.errors",
        },
        {"trio"},
    ),
    "proxy.dns": (
        {
            "proxy.process",
            "proxy.telemetry",
            "proxy.directory",
            "proxy.config",
            "proxy.net",
            "proxy.errors",
            "proxy.settings",
        },
        {"trio", "dns"},
    ),
    "proxy.routing": (
        {
            "proxy.balancing",
            "proxy.telemetry",
            "proxy.exchange",
            "proxy.directory",
            "proxy.config",
            "proxy.wire",
            "proxy.net",
            "proxy.errors",
            "proxy.settings",
        },
        {"trio", "msgspec"},
    ),
    "proxy.flows": (
        {
            "proxy.routing",
            "proxy.balancing",
            "proxy.workers",
            "proxy.telemetry",
            "proxy.fastpath",
            "proxy.exchange",
            "proxy.directory",
            "proxy.config",
            "proxy.identity",
            "proxy.wire",
            "proxy.net",
            "proxy.errors",
            "loopguard",
            "tracing",
            "proxy.settings",
        },
        {"trio"},
    ),
    "proxy.admin": (
        {
            "proxy.process",
            "proxy.telemetry",
            "proxy.metric_families",
            "proxy.exchange",
            "proxy.config",
            "proxy.wire",
            "proxy.net",
        },
        {"trio"},
    ),
    # The composition root.
    "proxy.app": ({"proxy", "loopguard"}, {"trio"}),
    "proxy.worker": ({"proxy.app", "proxy.workers", "proxy.errors"}, {"trio", "msgspec"}),
    "proxy.supervisor": (
        {
            "proxy.admin",
            "proxy.process",
            "proxy.workers",
            "proxy.telemetry",
            "proxy.config",
            "proxy.net",
            "proxy.errors",
            "proxy",
        },
        {"trio", "msgspec"},
    ),
    "proxy.commands": (
        {
            "proxy.dns",
            "proxy.directory",
            "proxy.enrollment",
            "proxy.intercept",
            "proxy.config",
            "proxy.identity",
            "proxy.files",
            "proxy.net",
            "proxy.settings",
        },
        {"trio", "cryptography", "dns", "h11"},
    ),
    "proxy.cli": (
        {
            "proxy.app",
            "proxy.supervisor",
            "proxy.commands",
            "proxy.config",
            "proxy.net",
            "proxy.errors",
            "lab",
            "proxy.settings",
        },
        set(),
    ),
}
# Modules of the standard library that these packages do not use: their functions depend on their
# arguments only.
STDLIB_FORBIDDEN = {
    "loopguard": {"socket", "ssl", "time", "logging", "asyncio", "threading", "os"},
    "proxy.wire": {"socket", "ssl", "time", "asyncio", "selectors", "threading", "os", "logging"},
}
# Packages that are independent of each other.
NEVER = [
    ("proxy", "control"),
    ("control", "lab"),
    ("proxy.flows.inbound", "proxy.flows.outbound"),
    ("proxy.flows.outbound", "proxy.flows.inbound"),
    ("proxy.flows.gateway", "proxy.flows.inbound"),
    ("proxy.flows.gateway", "proxy.flows.outbound"),
]

MOST_LINES, MOST_FUNCTION_LINES, MOST_PARAMETERS = 500, 60, 5
# Longer modules that hold one thing: a list of metrics, the start of the
# process, which builds each part once, and the state of an HTTP/2 connection, which all frames of
# both directions change.
LONGER = {
    "proxy/telemetry/metrics.py": 550,
    "proxy/wire/h2/connection.py": 900,
}
LONGER_FUNCTIONS = {
    ("proxy/app.py", "__init__"): 70,
    ("proxy/telemetry/metrics.py", "_events"): 75,
    ("proxy/telemetry/metrics.py", "_states"): 75,
}


def sources() -> Iterator[tuple[str, Path, ast.Module]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            yield name, path, ast.parse(path.read_text("utf-8"))


SOURCES = list(sources())
MODULES = frozenset(name for name, _, _ in SOURCES)


def imported(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """The imported names, with the line. Imports for type checkers only count as well."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the direction"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def package_of(name: str) -> str:
    """The row of RULES that a module, or a name in one, belongs to."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] in ("control", "proxy") else parts[0]


def cycles(graph: Mapping[str, set[str]]) -> list[set[str]]:
    """The strongly connected groups of more than one node (Tarjan's algorithm)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in order:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], order[other])
        if low[node] == order[node]:
            at = stack.index(node)
            if len(stack) - at > 1:
                found.append(set(stack[at:]))
            del stack[at:]

    for node in sorted(graph):
        if node not in order:
            visit(node)
    return found


def test_there_is_something_to_check() -> None:
    assert {name.split(".")[0] for name, _, _ in SOURCES} == OURS
    assert len(SOURCES) > 40


def test_each_package_has_a_rule() -> None:
    assert {package_of(name) for name in MODULES} - {"lab", "proxy", "control"} == set(RULES)


def test_the_rules_have_one_direction() -> None:
    above: set[str] = {
        "proxy",
        "lab",
    }  # the root package is empty, and the laboratory may import anything
    for package, (first_party, _) in RULES.items():
        assert first_party <= above, (
            f"{package} may import {first_party - above}, which do not stand above it"
        )
        above.add(package)


@pytest.mark.parametrize("package", RULES)
def test_a_package_imports_only_what_its_row_allows(package: str) -> None:
    first_party, third_party = RULES[package]
    wrong = []
    for name, path, tree in SOURCES:
        if not within(name, package):
            continue
        for target, line in imported(tree):
            top = target.split(".")[0]
            if top in OURS:
                row = package_of(target) if package_of(target) in RULES else top
                allowed = (
                    row == package
                    or row in first_party
                    or (package == "proxy.app" and row in _above(package))
                )
            elif top in sys.stdlib_module_names:
                allowed = top not in STDLIB_FORBIDDEN.get(package, set())
            else:
                allowed = top in third_party
            if not allowed:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {target}")
    assert not wrong, "\n".join(wrong)


def _above(package: str) -> list[str]:
    rows = list(RULES)
    return rows[: rows.index(package)]


@pytest.mark.parametrize(("one", "other"), NEVER)
def test_independent_packages_do_not_import_each_other(one: str, other: str) -> None:
    importers = [(path, tree) for name, path, tree in SOURCES if within(name, one)]
    assert importers
    wrong = [
        f"{path}:{line}"
        for path, tree in importers
        for target, line in imported(tree)
        if within(target, other)
    ]
    assert not wrong, wrong


def test_the_proxy_does_not_know_the_laboratory() -> None:
    wrong = [
        f"{path}:{line} imports {target}"
        for name, path, tree in SOURCES
        if within(name, "proxy") and name != "proxy.cli"  # for `isthmus demo`
        for target, line in imported(tree)
        if within(target, "lab")
    ]
    assert not wrong, "\n".join(wrong)


def test_no_test_module_imports_another() -> None:
    """What several test modules need is in its own module, without tests."""
    wrong = [
        f"{path.relative_to(ROOT)}: {node.module}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
        and (node.module or "").rpartition(".")[2].startswith("test_")
    ]
    assert wrong == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for name, _, tree in SOURCES:
        targets = {
            target if target in MODULES else target.rpartition(".")[0]
            for target, _ in imported(tree)
        }
        graph[name] = (targets & MODULES) - {name}
    assert cycles(graph) == []


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (
        node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    )


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring: a long contract does not make the code long."""
    lines = (function.end_lineno or 0) - function.lineno + 1
    first = function.body[0]
    if (
        isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and isinstance(first.value.value, str)
    ):
        lines -= (first.end_lineno or 0) - first.lineno + 1
    return lines


def test_no_module_no_function_and_no_parameter_list_holds_two_things() -> None:
    wrong = []
    for _, path, tree in SOURCES:
        length, file = len(path.read_text("utf-8").splitlines()), str(path.relative_to(ROOT))
        if length > LONGER.get(file, MOST_LINES):
            wrong.append(f"{path.relative_to(ROOT)} has {length} lines")
        for function in functions(tree):
            where = f"{path.relative_to(ROOT)}:{function.lineno} {function.name}"
            most = LONGER_FUNCTIONS.get((file, function.name), MOST_FUNCTION_LINES)
            if body_lines(function) > most:
                wrong.append(f"{where} has {body_lines(function)} lines")
            arguments = function.args
            names = [
                a.arg
                for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
                if a.arg not in ("self", "cls")
            ]
            if len(names) > MOST_PARAMETERS:
                wrong.append(f"{where} has {len(names)} parameters")
    assert not wrong, "\n".join(wrong)


# A rule is switched off by its code, and with the reason: after it, or in the comment above it.
_SUPPRESSED = re.compile(r"#\snoqa(?P<codes>: [A-Z0-9]+(?:, [A-Z0-9]+)*)?(?P<reason>.*)$")


@pytest.mark.parametrize("package", [*PACKAGES, "perf", "tests"])
def test_each_rule_that_is_switched_off_has_its_reason(package: str) -> None:
    wrong = []
    for path in sorted((ROOT / package).rglob("*.py")):
        above = ""
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            found = _SUPPRESSED.search(line)
            if found and not (
                found["codes"] and (found["reason"].strip(" #()") or above.startswith(("#", '"""')))
            ):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
            above = line.strip()
    assert not wrong, "\n".join(wrong)
