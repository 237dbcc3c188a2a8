"""``kdkernels compare``: train several methods on the same data and seeds, and compare them.

A row is the name of a method, with arguments if they are not the defaults: kd, at:beta=10,
svd_kd:loss=mean:extra=3. The weight of a method that is not given is chosen from a small grid: by
the validation accuracy after the last epoch, with seeds that are not used afterwards. All students
are trained for the same number of epochs, on the same images, with the same optimizer. The methods
are compared with the student alone over the same seeds. Writes report.html and comparison.json. A
comparison that was stopped continues where it was; more methods and seeds can be added to it.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from ..config import build_info
from ..files import replaced_atomically
from ..models import load_weights
from ..tasks import find_logits
from .arguments import Parser, make_folder
from .compare_report import write_report
from .comparison.cost import step_cost
from .comparison.methods import BASELINE, METHODS, Row, parse_rows
from .comparison.networks import layers_of, network_from
from .comparison.pool import Job, Pool, in_new_process, pool_of, processes_of
from .comparison.runs import EMBEDDED, TEACHER, Settings, build, data_of, run_path, stored_run, student_data, train_student, train_teacher
from .comparison.summary import choose, table

SETTINGS = "settings.json"
FIRST_TUNING_SEED = 10_000


@dataclass(frozen=True)
class Plan:
    """What is compared, beyond the settings that all trainings have in common."""

    rows: list[Row]
    seeds: list[int]
    tuning_seeds: list[int]
    baseline: str
    keep: bool = False
    cost: bool = True


def main(arguments: list[str]) -> int:
    parser = Parser("compare", __doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--methods", default="kd,at,fsp,svd_kd", help="rows, separated by commas; all: each method once; known: " + ", ".join(METHODS))
    add("--out", type=Path, default=Path("runs/compare"), help="folder for results and report.html (default: %(default)s)")
    add("--data", default=EMBEDDED, help="clutter_digits, which are generated, or a folder of images with a folder per class (default: %(default)s)")
    add("--size", type=int, default=32, help="side in pixels to which images of a folder are resized (default: %(default)s)")
    add("--labelled", help="training images of the students, drawn for each seed; the teacher has all (default: all; 1000 for clutter_digits)")
    add("--val_fraction", type=float, help="fraction of a folder's training images for validation, if it has no folder val (default: 0.2)")
    add("--on_error", choices=("fail", "skip"), default="fail", help="what to do with unreadable files of a folder (default: %(default)s)")
    add("--epochs", type=int, help="epochs of each student (default: 24)")
    add("--teacher_epochs", type=int, help="epochs of the teachers (default: as --epochs; 8 for clutter_digits)")
    add("--batch_size", type=int, default=128, help="images per step (default: %(default)s)")
    add("--learning_rate", type=float, default=0.1, help="of SGD with Nesterov momentum 0.9, warm-up and cosine decay (default: %(default)s)")
    add("--augment", action="store_true", help="random crops and, for a folder, flips")
    add("--student", default="TinyCNN:width=8", help="network of kdkernels.models or import path (default: %(default)s)")
    add("--teacher", default="TinyCNN:width=8:depth=3", help="the same for the teacher (default: %(default)s)")
    add("--teacher_weights", help="file with the teacher's weights; by default a teacher is trained for each seed")
    add("--layers", default="", help="layers that methods compare, separated by commas (default: those of the network's family)")
    add("--teacher_layers", default="", help="the same for the teacher (default: as --layers)")
    add("--seeds", type=int, help="number of repetitions (default: 5)")
    add("--first_seed", type=int, default=0, help="the seeds are this one and those that follow (default: %(default)s)")
    add("--tuning_seeds", type=int, help="number of repetitions for the choice of weights (default: 2)")
    add("--baseline", default=BASELINE, help="row that the others are compared with (default: %(default)s, the student alone)")
    add("--jobs", type=int, help="trainings at the same time, a process each (default: one per core; 1 with a GPU)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device of the trainings (default: a GPU, if there is one)")
    add("--keep", action="store_true", help="keep the weights of all students, as seed_N.pt")
    add("--no_cost", action="store_true", help="do not measure time and memory of a step")
    add("--quick", action="store_true", help="few images and one weight, by default one epoch and one seed, as a test; the numbers mean nothing")
    options = parser.parse_args(arguments)
    try:
        plan, settings = plan_of(options), settings_of(options)
    except ValueError as error:
        parser.error(str(error))
    jobs = jobs_of(parser, options)
    make_folder(parser, options.out)
    with only_one(options.out), pool_of(jobs) as pool:
        try:
            comparison = compare(settings, plan, options.out, pool)
        except (KeyboardInterrupt, SystemExit):
            print(f"\nInterrupted. The finished trainings are in {options.out}; continue with: kdkernels compare {' '.join(arguments)}")
            return 130
    print("\n" + text_table(comparison))
    print(f"\nReport: {write_report(options.out / 'report.html', comparison)}")
    return 0


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold a lock on the folder, so that no second comparison writes to it at the same time.

    The system frees the lock when the process ends, however it ends.

    Raises:
        ValueError: another process holds it.
    """
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"--out: another comparison is running in {os.fspath(folder)!r}: wait for it, or give another folder") from error
        yield


def jobs_of(parser: Parser, options: argparse.Namespace) -> int:
    """Return the number of processes; check ``--jobs`` and ``--device``."""
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU on this machine; use --device cpu")
    if options.jobs is None:
        return processes_of(torch.cuda.device_count() if options.device != "cpu" else 0)
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    return options.jobs


def plan_of(options: argparse.Namespace) -> Plan:
    """Return what is compared.

    Raises:
        ValueError: an option is wrong.
    """
    try:
        rows = parse_rows(options.methods)
    except ValueError as error:
        raise ValueError(f"--methods: {error}") from error
    try:
        baseline_row = Row.parse(options.baseline)
    except ValueError as error:
        raise ValueError(f"--baseline: {error}") from error
    rows = rows if baseline_row in rows else [*rows, baseline_row]
    for name, (value, quick) in {"seeds": (5, 1), "tuning_seeds": (2, 1)}.items():
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else value)
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(options, name)}")
    if not 0 <= options.first_seed < FIRST_TUNING_SEED - options.seeds:
        raise ValueError(f"--first_seed must be at least 0 and below {FIRST_TUNING_SEED - options.seeds}, got {options.first_seed}")
    baseline = str(baseline_row)
    if options.quick:
        rows = [row.grid[len(row.grid) // 2] for row in rows]
        baseline = str(baseline_row.grid[len(baseline_row.grid) // 2])
    seeds = list(range(options.first_seed, options.first_seed + options.seeds))
    tuning_seeds = list(range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + options.tuning_seeds))
    return Plan(rows, seeds, tuning_seeds, baseline, options.keep, not options.no_cost)


def settings_of(options: argparse.Namespace) -> Settings:
    """Return the settings that all trainings have in common.

    Raises:
        ValueError: an option is wrong.
    """
    embedded = options.data == EMBEDDED
    labelled: int | None = 1000 if embedded and not options.quick else None
    if options.labelled is not None:
        if options.labelled != "all" and not options.labelled.isdecimal():
            raise ValueError(f"--labelled must be a number of images or 'all', got {options.labelled!r}")
        labelled = None if options.labelled == "all" else int(options.labelled)
    if labelled is not None and labelled < 2:
        raise ValueError(f"--labelled must be at least 2, got {labelled}")
    epochs = options.epochs if options.epochs is not None else 1 if options.quick else 24
    teacher_epochs = options.teacher_epochs
    if teacher_epochs is None:
        teacher_epochs = 8 if embedded and not options.quick else epochs
    if options.val_fraction is not None and not 0 < options.val_fraction < 1:
        raise ValueError(f"--val_fraction must lie in (0, 1), got {options.val_fraction}")
    for name, value in (("epochs", epochs), ("teacher_epochs", teacher_epochs), ("batch_size", options.batch_size), ("size", options.size)):
        if value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    if not 0 < options.learning_rate < math.inf:
        raise ValueError(f"--learning_rate must be finite and > 0, got {options.learning_rate}")
    if not embedded and not Path(options.data).is_dir():
        raise ValueError(f"--data must be {EMBEDDED} or a folder of images, got {options.data!r}")
    return Settings(
        data=options.data if embedded else os.path.abspath(options.data),
        size=options.size,
        labelled=labelled,
        epochs=epochs,
        teacher_epochs=teacher_epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        augment=options.augment,
        student=options.student,
        teacher=options.teacher,
        teacher_weights=options.teacher_weights,
        layers=tuple(name for name in options.layers.split(",") if name),
        teacher_layers=tuple(name for name in options.teacher_layers.split(",") if name),
        quick=options.quick,
        device=options.device,
        val_fraction=options.val_fraction,
        on_error=options.on_error,
    )


def compare(settings: Settings, plan: Plan, folder: Path, pool: Pool) -> dict[str, Any]:
    """Train all that is missing, store the comparison in ``comparison.json``, and return it."""
    data = data_of(settings)
    images = len(data.splits["train"])  # type: ignore[arg-type]
    if settings.labelled is not None and settings.labelled > images:
        raise ValueError(f"--labelled: there are {images} training images, got {settings.labelled}")
    check_networks_and_rows(settings, plan.rows)
    check_settings(settings, folder, data.fingerprint("train"))
    tuned = [row for row in plan.rows if len(row.grid) > 1]
    tuning_seeds = plan.tuning_seeds if tuned else []
    teacher_seeds = [*tuning_seeds, *plan.seeds]
    _train_teachers(settings, folder, teacher_seeds, pool)

    candidates = {str(row): [str(candidate) for candidate in row.grid] for row in tuned}
    names = [name for group in candidates.values() for name in group]
    if names:
        print(f"\nChoosing the weights of {len(tuned)} methods: {len(names)} candidates, {len(tuning_seeds)} seeds", flush=True)
    _train_students(settings, folder, names, tuning_seeds, pool, False)
    tuning = {
        name: {candidate: [_finished(folder, candidate, seed) for seed in tuning_seeds] for candidate in group} for name, group in candidates.items()
    }
    chosen = {str(row): choose(tuning[str(row)]) if str(row) in tuning else str(row) for row in plan.rows}

    final = [name for name in chosen.values() if name is not None]
    print(f"\nComparing {len(final)} rows over {len(plan.seeds)} seeds", flush=True)
    _train_students(settings, folder, final, plan.seeds, pool, plan.keep)
    if plan.keep:
        without = [name for name in final for seed in plan.seeds if not run_path(folder, name, seed).with_suffix(".pt").exists()]
        if without:
            print(f"--keep: {len(without)} trainings that had finished before have no weights: {', '.join(dict.fromkeys(without))}", flush=True)
    results: dict[str, dict[str, Any]] = {
        name: {"chosen": form, "runs": {} if form is None else {seed: _finished(folder, form, seed) for seed in plan.seeds}}
        for name, form in chosen.items()
    }
    measured = [name for name in final if all("error" not in _finished(folder, name, seed) for seed in plan.seeds)]
    costs = _costs(settings, folder, measured, plan.seeds[0]) if plan.cost else {}
    info = build_info()
    comparison = {
        "settings": settings.values() | {"training_images": images, "classes": list(data.classes) if data.classes else None},
        "seeds": plan.seeds,
        "tuning_seeds": tuning_seeds,
        "baseline": plan.baseline,
        "processes": pool.processes,
        "versions": {"kdkernels": info["version"], "torch": info["torch"]},
        "teacher": [_finished(folder, TEACHER, seed) for seed in plan.seeds],
        "table": table(plan.rows, results, plan.seeds, plan.baseline),
        "tuning": {
            name: {candidate: [run.get("validation", [None])[-1] for run in runs] for candidate, runs in group.items()}
            for name, group in tuning.items()
        },
        "runs": {name: list(found["runs"].values()) for name, found in results.items()},
        "cost": {name: costs[form] for name, form in chosen.items() if form in costs},
    }
    with replaced_atomically(folder / "comparison.json") as temporary:
        temporary.write_text(json.dumps(comparison, indent=1) + "\n")
    return comparison


def check_settings(settings: Settings, folder: Path, fingerprint: str) -> None:
    """Raise ValueError if the trainings in the folder have other settings; else store these."""
    path, given = folder / SETTINGS, settings.values() | {"images": fingerprint}
    if path.exists():
        stored = json.loads(path.read_text())
        for name, value in given.items():
            if stored.get(name) != value:
                what = "with other training images" if name == "images" else f"with {name} {stored.get(name)}, now {value}"
                raise ValueError(f"--out: the trainings in {os.fspath(folder)!r} were made {what}: give another folder, or remove this one")
    with replaced_atomically(path) as temporary:
        temporary.write_text(json.dumps(given, indent=1) + "\n")


def check_networks_and_rows(settings: Settings, rows: Sequence[Row]) -> None:
    """Build the teacher and each row once, before anything is trained, and run them on two images.

    Raises:
        ValueError: a network or a row is wrong; the message names its option.
    """
    data = student_data(settings, 0)
    classes = data.num_classes
    image = data.finish(data.splits["val"][[0, 1]])["image"]  # type: ignore[index]
    teacher = network_from(settings.teacher, "teacher", cast(int, classes)).eval()
    if settings.teacher_weights is not None:
        try:
            load_weights(teacher, settings.teacher_weights)
        except (OSError, ValueError) as error:
            raise ValueError(f"--teacher_weights: {error}") from error
    for option, network in (("teacher", teacher), ("student", network_from(settings.student, "student", cast(int, classes)).eval())):
        try:
            with torch.no_grad():
                shape = list(find_logits(network(image)).shape)
        except Exception as error:
            raise ValueError(f"--{option}: {getattr(settings, option)} cannot be run on images {list(image.shape)}: {error}") from error
        if shape != [2, classes]:
            raise ValueError(f"--{option}: {getattr(settings, option)} must return logits [2, {classes}] for two images, got {shape}")
        given, name = (settings.layers, "layers") if option == "student" else (settings.teacher_layers, "teacher_layers")
        if given:
            layers_of(network, given, name)
    for candidate in [candidate for row in rows for candidate in row.grid]:
        try:
            method = build(settings, None, candidate, 0, data).eval()
            with torch.no_grad():
                features = [taps(image)[1] for taps in (method.student_taps, method.teacher_taps) if taps is not None and taps.names]
                if len(features) == 2 and hasattr(method, "check_features"):
                    method.check_features(*features)
        except (TypeError, ValueError) as error:
            if str(error).startswith("--"):
                raise
            raise ValueError(f"--methods: {candidate} does not fit {settings.student} and {settings.teacher}: {error}") from error


def _train_teachers(settings: Settings, folder: Path, seeds: Sequence[int], pool: Pool) -> None:
    missing = [seed for seed in seeds if stored_run(folder, TEACHER, seed) is None]
    if missing:
        print(f"Training {len(missing)} teachers", flush=True)
    jobs = [Job(train_teacher, (settings, folder, seed), f"teacher, seed {seed}") for seed in missing]
    pool.run(jobs, lambda found: f"test accuracy {100 * found['accuracy']:.2f} %")


def _train_students(settings: Settings, folder: Path, names: Sequence[str], seeds: Sequence[int], pool: Pool, keep: bool) -> None:
    """Train the rows with the seeds, as far as they have not been trained."""
    missing = [(name, seed) for seed in seeds for name in names if stored_run(folder, name, seed) is None]
    jobs = [Job(train_student, (settings, folder, name, seed, keep), f"{name}, seed {seed}") for name, seed in missing]
    pool.run(
        jobs,
        lambda found: (
            f"failed: {found['error']}"
            if "error" in found
            else f"validation {100 * found['validation'][-1]:.2f} %, test {100 * found['accuracy']:.2f} %"
        ),
    )


def _finished(folder: Path, name: str, seed: int) -> dict[str, Any]:
    found = stored_run(folder, name, seed)
    if found is None:
        raise FileNotFoundError(f"{run_path(folder, name, seed)} was removed during the comparison")
    return found


def _costs(settings: Settings, folder: Path, names: Sequence[str], seed: int) -> dict[str, Any]:
    """Measure the steps of the rows, each in a process of its own, as far as not yet measured."""
    path = folder / "cost.json"
    costs: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    missing = [name for name in dict.fromkeys(names) if name not in costs]
    if missing:
        print(f"\nMeasuring a training step of {len(missing)} rows, one at a time", flush=True)
    for name in missing:
        costs[name] = in_new_process(step_cost, settings, folder, name, seed)
        with replaced_atomically(path) as temporary:
            temporary.write_text(json.dumps(costs, indent=1) + "\n")
    return costs


def text_table(comparison: dict[str, Any]) -> str:
    """Return the comparison as text, a line for each row."""
    lines = comparison["table"]
    baseline = next(line["title"] for line in lines if line["row"] == comparison["baseline"])
    width = max(28, *(len(str(line["chosen"] or line["row"])) for line in lines)) + 2
    accuracies = [100 * run["accuracy"] for run in comparison["teacher"]]
    head = f"{'test accuracy, %':<{width}}{'mean +- std':>15}{'difference':>12}{'95 % interval':>18}{'p (Holm)':>11}{'better':>8}"
    head += f"{'step':>8}" if comparison["cost"] else ""
    spread = f" +- {statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
    text = [head, f"{'teacher':<{width}}" + f"{statistics.mean(accuracies):.2f}{spread}".rjust(15)]
    for line in lines:
        start = f"{line['chosen'] or line['row']:<{width}}"
        if "mean" not in line:
            text.append(f"{start}{'failed':>15}  {line['error']}")
            continue
        spread = "" if line["std"] is None else f" +- {line['std']:.2f}"
        cost = comparison["cost"].get(line["row"])
        text.append(
            start + f"{line['mean']:.2f}{spread}".rjust(15) + difference_cells(line["difference"]) + (f"{cost['ratio']:7.2f}x" if cost else "")
        )
    runs = f"{len(comparison['seeds'])} seeds" if len(comparison["seeds"]) > 1 else "one seed, so that there is no interval"
    text.append(f"The differences are those to '{baseline}' in percentage points, paired over {runs}.")
    if any(line["difference"] and line["difference"]["p"] is None for line in lines) and len(comparison["seeds"]) > 1:
        text.append("A row without an interval has the same difference in all seeds.")
    if comparison["cost"]:
        text.append("Step: time of a training step relative to the student alone.")
    return "\n".join(text)


def difference_cells(difference: dict[str, Any] | None) -> str:
    if difference is None:
        return " " * 49
    if difference["p"] is None:
        return f"{difference['mean']:>+12.2f}{'':>18}{'':>11}{difference['better']:>6}/{difference['seeds']}"
    interval = f"{difference['low']:+.2f} to {difference['high']:+.2f}"
    return f"{difference['mean']:>+12.2f}{interval:>18}{difference['p_holm']:>11.4f}{difference['better']:>6}/{difference['seeds']}"
