"""List and watch: a local copy of the objects of one kind, kept up to date.

    LIST  -- complete -->  WATCH  -- 410, or another reason for a new list (below) -->  LIST
                           |   ^
                           +---+  ended by the server, connection lost, 429, 5xx:
                                  watch again from the last version

The rules:

* A fault never deletes anything. The copy keeps its last state. A new list is collected separately
  and replaces the copy when it is complete. A list that is refused (403), cut off or of the wrong
  kind is not used.
* A new list is requested as a stream (`sendInitialEvents`), which costs the server the least. If
  the server refuses that (400, 422), or ignores it and never reports that the list is complete, the
  list is requested in pages.
* A watch continues from the last version. A new list is made if that version is too old (410, as a
  status or within the stream). The same happens if versions run backwards, or if the version is
  newer than the server's state: the server was restored from a backup.
* Bookmarks come about once a minute. A connection that is silent for longer is dead. If
  the next one is silent too, the server may not know the version, and a new list is made.
* A watch from a version in the future is silent, and later misses some changes. So after a lost
  connection, the server's version is requested first.
* There is a pause between two attempts: the Retry-After of the server, plus the delay of
  backoff.py. Only a watch that ran for some time and that the server ended cleanly is restarted at
  once.

Only differences are reported: an object whose needed fields are unchanged is not reported again.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Generic, Literal, TypeVar

import trio

from control.kube import objects
from control.kube.api_errors import InvalidAnswer, KubeError, Refused, TooLarge, Unreachable
from control.kube.backoff import Backoff, BackoffRules
from control.kube.client import Client, Selection, WatchResponse
from control.kube.error_log import ErrorLog
from control.kube.resources import Key, Resource, key_of
from control.kube.watching import Bookmark, Lines, ObjectChange, event_of
from proxy.settings.declare import Section, number, octets, seconds

S = TypeVar("S", bound=objects.Object)
T = TypeVar("T")

State = Literal["listing", "watching", "waiting"]


class WatchRules(Section, frozen=True):
    """Lists and watches."""

    page_size: Annotated[int, number(1, 10_000, "objects in a page of a list")] = 500
    max_objects: Annotated[
        int,
        number(
            100,
            100_000_000,
            "maximum objects of one kind; above: the last complete list stays in use",
        ),
    ] = 500_000
    max_event_bytes: Annotated[
        int, octets(64 * 2**10, 2**30, "maximum size of one event of a watch, so of one object")
    ] = 8 * 1024 * 1024
    # Bookmarks come about once a minute.
    silence_timeout: Annotated[
        float, seconds(90, 3600, "maximum time without data; above: the watch is started again")
    ] = 150.0
    stream_timeout: Annotated[
        float,
        seconds(
            1,
            3600,
            "maximum time without a new object in a streamed list; above: the list is requested in"
            " pages",
        ),
    ] = 60.0
    list_timeout: Annotated[float, seconds(1, 3600, "maximum time for a complete list")] = 600.0
    min_duration: Annotated[
        float, seconds(10, 3600, "shortest watch that is requested (`timeoutSeconds`)")
    ] = 300.0
    max_duration: Annotated[
        float,
        seconds(
            10, 3600, "longest watch that is requested; each one is a random time from this range"
        ),
    ] = 600.0
    min_healthy: Annotated[
        float, seconds(0, 60, "a watch that the server ends sooner counts as a failure")
    ] = 5.0
    max_retry_after: Annotated[
        float, seconds(0, 3600, "maximum `Retry-After` that is obeyed; above: this time is used")
    ] = 300.0


@dataclass(slots=True)
class ReflectorCounts:
    """Counters: complete lists, started watches, events, failures, and lists that were made again
    because the last version was not usable.
    """

    lists: int = 0
    watches: int = 0
    events: int = 0
    failures: int = 0
    relists: int = 0


class _Relist(Exception):
    """The last version is not usable any more."""


class Reflector(Generic[S, T]):
    """A copy of the objects of `selection`.

    `keep` makes the stored value of each object (None: ignore the object). `on_change` is called
    for each difference, with the key and the new value (None: gone). `on_change` must not block.
    Before the first complete list nothing is reported. `synced` is set after it.
    """

    def __init__(
        self,
        client: Client,
        resource: Resource[S],
        keep: Callable[[S], T | None],
        on_change: Callable[[Key, T | None], None],
        selection: Selection | None = None,
    ) -> None:
        self.resource = resource
        self.known: dict[Key, T] = {}
        self.synced = trio.Event()
        self.state: State = "listing"
        self.counts = ReflectorCounts()
        self.error = ""  # the last error; "" if all is well
        # When lists and watches began to fail, and when they worked again after that.
        self.failing_since: float | None = None
        self.works_since = float("-inf")
        self._log = ErrorLog(f"list and watch of {resource.plural}")
        self.last_data = float("-inf")  # when data last came from the server
        self.rules = WatchRules()
        self.backoff = BackoffRules()
        self.chance = random.Random()  # noqa: S311  # it spreads load
        self._client = client
        self._keep = keep
        self._on_change = on_change
        self._selection = selection or Selection()
        self._version = ""
        self._streaming = True
        self._silent = 0  # watches in a row without any data
        self._version_unsure = False  # the server may not know our version any more
        self._page = 0

    async def run(self) -> None:
        """Keep the copy up to date, until cancelled."""
        backoff = Backoff(self.backoff, self.chance)
        self._page = self.rules.page_size
        while True:
            began = trio.current_time()
            retry_after = 0.0
            try:
                await self._once()
                if trio.current_time() - began >= self.rules.min_healthy:
                    continue
            except _Relist as relist:
                self._failed(str(relist))
                self._version = ""
                self.counts.relists += 1
            except KubeError as error:
                self._failed(str(error))
                self._version_unsure = True
                if isinstance(error, Refused):
                    retry_after = min(error.retry_after or 0.0, self.rules.max_retry_after)
                    if error.expired or error.from_the_future:
                        self._version = ""
                        self.counts.relists += 1
            self.state = "waiting"
            await trio.sleep(retry_after + backoff.failed(trio.current_time()))

    def _failed(self, why: str) -> None:
        self.counts.failures += 1
        self.error = why
        if self.failing_since is None:
            self.failing_since = trio.current_time()
        self._log.failed(why)

    def _works(self) -> None:
        self._log.works()
        self.error = ""
        if self.failing_since is not None:
            self.failing_since, self.works_since = None, trio.current_time()

    async def _once(self) -> None:
        """Run one watch, or one list and its watch. Returns when the server ends it without an
        error.
        """
        if self._version:
            if self._version_unsure:
                await self._ask_version()
            await self._watch()
            return
        self.state = "listing"
        if not self._streaming or not await self._stream_list():
            await self._paged_list()
            await self._watch()

    # Lists

    async def _paged_list(self) -> None:
        found: dict[Key, T] = {}
        version = token = ""
        with trio.move_on_after(self.rules.list_timeout) as scope:
            while True:
                query = {"limit": str(self._page)} | ({"continue": token} if token else {})
                try:
                    page = await self._client.page(
                        self.resource, self._selection, query, attempts=1
                    )
                except TooLarge:
                    if self._page == 1:
                        raise
                    self._page = max(1, self._page // 4)
                    continue
                except Refused as error:
                    # The list took too long: use larger pages, so fewer of them.
                    if token and error.expired:
                        self._page *= 2
                    raise
                self.last_data = trio.current_time()
                grown = [self._collect(found, item) for item in page.items or ()]
                version = version or page.metadata.resource_version
                token = page.metadata.continue_
                if not token:
                    break
                if not any(grown):
                    raise InvalidAnswer(
                        "a page of a list has no new object, and is not the last one"
                    )
        if scope.cancelled_caught:
            raise Unreachable(
                f"no complete list within {self.rules.list_timeout:g} s (watch.list_timeout)"
            )
        self._complete(found, version)

    async def _stream_list(self) -> bool:
        """Request the list as a stream that continues as a watch. False: the server does not
        support that.
        """
        query = {"sendInitialEvents": "true", "resourceVersionMatch": "NotOlderThan"}
        found: dict[Key, T] = {}
        limit = trio.current_time() + self.rules.list_timeout
        try:
            with trio.CancelScope(
                deadline=trio.current_time() + self.rules.stream_timeout
            ) as scope:
                await self._follow(query, found, lambda: self._extend(scope, limit))
        except Refused as error:
            if error.code not in (400, 422) or self._version:
                raise
            self._streaming = False
            return False
        if scope.cancelled_caught:  # never after the list is complete: then there is no deadline
            self._streaming = False
            return False
        return True

    def _extend(self, scope: trio.CancelScope, limit: float) -> None:
        scope.deadline = (
            float("inf")
            if self._version
            else min(limit, trio.current_time() + self.rules.stream_timeout)
        )

    def _collect(self, found: dict[Key, T], item: S) -> bool:
        """Add an object to `found`. Returns whether its key is new."""
        kept = self._keep(item)
        key = key_of(item)
        new = key not in found
        if kept is None:
            found.pop(key, None)
        else:
            found[key] = kept
        if len(found) > self.rules.max_objects:
            raise InvalidAnswer(
                f"more than {self.rules.max_objects} {self.resource.plural} (watch.max_objects)"
            )
        return new

    def _complete(self, found: dict[Key, T], version: str) -> None:
        """Replace the copy with a complete list."""
        self._check(version)
        for key in [key for key in self.known if key not in found]:
            del self.known[key]
            self._on_change(key, None)
        for key, kept in found.items():
            if self.known.get(key) != kept:
                self.known[key] = kept
                self._on_change(key, kept)
        self._version, self._version_unsure = version, False
        self.counts.lists += 1
        self._works()
        self.synced.set()

    # Watches

    async def _ask_version(self) -> None:
        page = await self._client.page(self.resource, self._selection, {"limit": "1"}, attempts=1)
        if older(page.metadata.resource_version, self._version):
            raise _Relist(
                f"the server is at {page.metadata.resource_version}, which is older than"
                f" {self._version}"
            )
        self._version_unsure = False

    async def _watch(self) -> None:
        await self._follow({"resourceVersion": self._version}, None, lambda: None)

    async def _follow(
        self, query: dict[str, str], found: dict[Key, T] | None, progress: Callable[[], None]
    ) -> None:
        """Run a watch until it ends. While `found` collects a list, no changes are reported.
        `progress` is called when the list grows or is complete.
        """
        seconds = (
            self.rules.min_duration
            + (self.rules.max_duration - self.rules.min_duration) * self.chance.random()
        )
        query |= {"allowWatchBookmarks": "true", "timeoutSeconds": str(int(seconds))}
        self.counts.watches += 1
        lines = Lines(self.rules.max_event_bytes)
        async with await self._client.watch(self.resource, self._selection, query) as answer:
            if found is None:
                self.state = "watching"
                self._works()
            while data := await self._receive(answer, listing=found is not None):
                self.last_data, self._silent = trio.current_time(), 0
                for line in lines.feed(data):
                    event = event_of(line, self.resource)
                    if found is None:
                        self._take(event)
                    elif isinstance(event, Bookmark):
                        if event.complete:
                            self._complete(found, event.version)
                            found = None
                            self.state = "watching"
                            progress()
                    elif event.gone:
                        found.pop(key_of(event.item), None)
                    elif self._collect(found, event.item):
                        progress()
        if lines.pending:
            raise Unreachable("a watch ended within a line")
        if found is not None:
            raise Unreachable("a streamed list ended before it was complete")

    async def _receive(self, answer: WatchResponse, *, listing: bool) -> bytes:
        with trio.move_on_after(self.rules.silence_timeout):
            return await answer.read()
        self._silent += 1
        if self._silent > 1 and not listing:
            self._silent = 0
            raise _Relist("two watches in a row were silent")
        raise Unreachable(f"no data for {self.rules.silence_timeout:g} s (watch.silence_timeout)")

    def _take(self, event: ObjectChange[S] | Bookmark) -> None:
        version = (
            event.version if isinstance(event, Bookmark) else event.item.metadata.resource_version
        )
        self._check(version)
        if older(version, self._version):
            raise _Relist(f"resourceVersion went backwards, from {self._version} to {version}")
        if isinstance(event, ObjectChange):
            self.counts.events += 1
            self._differ(key_of(event.item), None if event.gone else self._keep(event.item))
        self._version = version  # set last: after a failure, the change comes again

    def _differ(self, key: Key, kept: T | None) -> None:
        if self.known.get(key) == kept:
            return
        if kept is None:
            del self.known[key]
        elif len(self.known) >= self.rules.max_objects and key not in self.known:
            raise InvalidAnswer(
                f"more than {self.rules.max_objects} {self.resource.plural} (watch.max_objects)"
            )
        else:
            self.known[key] = kept
        self._on_change(key, kept)

    def _check(self, version: str) -> None:
        if not version or version == "0" or len(version) > 100:
            raise InvalidAnswer(f"{version[:100]!r} is not a usable resourceVersion")


def older(version: str, than: str) -> bool:
    """Whether one resourceVersion is older than another. False if they cannot be compared."""
    return (
        version.isascii()
        and than.isascii()
        and version.isdigit()
        and than.isdigit()
        and int(version) < int(than)
    )
