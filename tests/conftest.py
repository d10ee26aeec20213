"""Hooks for all tests: in CI, a test that needs namespaces or a real peer may not be skipped."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
from hypothesis import HealthCheck, is_hypothesis_test, settings

from tests.kit.build import COMPILED
from tests.kit.library import AWS_LC

# Tests that several files share.
pytest.register_assert_rewrite("tests.control.rules")

# The duration of an example depends on the load of the machine, not on the code.
settings.register_profile("isthmus", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("isthmus")


# The modules that take longest, of each run of `make test`. They start first: a process that
# started one of them last would run alone for minutes.
LONG = (
    "both_paths/test_h2_plays.py",
    "both_paths/test_plays.py",
    "e2e/test_grpc_faults.py",
    "e2e/test_rolling.py",
    "e2e/test_size.py",
    "exchange/h2/test_real.py",
    "exchange/h2/test_soak.py",
    "exchange/test_deadlines.py",
    "flows/test_admission.py",
    "flows/test_floods.py",
    "flows/test_uploads.py",
    "lab/test_demo.py",
    "wire/h2/test_hpack.py",
    "workers/test_workers.py",
)


def pytest_itemcollected(item: pytest.Item) -> None:
    # Coverage does not count what random examples reach: it would differ from run to run. And the
    # tracer would cost most here.
    if is_hypothesis_test(getattr(item, "obj", None)):
        item.add_marker("no_cover")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the long modules first. Otherwise the random order stays."""
    items.sort(key=lambda item: not item.nodeid.partition("::")[0].endswith(LONG))


def pytest_configure() -> None:
    if os.environ.get("ISTHMUS_TEST_COMPILED") and not COMPILED:
        pytest.exit("what was found is not compiled", 1)
    if os.environ.get("ISTHMUS_TEST_AWS_LC") and not AWS_LC:
        pytest.exit("what was found is not on AWS-LC", 1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and os.environ.get("CI"):
        marked = [name for name in ("lab", "real") if item.get_closest_marker(name)]
        if marked:
            report.outcome = "failed"
            report.longrepr = (
                f"skipped in CI, where it has to run ({', '.join(marked)}): {report.longrepr}"
            )
    return report
