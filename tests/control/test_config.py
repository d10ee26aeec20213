"""The settings of the control plane: their sources, their ranges and their documentation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from control.config import Settings, load
from control.kube.backoff import BackoffRules
from control.kube.leader_election import LeaseRules
from control.kube.reflector import WatchRules
from proxy.settings.declare import fields, is_struct
from proxy.settings.reference import tables
from proxy.settings.sources import ConfigError

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "control-plane.md"


def names() -> set[str]:
    return {
        f"{section}.{name}"
        for section, _, form in fields(Settings)
        for name, _, _ in fields(form.type)
    }


def mistakes(tmp_path: Path, text: str, **environ: str) -> list[str]:
    file = tmp_path / "control.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load(file, environ, 0)
    return list(error.value.mistakes)


def test_without_a_file_and_an_environment_everything_has_a_default() -> None:
    assert load(None, {}, 0) == Settings()


def test_every_setting_is_read_somewhere() -> None:
    """A setting must have an effect: its name must be an attribute that the code
    of the control plane reads."""
    code = "".join(file.read_text() for file in (ROOT / "control").rglob("*.py"))
    unused = [name for name in names() if f".{name.partition('.')[2]}" not in code]
    assert unused == []


def test_every_setting_is_described_and_has_a_range() -> None:
    for section, _, form in fields(Settings):
        assert is_struct(form.type)
        for name, _, setting in fields(form.type):
            assert setting.meta.description, f"{section}.{name}"
            if setting.type is not str:
                assert setting.meta.ge is not None, f"{section}.{name}"
                assert setting.meta.le is not None, f"{section}.{name}"


def test_the_environment_names_the_file_and_overrides_it(tmp_path: Path) -> None:
    file = tmp_path / "control.yaml"
    file.write_text("watch: {page_size: 10, silence_timeout: 2m}\nlease: {duration: 30s}\n")
    environ = {
        "ISTHMUS_CONFIG": str(file),
        "ISTHMUS_WATCH__PAGE_SIZE": "20",
        "ISTHMUS_BACKOFF__MAX_DELAY": "1m",
        # Kubernetes sets these for a Service with the name isthmus-control.
        "ISTHMUS_CONTROL_SERVICE_HOST": "10.96.0.7",
        "ISTHMUS_CONTROL_PORT_4191_TCP_PORT": "4191",
    }
    found = load(None, environ, 0)
    assert found == Settings(
        watch=WatchRules(page_size=20, silence_timeout=120.0),
        backoff=BackoffRules(max_delay=60.0),
        lease=LeaseRules(duration=30.0),
    )


def test_all_mistakes_are_reported_with_their_setting(tmp_path: Path) -> None:
    text = "api: {max_attempts: 0, max_response_bytes: 1KiB}\nwatches: {}\n"
    found = mistakes(tmp_path, text, ISTHMUS_LEASE__DURATION="15")
    assert sorted(line.partition(":")[0] for line in found) == [
        "api.max_attempts",
        "api.max_response_bytes",
        "lease.duration",
        "watches",
    ]


@pytest.mark.parametrize(
    ("text", "setting"),
    [
        ("lease: {renew_timeout: 15s}", "lease.renew_timeout"),
        ("lease: {retry_interval: 10s}", "lease.retry_interval"),
        ("lease: {duration: 10500ms}", "lease.duration"),
        ("watch: {min_duration: 20m}", "watch.max_duration"),
        ("backoff: {min_delay: 40s}", "backoff.max_delay"),
        ("discovery: {settle_time: 1s}", "discovery.max_delay"),
    ],
)
def test_settings_that_contradict_each_other(tmp_path: Path, text: str, setting: str) -> None:
    (mistake,) = mistakes(tmp_path, text)
    assert mistake.startswith(f"{setting}: ")


def test_settings_that_errors_name_exist() -> None:
    sections = "|".join(name for name, _, _ in fields(Settings))
    named = {
        setting
        for file in (ROOT / "control").rglob("*.py")
        for setting in re.findall(rf" \((({sections})\.[a-z_]+)\)", file.read_text())
    }
    found = {setting for setting, _ in named}
    assert found <= names()
    assert {"api.request_timeout", "watch.max_objects", "watch.silence_timeout"} <= found


def reference() -> str:
    return "\n".join(tables(form.type, name) for name, _, form in fields(Settings))


def test_the_documentation_lists_all_settings() -> None:
    """To fix it: put what `reference()` returns between the two marks."""
    written = PAGE.read_text().split("<!-- settings -->\n")[1].split("<!-- /settings -->")[0]
    assert written.strip() == reference().strip()
    assert all(f"`{setting}`" in written for setting in names())
