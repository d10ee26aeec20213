"""What one proxy follows, and what it has to be sent: a state machine without I/O.

Nothing is queued for a proxy but the fact that a topic may have changed. Its content is looked up
when the connection can be written, so a slow reader gets the newest one, and costs no memory.
"""

from __future__ import annotations

from control.channel.views import Topic, Views
from control.discovery.usable_endpoints import Place
from proxy.directory.channel.messages import (
    MOST_KEYS,
    ChannelError,
    Current,
    FromProxy,
    Hello,
    Ping,
    Refused,
    Subscribe,
    Unavailable,
    Unsubscribe,
    frame,
)


class _Followed:
    """A topic that the proxy follows. `version`: what the proxy has. `needs_reply`: it waits for an
    answer, even if nothing has changed."""

    __slots__ = ("needs_reply", "topic", "version")

    def __init__(self, topic: Topic) -> None:
        self.topic = topic
        self.version = b""
        self.needs_reply = True


class Session:
    """One proxy. `most`: how many topics it may follow. `most_bytes`: the longest frame that it
    gets. `on_stale` is called when there is something to send; it must not block."""

    def __init__(self, views: Views, most: int, most_bytes: int) -> None:
        self.place = Place()
        self.hello: Hello | None = None
        self.updates = 0
        self.on_stale = _nothing
        self._views = views
        self._most = most
        self._most_bytes = most_bytes
        self._followed: dict[str, _Followed] = {}
        self._stale: dict[str, None] = {}
        self._refused: dict[str, list[str]] = {}  # keys by reason

    def __len__(self) -> int:
        return len(self._followed)

    def stale(self, topic: Topic) -> None:
        """See views.Follower."""
        self._stale[topic.key] = None
        self.on_stale()

    def received(self, message: FromProxy) -> None:
        """Apply a message. Raises ChannelError."""
        if isinstance(message, Hello):
            if self.hello is not None:
                raise ChannelError("a second Hello")
            self.hello = message
        elif self.hello is None:
            raise ChannelError(f"{type(message).__name__} before Hello")
        elif isinstance(message, Subscribe):
            for key, version in message.entries:
                self._subscribe(key, version)
            self.on_stale()
        elif isinstance(message, Unsubscribe):
            for key in message.keys:
                self._unsubscribe(key)
        elif not isinstance(message, Ping):
            raise ChannelError(f"{type(message).__name__} from a proxy")

    def _subscribe(self, key: str, version: bytes) -> None:
        followed = self._followed.get(key)
        if followed is None:
            if len(self._followed) >= self._most:
                self._refuse(key, f"more than {self._most} entries (channel.max_subscriptions)")
                return
            try:
                followed = self._followed[key] = _Followed(self._views.follow(key, self))
            except ValueError as error:
                raise ChannelError(str(error)) from None
        followed.version = version
        followed.needs_reply = True
        self._stale[key] = None

    def _unsubscribe(self, key: str) -> None:
        followed = self._followed.pop(key, None)
        if followed is not None:
            self._stale.pop(key, None)
            self._views.unfollow(followed.topic, self)

    def _refuse(self, key: str, reason: str) -> None:
        """Raises ChannelError if the proxy asks on and does not read the refusals."""
        if sum(map(len, self._refused.values())) >= self._most:
            raise ChannelError(f"more than {self._most} refusals wait")
        self._refused.setdefault(reason, []).append(key)

    def close(self) -> None:
        """Follow nothing any more."""
        for key in list(self._followed):
            self._unsubscribe(key)

    def take(self, least: int) -> bytes:
        """Frames to send now: at least `least` bytes, if there are so many. b"": nothing."""
        parts: list[bytes] = []
        size = 0
        current: list[str] = []
        unavailable: list[str] = []
        while self._stale and size < least:
            key = next(iter(self._stale))
            del self._stale[key]
            followed = self._followed[key]
            before = self._views.computed
            variant = self._views.variant(followed.topic, self.place)
            if self._views.is_settling(followed.topic, variant):
                continue
            if self._views.withholds(followed.topic, variant):
                if followed.needs_reply:
                    followed.needs_reply = False
                    unavailable.append(key)
                    size += len(key)
                continue
            needs_reply, followed.needs_reply = followed.needs_reply, False
            if variant.version == followed.version:
                if needs_reply:
                    current.append(key)
                    # What was computed counts, although it is not sent: other tasks have to run.
                    size += len(variant.frame) if self._views.computed != before else len(key)
            elif len(variant.frame) > self._most_bytes:
                self._unsubscribe(key)
                self._refuse(
                    key, f"longer than {self._most_bytes} bytes (channel.max_message_bytes)"
                )
            else:
                followed.version = variant.version
                self.updates += 1
                parts.append(variant.frame)
                size += len(variant.frame)
        parts += (frame(Current(keys)) for keys in _parts(current))
        parts += (frame(Unavailable(keys)) for keys in _parts(unavailable))
        for reason, refused in self._refused.items():
            parts += (frame(Refused(keys, reason)) for keys in _parts(refused))
        self._refused.clear()
        return b"".join(parts)


def _parts(keys: list[str]) -> list[tuple[str, ...]]:
    return [tuple(keys[at : at + MOST_KEYS]) for at in range(0, len(keys), MOST_KEYS)]


def _nothing() -> None:
    pass
