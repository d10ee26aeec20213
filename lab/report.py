"""The output of the demonstration: progress, and finally a table of what was proven.

Plain text, at most WIDTH columns. Colours only on a terminal; marks in ASCII where the encoding has
no others.
"""

import os
import statistics
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TextIO

WIDTH = 100
_LABEL = 22  # columns


@dataclass(frozen=True, slots=True)
class Proof:
    """One proof: what was tried, the result, and whether it held."""

    section: str
    label: str
    detail: str
    held: bool


@dataclass(slots=True)
class Report:
    """Collects proofs; prints to `out`."""

    out: TextIO = field(default_factory=lambda: sys.stdout)
    proofs: list[Proof] = field(default_factory=list)
    trouble: list[str] = field(default_factory=list)
    shown: list[tuple[str, str]] = field(default_factory=list)  # section, line
    section: str = ""
    began: float = field(default_factory=time.monotonic)

    @property
    def held(self) -> bool:
        """Whether there were proofs, and all of them held."""
        return bool(self.proofs) and all(proof.held for proof in self.proofs) and not self.trouble

    def step(self, text: str) -> None:
        """Print a line of progress."""
        self.say(f"{time.monotonic() - self.began:5.1f} s  {text}")

    def say(self, text: str = "") -> None:
        """Print a line unchanged."""
        print(text, file=self.out, flush=True)

    def prove(self, label: str, detail: str, held: bool) -> None:
        """Record a proof in the current section. A failure is printed at once."""
        self.proofs.append(Proof(self.section, label, " ".join(detail.split()), held))
        if not held:
            self.say(f"         {self._mark(False)} {label}: {detail}"[: WIDTH * 4])

    def show(self, lines: Sequence[str]) -> None:
        """Lines to show below the proofs of the current section."""
        self.shown += [(self.section, line) for line in lines]

    def broke(self, text: str) -> None:
        """Report an error of the lab itself."""
        self.trouble.append(text)
        self.say(f"\nisthmus demo: {text}")

    def finish(self, seconds: float) -> None:
        """Print the table and the verdict."""
        self.say()
        for section in dict.fromkeys(proof.section for proof in self.proofs):
            self.say(self._colour("1", f"{section} {'-' * (WIDTH - len(section) - 1)}"))
            for proof in (each for each in self.proofs if each.section == section):
                self._row(proof)
            for line in (text for where, text in self.shown if where == section):
                self.say(f"      {line}"[:WIDTH])
            self.say()
        held = sum(proof.held for proof in self.proofs)
        verdict = "All proofs held" if self.held else "NOT all proofs held"
        self.say(
            self._colour(
                "1;32" if self.held else "1;31",
                f"{verdict}: {held} of {len(self.proofs)}, in {seconds:.1f} s.",
            )
        )

    def _row(self, proof: Proof) -> None:
        mark = self._mark(proof.held)
        indent = " " * (len(self._plain_mark(proof.held)) + _LABEL + 3)
        lines = textwrap.wrap(proof.detail, WIDTH - len(indent), break_on_hyphens=False) or [""]
        self.say(f" {mark} {proof.label:<{_LABEL}} {lines[0]}")
        for line in lines[1:]:
            self.say(indent + line)

    def _mark(self, held: bool) -> str:
        return self._colour("32" if held else "1;31", self._plain_mark(held))

    def _plain_mark(self, held: bool) -> str:
        return "ok  " if held else "FAIL"

    def _colour(self, code: str, text: str) -> str:
        wanted = (
            self.out.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        )
        return f"\x1b[{code}m{text}\x1b[0m" if wanted else text


def megabytes(count: float) -> str:
    """Bytes in MiB."""
    return f"{count / 2**20:.1f}"


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` of the sorted values lie."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def latency_line(meshed: Sequence[float], plain: Sequence[float]) -> str:
    """Both sides' p50 and p99 from sorted microseconds."""
    sides = [
        (statistics.median(side) / 1000, percentile(side, 0.99) / 1000) for side in (meshed, plain)
    ]
    (p50, p99), (plain50, plain99) = sides
    through, past = (
        f"p50 {p50:.2f} ms, p99 {p99:.2f} ms through both sidecars",
        f"{plain50:.2f} and {plain99:.2f} ms without them",
    )
    return f"{through}; {past} ({len(meshed)} requests each)"
