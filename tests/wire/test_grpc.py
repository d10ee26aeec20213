"""gRPC deadlines and statuses: what is valid, and what is written for any number of seconds."""

from __future__ import annotations

import pytest

from proxy.wire.grpc import parse_timeout, status, write_timeout
from proxy.wire.messages import Headers


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (b"2H", 7200.0),
        (b"3M", 180.0),
        (b"5S", 5.0),
        (b"250m", 0.25),
        (b"7u", 7e-6),
        (b"9n", 9e-9),
        (b"99999999S", 99999999.0),
        (b"0S", 0.0),
        (b"100000000S", None),
        (b"5", None),
        (b"S", None),
        (b"-1S", None),
        (b"1.5S", None),
        (b"5s", None),
        (b"", None),
    ],
)
def test_a_timeout_is_a_number_of_eight_digits_and_a_unit(
    value: bytes, seconds: float | None
) -> None:
    assert parse_timeout(value) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("seconds", "value"),
    [
        (1.5, b"1500000u"),
        (99.999999, b"99999999u"),
        (100.0, b"100000m"),
        (100_000.0, b"100000S"),
        (1e12, b"99999999S"),
        (0.0, b"0u"),
        (-3.0, b"0u"),
    ],
)
def test_a_timeout_is_written_in_the_finest_unit_that_fits(seconds: float, value: bytes) -> None:
    assert write_timeout(seconds) == value


@pytest.mark.parametrize(
    ("head", "trailers", "code"),
    [
        ([], [(b"grpc-status", b"0")], 0),
        ([(b"grpc-status", b"14")], [], 14),
        ([(b"grpc-status", b"14")], [(b"grpc-status", b"5")], 5),
        ([], [], None),
        ([], [(b"grpc-status", b"x")], None),
        ([], [(b"grpc-status", b"1000")], None),
    ],
)
def test_a_status_is_in_the_trailers_or_in_the_head_of_a_response_without_a_body(
    head: list[tuple[bytes, bytes]], trailers: list[tuple[bytes, bytes]], code: int | None
) -> None:
    assert status(Headers(head), Headers(trailers)) == code
