"""Repeated errors are logged once."""

from __future__ import annotations

import logging

import pytest

from control.kube.error_log import ErrorLog


def test_an_error_is_a_warning_once_until_it_changes_or_ends(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, "isthmus.control")
    log = ErrorLog("list and watch of pods")
    log.works()
    for error in ("403 Forbidden", "403 Forbidden", "no response", "no response"):
        log.failed(error)
    log.works()
    log.works()
    log.failed("no response")
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "list and watch of pods: 403 Forbidden"),
        ("DEBUG", "list and watch of pods: 403 Forbidden"),
        ("WARNING", "list and watch of pods: no response"),
        ("DEBUG", "list and watch of pods: no response"),
        ("INFO", "list and watch of pods: works again"),
        ("WARNING", "list and watch of pods: no response"),
    ]
