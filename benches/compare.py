"""Compares two files of results by their ratios: python -m benches.compare OLD.json NEW.json, or python -m benches.compare NEW.json for the baseline.

What is compared is not a time but the ratio of a peer's time to the fused op's, both from one run: a slower machine, or a busy one, slows both. A
cell is lost where the ratio to some peer fell by more than a quarter, and by more than the intervals of both files explain.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from .tables import key_of, load, rows_of

RESULTS = Path(__file__).resolve().parent / "results"
LOST = 0.75


@dataclass
class Change:
    """Of the ratio to one peer in one cell."""

    op: str
    cell: str
    direction: str
    peer: str
    old: tuple[float, float, float]  # median, low, high
    new: tuple[float, float, float]

    @property
    def factor(self) -> float:
        return self.new[0] / self.old[0]

    @property
    def lost(self) -> bool:
        return self.factor < LOST and self.new[2] < self.old[1]

    def __str__(self) -> str:
        return f"{self.factor:5.2f}  {self.old[0]:8.2f}x -> {self.new[0]:8.2f}x  {self.op}: {self.cell}, {self.direction}, against {self.peer}"


def compare(old: dict, new: dict) -> list[Change]:
    """Changes of all ratios that both files have, the worst first."""
    before = {key_of(row): row for row in rows_of(old)}
    changes = []
    for row in rows_of(new):
        key = key_of(row)
        for peer, ratio in row["ratios"].items():
            earlier = before.get(key, {}).get("ratios", {}).get(peer)
            if earlier is not None:
                changes.append(Change(*key, peer, tuple(earlier), tuple(ratio)))
    return sorted(changes, key=lambda change: change.factor)


def baseline_of(result: dict) -> Path:
    """The committed results of the same class of machine."""
    return RESULTS / rows_of(result)[0]["machine"] / "bench.json"


def report(old: dict, new: dict, show: int = 10) -> list[str]:
    changes = compare(old, new)
    lost = [change for change in changes if change.lost]
    if not changes:
        return ["no cell is in both files"]
    keys = {(c.op, c.cell, c.direction) for c in changes}
    gone = {key_of(row) for row in rows_of(old)} - {key_of(row) for row in rows_of(new)}
    lines = [
        f"{len(changes)} ratios of {len(keys)} cells compared; {len(gone)} cells of the older file were not measured; "
        f"lost more than 25 %: {len(lost)}"
    ]
    if lost:
        lines += ["", "lost:", *map(str, lost)]
    return [*lines, "", "least and most:", *map(str, changes[:show] if len(changes) <= 2 * show else [*changes[:show], "...", *changes[-3:]])]


def compare_files(files: list[str]) -> tuple[list[str], bool]:
    """Compares OLD and NEW, or NEW alone with the committed results of its class of machine.

    Returns:
        The lines of the report, and whether a cell was lost.

    Raises:
        ValueError: more than two files, or one that holds no results.
        OSError: a file cannot be read.
    """
    if len(files) > 2:
        raise ValueError(f"--compare takes one or two files, got {len(files)}")
    new = load(files[-1])
    old_path = Path(files[0]) if len(files) == 2 else baseline_of(new)
    if len(files) == 1 and not old_path.exists():
        return [f"no committed results of {rows_of(new)[0]['machine']}: nothing to compare with"], False
    old = load(old_path)
    return report(old, new), any(change.lost for change in compare(old, new))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benches.compare", description=__doc__.splitlines()[0])
    parser.add_argument(
        "files", nargs="+", metavar="FILE.json", help="OLD and NEW; NEW alone is compared with the committed results of its class of machine"
    )
    parser.add_argument("--fail", action="store_true", help="exit with 1 where a cell was lost; without it that is only reported")
    options = parser.parse_args(arguments)
    try:
        lines, lost = compare_files(options.files)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print("\n".join(lines))
    return int(options.fail and lost)


if __name__ == "__main__":
    sys.exit(main())
