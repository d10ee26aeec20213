"""The output of the demonstration: progress, and finally a table of what was proven.

rich prints it (lab/console.py). On a terminal, it shows the running step, and colours. Everywhere
else, the output is plain text of at most WIDTH columns.
"""

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TextIO

from rich.console import Console
from rich.padding import Padding
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from lab.console import WIDTH, console, put

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
    """Collects proofs; prints to `out`. Call `close` in the end."""

    out: TextIO = field(default_factory=lambda: sys.stdout)
    proofs: list[Proof] = field(default_factory=list)
    trouble: list[str] = field(default_factory=list)
    shown: list[tuple[str, str]] = field(default_factory=list)  # section, line
    section: str = ""
    began: float = field(default_factory=time.monotonic)
    _console: Console = field(init=False)
    _progress: Progress | None = None  # on a terminal, while steps run

    def __post_init__(self) -> None:
        self._console = console(self.out)

    @property
    def held(self) -> bool:
        """Whether there were proofs, and all of them held."""
        return bool(self.proofs) and all(proof.held for proof in self.proofs) and not self.trouble

    def step(self, text: str) -> None:
        """A step begins, and the one before has ended."""
        if not self._console.is_interactive:
            self.say(f"{time.monotonic() - self.began:5.1f} s  {text}")
            return
        if self._progress is None:
            self._progress = Progress(
                SpinnerColumn(finished_text="\N{CHECK MARK}"),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                console=self._console,
            )
            self._progress.start()
        self._end_step(self._progress)
        self._progress.add_task(text, total=1)

    @staticmethod
    def _end_step(progress: Progress) -> None:
        for task in progress.tasks:
            progress.update(task.id, completed=1)

    def close(self) -> None:
        """Stop the display of the running step. A second call has no effect."""
        progress, self._progress = self._progress, None
        if progress is not None:
            progress.stop()

    def say(self, text: str = "") -> None:
        """Print a line unchanged."""
        put(self._console, text)

    def prove(self, label: str, detail: str, held: bool) -> None:
        """Record a proof in the current section. A failure is printed at once."""
        self.proofs.append(Proof(self.section, label, " ".join(detail.split()), held))
        if not held:
            line = Text.assemble("         ", _mark(held), f" {label}: {detail}")
            line.truncate(WIDTH * 4)
            put(self._console, line)

    def show(self, lines: Sequence[str]) -> None:
        """Lines to show below the proofs of the current section."""
        self.shown += [(self.section, line) for line in lines]

    def broke(self, text: str) -> None:
        """Report an error of the lab itself."""
        self.close()
        self.trouble.append(text)
        self.say(f"\nisthmus demo: {text}")

    def finish(self, seconds: float) -> None:
        """Print the table and the verdict."""
        if self._progress is not None:
            self._end_step(self._progress)
        self.close()
        self.say()
        for section in dict.fromkeys(proof.section for proof in self.proofs):
            put(
                self._console,
                Rule(Text(section, "bold"), characters="-", align="left", style="bold"),
            )
            put(self._console, self._table(section))
            for line in (text for where, text in self.shown if where == section):
                self.say(f"      {line}"[:WIDTH])
            self.say()
        held = sum(proof.held for proof in self.proofs)
        verdict = "All proofs held" if self.held else "NOT all proofs held"
        put(
            self._console,
            Text(
                f"{verdict}: {held} of {len(self.proofs)}, in {seconds:.1f} s.",
                "bold green" if self.held else "bold red",
            ),
        )

    def _table(self, section: str) -> Padding:
        table = Table.grid(padding=(0, 1, 0, 0))
        table.add_column(width=len(_mark(True)))
        table.add_column(width=_LABEL)
        table.add_column()
        for proof in self.proofs:
            if proof.section == section:
                table.add_row(_mark(proof.held), Text(proof.label), Text(proof.detail))
        return Padding(table, (0, 0, 0, 1))


def _mark(held: bool) -> Text:
    return Text("ok  ", "green") if held else Text("FAIL", "bold red")


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
