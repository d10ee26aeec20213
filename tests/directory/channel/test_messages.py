"""Frames and messages: any bytes give messages or ChannelError, never anything else."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.directory.channel.messages import (
    MOST_FROM_PROXY,
    MOST_KEY,
    MOST_KEYS,
    ChannelError,
    Current,
    Frames,
    Goodbye,
    Hello,
    Message,
    Ping,
    Refused,
    Subscribe,
    Unsubscribe,
    Update,
    Welcome,
    frame,
    from_control,
    from_proxy,
)

KEYS = st.text("abc/0123456789.:", min_size=3, max_size=20)
TEXTS = st.text(max_size=20)
FROM_PROXY = st.one_of(
    st.builds(Hello, TEXTS, TEXTS, TEXTS),
    st.builds(Subscribe, st.lists(st.tuples(KEYS, st.binary(max_size=8)), max_size=5).map(tuple)),
    st.builds(Unsubscribe, st.lists(KEYS, max_size=5).map(tuple)),
    st.just(Ping()),
)
FROM_CONTROL = st.one_of(
    st.builds(
        Welcome,
        TEXTS,
        TEXTS,
        st.lists(TEXTS, max_size=2).map(tuple),
        st.integers(0, 99),
        st.just(1.5),
    ),
    st.builds(Update, KEYS, st.binary(max_size=8), st.binary(max_size=300)),
    st.builds(Current, st.lists(KEYS, max_size=5).map(tuple)),
    st.builds(Refused, st.lists(KEYS, max_size=5).map(tuple), TEXTS),
    st.builds(Goodbye, TEXTS),
    st.just(Ping()),
)


@given(st.lists(FROM_PROXY), st.lists(FROM_CONTROL), st.integers(1, 50))
def test_what_one_end_sends_the_other_receives_in_any_pieces(
    there: list[Message], back: list[Message], size: int
) -> None:
    for messages, decode in ((there, from_proxy), (back, from_control)):
        frames, found = Frames(MOST_FROM_PROXY), []
        data = b"".join(map(frame, messages))
        for at in range(0, len(data), size):
            found += [decode(part) for part in frames.feed(data[at : at + size])]
        assert found == messages


@given(st.binary(max_size=200))
def test_garbage_is_an_error_of_the_protocol(data: bytes) -> None:
    for decode in (from_proxy, from_control):
        try:
            for part in Frames(100).feed(data):
                decode(part)
        except ChannelError:
            pass


@pytest.mark.parametrize("length", [0, 101, 2**32 - 1])
def test_a_length_outside_the_limit_is_refused_before_its_bytes_come(length: int) -> None:
    with pytest.raises(ChannelError, match=f"a message of {length} bytes; the limit is 100"):
        Frames(100).feed(length.to_bytes(4, "big"))


def test_each_end_accepts_only_messages_of_the_other() -> None:
    with pytest.raises(ChannelError):
        from_proxy(frame(Goodbye("x"))[4:])
    with pytest.raises(ChannelError):
        from_control(frame(Hello())[4:])


def test_the_largest_messages_of_a_proxy_fit_its_limit() -> None:
    keys = tuple(f"{number:0{MOST_KEY}}" for number in range(MOST_KEYS))
    for message in (Subscribe(tuple((key, b"v" * 32) for key in keys)), Unsubscribe(keys)):
        assert len(frame(message)) <= MOST_FROM_PROXY
        assert from_proxy(frame(message)[4:]) == message
    with pytest.raises(ChannelError):
        from_proxy(frame(Unsubscribe((*keys, "a/1")))[4:])


def test_a_later_version_may_add_fields() -> None:
    later = msgspec.msgpack.encode([1, "node", "zone", "pod", "new", {"more": 1}])
    assert from_proxy(later) == Hello("node", "zone", "pod")
