"""The tables and plots of docs/performance.md, from the result of a run (perf/__main__.py).

python -m perf.report RESULT.json            the tables, as Markdown
python -m perf.report RESULT.json FOLDER     and the plots, as SVG, into FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perf.plot import bars
from perf.tables import costs, markdown

PLOTS = {
    "cpu-http1": (
        "CPU per request and hop, HTTP/1.1 (µs)",
        ("c1-1k", "c16-1k", "c256-1k", "c16-100", "c16-16k"),
    ),
    "cpu-http2": ("CPU per request and hop, HTTP/2 (µs)", ("h2-16x8",)),
    "cpu-bulk": ("CPU per MiB and hop (µs)", ("h2-bulk", "tcp-bulk")),
    "cpu-connections": ("CPU per new connection and hop (µs)", ("new-resumed", "new-full")),
}


def plots(document: dict[str, Any], folder: Path) -> None:
    """Write the plots of what was measured into `folder`."""
    titles = {work["name"]: work["title"] for work in document["works"]}
    for name, (title, works) in PLOTS.items():
        groups = {titles[work]: found for work in works if (found := costs(document, work))}
        if groups:
            (folder / f"{name}.svg").write_text(bars(title, groups), "utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    result, *folders = sys.argv[1:] if arguments is None else arguments
    document = json.loads(Path(result).read_text("utf-8"))
    print(markdown(document))
    for folder in folders:
        plots(document, Path(folder))


if __name__ == "__main__":
    main()
