"""The stages of the demo, and their results: saved to disk and printed as a table."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from ..files import replaced_atomically


@dataclass(frozen=True)
class Stage:
    """A training run of the demo: its name, its title in the report, and its number of epochs."""

    name: str
    title: str
    epochs: int


TEACHER = Stage("teacher", "teacher", 8)
ALONE = Stage("student_alone", "student alone", 6)
DISTILLED = Stage("student_distilled", "student distilled", 6)
STAGES = (TEACHER, ALONE, DISTILLED)
TEACHER_WIDTH, STUDENT_WIDTH = 32, 8


class Results:
    """The results of the finished stages, saved to disk after each stage."""

    def __init__(self, path: Path, settings: dict, restart: bool):
        self.path = path
        self.values: dict = {"settings": settings, "stages": {}}
        stored = json.loads(path.read_text()) if path.exists() else {}
        if stored.get("settings") == settings and not restart:
            self.values = stored
        else:  # delete the checkpoints of a run with other settings: they must not be resumed
            for checkpoint in (c for stage in STAGES for c in path.parent.glob(f"{stage.name}_*/last.ckpt")):
                checkpoint.unlink()
        self.save()

    def missing(self, stage: Stage, seed: int) -> bool:
        return f"{stage.name}/{seed}" not in self.values["stages"]

    def add(self, stage: Stage, seed: int, outcome: dict) -> None:
        self.values["stages"][f"{stage.name}/{seed}"] = outcome
        self.save()

    def save(self) -> None:
        with replaced_atomically(self.path) as temporary:
            temporary.write_text(json.dumps(self.values, indent=1))


def summary(results: dict, seeds: int) -> list[tuple[str, list[float]]]:
    """Return the title and the test accuracies in percent, one for each seed, of each stage."""
    return [(s.title, [100 * results["stages"][f"{s.name}/{seed}"]["accuracy"] for seed in range(seeds)]) for s in STAGES]


def mean_and_spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f}" + (f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def table(results: dict, seeds: int) -> str:
    lines = [f"{'test accuracy, %':<22}{'mean +- std':>16}   by seed"]
    for title, values in summary(results, seeds):
        lines.append(f"{title:<22}{mean_and_spread(values):>16}   {'  '.join(f'{v:.2f}' for v in values)}")
    lines += ["", f"{'loss, forward + backward':<28}{'fused':>10}{'reference':>22}{'torch.compile':>22}"]
    for name, row in results["bench"].items():
        cells = [f"{row['milliseconds']['fused']:.3f} ms"]
        for other in ("reference", "compiled"):
            cells.append(f"{row['milliseconds'][other]:.3f} ms ({row['ratios'][other]:.1f}x)" if other in row["ratios"] else "-")
        lines.append(f"{name:<28}{cells[0]:>10}{cells[1]:>22}{cells[2]:>22}")
    return "\n".join(lines)
