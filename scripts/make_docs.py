#!/usr/bin/env python
"""Makes the pages and parts of pages that come from the code and from the files of results.

    python scripts/make_docs.py            # writes them
    python scripts/make_docs.py --check    # changes nothing, prints differences, ends with status 1 if there are any

Whole pages: docs/options.md from the configuration and the catalogue of methods, docs/results.md from all files of
benchmarks/results/. Parts between ``<!-- NAME: ... -->`` and ``<!-- /NAME -->`` of README.md, docs/budget.md,
docs/filters.md and docs/peers.md: from the same sources; README's table is made from the files of benchmarks/results/
whose names begin with ``readme-``.
"""

import argparse
import difflib
import pathlib
import sys
from collections.abc import Mapping

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.pages import filters, options, peers, readme, results
from scripts.pages.markdown import fill_in

RESULTS = ROOT / "benchmarks" / "results"
WITH_PARTS = ("README.md", "docs/budget.md", "docs/filters.md", "docs/peers.md")


def make(folder: pathlib.Path = RESULTS) -> dict[str, str]:
    """All pages that are made, by their path below the root of the repository.

    Args:
        folder: the files of results.
    """
    files = results.read(folder)
    of_readme = [file for file in files if file.path.name.startswith("readme-")]
    parts = {
        **readme.parts(of_readme, files),
        "plots": readme.plots(folder, "benchmarks/results"),
        "filters": filters.tensors(),
        "peers": peers.peers(files),
    }
    pages = {path: fill_in((ROOT / path).read_text(encoding="utf-8"), parts) for path in WITH_PARTS}
    return {"docs/options.md": options.page(), "docs/results.md": results.page(files, "../benchmarks/results"), **pages}


def differences(pages: Mapping[str, str]) -> str:
    """A unified diff from what is in the repository to what would be made; empty if they agree."""
    found = []
    for path, text in pages.items():
        there = (ROOT / path).read_text(encoding="utf-8") if (ROOT / path).exists() else ""
        lines = (there.splitlines(keepends=True), text.splitlines(keepends=True))
        found += difflib.unified_diff(*lines, fromfile=path, tofile=f"{path}, as made")
    return "".join(found)


def main() -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, print the differences")
    arguments = parser.parse_args()
    pages = make()
    if arguments.check:
        found = differences(pages)
        sys.stdout.write(found)
        return 1 if found else 0
    for path, text in pages.items():
        (ROOT / path).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
