"""Compare the ratios of two files of results.

Usage: python -m benches.compare OLD.json NEW.json, or python -m benches.compare NEW.json to compare
with the committed results.

A ratio is the time of a peer divided by the time of the fused op in the same run. Ratios are
compared and not times, because a slow or busy machine slows down both. A ratio has regressed if it
fell by more than a quarter and the intervals of the two files do not overlap.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from .tables import key_of, load, rows_of

RESULTS = Path(__file__).resolve().parent / "results"
REGRESSION_FACTOR = 0.75


@dataclass
class Change:
    """Change of the ratio to one peer in one cell."""

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
    def regressed(self) -> bool:
        return self.factor < REGRESSION_FACTOR and self.new[2] < self.old[1]

    def __str__(self) -> str:
        return f"{self.factor:5.2f}  {self.old[0]:8.2f}x -> {self.new[0]:8.2f}x  {self.op}: {self.cell}, {self.direction}, against {self.peer}"


def compare(old: dict, new: dict) -> list[Change]:
    """Return the changes of all ratios that are in both files, the worst first."""
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
    """Return the path of the committed results of the same class of machine."""
    return RESULTS / rows_of(result)[0]["machine"] / "bench.json"


def report(old: dict, new: dict, show: int = 10) -> list[str]:
    changes = compare(old, new)
    regressions = [change for change in changes if change.regressed]
    if not changes:
        return ["the two files have no cell in common"]
    keys = {(c.op, c.cell, c.direction) for c in changes}
    missing = {key_of(row) for row in rows_of(old)} - {key_of(row) for row in rows_of(new)}
    lines = [
        f"{len(changes)} ratios of {len(keys)} cells compared; {len(missing)} cells of the older file were not measured; "
        f"ratios that fell by more than 25 %: {len(regressions)}"
    ]
    if regressions:
        lines += ["", "regressions:", *map(str, regressions)]
    return [*lines, "", "worst and best changes:", *map(str, changes[:show] if len(changes) <= 2 * show else [*changes[:show], "...", *changes[-3:]])]


def compare_files(files: list[str]) -> tuple[list[str], bool]:
    """Compare OLD and NEW, or NEW with the committed results of its class of machine.

    Returns:
        The lines of the report, and whether a ratio has regressed.

    Raises:
        ValueError: there are more than two files, or a file does not contain results.
        OSError: a file cannot be read.
    """
    if len(files) > 2:
        raise ValueError(f"--compare takes one or two files, got {len(files)}")
    new = load(files[-1])
    old_path = Path(files[0]) if len(files) == 2 else baseline_of(new)
    if len(files) == 1 and not old_path.exists():
        return [f"there are no committed results of {rows_of(new)[0]['machine']} to compare with"], False
    old = load(old_path)
    return report(old, new), any(change.regressed for change in compare(old, new))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benches.compare", description=__doc__.splitlines()[0])
    parser.add_argument(
        "files", nargs="+", metavar="FILE.json", help="OLD and NEW, or only NEW, which is compared with the committed results of its class of machine"
    )
    parser.add_argument("--fail", action="store_true", help="exit with status 1 if a ratio has regressed (default: only report it)")
    options = parser.parse_args(arguments)
    try:
        lines, regressed = compare_files(options.files)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print("\n".join(lines))
    return int(options.fail and regressed)


if __name__ == "__main__":
    sys.exit(main())
