"""Choice of weights on validation, and the paired statistics of the comparison."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .methods import Row


class Difference(NamedTuple):
    """Paired difference to the baseline over seeds, in the unit of the values.

    ``p`` is that of a two-sided paired t-test, ``p_holm`` is corrected for the number of methods.
    """

    mean: float
    low: float  # 95 % confidence interval of the mean
    high: float
    p: float
    p_holm: float
    better: int  # seeds in which the method is better
    seeds: int


def final_validation(result: Mapping[str, Any]) -> float:
    """Return the validation accuracy after the last epoch; minus infinity for a failed training."""
    return -math.inf if "error" in result else result["validation"][-1]


def choose(tuning: Mapping[str, Sequence[Mapping[str, Any]]]) -> str | None:
    """Return the row with the best mean validation accuracy; ``None`` if all have failed.

    Of equal rows, the first is returned.

    Args:
        tuning: results by row, one for each tuning seed.
    """
    means = {name: statistics.fmean(map(final_validation, results)) for name, results in tuning.items()}
    best = max(means, key=lambda name: means[name])
    return None if means[best] == -math.inf else best


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> Difference:
    """Compare a method with the baseline on the same seeds; ``p_holm`` is ``p``.

    With one seed, or with equal differences in all seeds, interval and p are NaN.
    """
    differences = [value - other for value, other in zip(values, baseline, strict=True)]
    mean, better = statistics.fmean(differences), sum(d > 0 for d in differences)
    if len(differences) < 2 or max(differences) == min(differences):
        return Difference(mean, math.nan, math.nan, math.nan, math.nan, better, len(differences))
    from scipy.stats import ttest_1samp

    test = ttest_1samp(differences, 0.0)
    low, high = test.confidence_interval(0.95)
    return Difference(mean, float(low), float(high), float(test.pvalue), float(test.pvalue), better, len(differences))


def corrected(differences: Mapping[str, Difference]) -> dict[str, Difference]:
    """Correct the p-values for the number of methods, by the rule of Holm (1979).

    A method without a p-value counts as one whose p-value is 1.
    """
    known = sorted((d.p, name) for name, d in differences.items() if not math.isnan(d.p))
    largest, found = 0.0, dict(differences)
    for rank, (p, name) in enumerate(known):
        largest = max(largest, min(1.0, (len(differences) - rank) * p))
        found[name] = differences[name]._replace(p_holm=largest)
    return found


def table(rows: Sequence[Row], results: Mapping[str, Mapping[str, Any]], seeds: Sequence[int], baseline: str) -> list[dict[str, Any]]:
    """Return a line for each row: its chosen form, mean, spread, difference, fidelity, calibration.

    Accuracies, differences, fidelity and calibration errors are in %.

    Args:
        rows: as they were given.
        results: for each row (as text) ``chosen``, the row with its weight or ``None``, and
            ``runs``, its results by seed.
        seeds: of the comparison.
        baseline: row that the others are compared with.
    """
    accuracies = {name: _of_all(found, "accuracy", seeds) for name, found in results.items()}
    reference = accuracies.get(baseline)
    differences = {}
    if reference is not None:
        differences = corrected(
            {name: paired_difference(values, reference) for name, values in accuracies.items() if values is not None and name != baseline}
        )
    lines = []
    titles = [row.title for row in rows]
    for row in rows:
        name, found = str(row), results[str(row)]
        values = accuracies[name]
        line: dict[str, Any] = {
            "row": name,
            "title": row.title if titles.count(row.title) == 1 else f"{row.title} ({row})",
            "chosen": found["chosen"],
            "accuracies": values,
        }
        if values is not None:
            line |= {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else None}
            for quantity in ("fidelity", "calibration_error"):
                of_all = _of_all(found, quantity, seeds)
                line[quantity] = None if of_all is None else statistics.fmean(of_all)
        else:
            line["error"] = next((run["error"] for run in found["runs"].values() if "error" in run), "no weight of the grid could be trained")
        line["difference"] = _without_nan(differences[name]._asdict()) if name in differences else None
        if name in differences and values is not None and reference is not None:
            line["differences"] = [value - other for value, other in zip(values, reference, strict=True)]
        lines.append(line)
    return lines


def _without_nan(values: dict[str, Any]) -> dict[str, Any]:
    """Replace NaN by ``None``: JSON has no NaN."""
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in values.items()}


def _of_all(found: Mapping[str, Any], quantity: str, seeds: Sequence[int]) -> list[float] | None:
    """Return the values of all seeds in %; ``None`` if a training failed or has no such value."""
    runs = [found["runs"].get(seed, {}) for seed in seeds]
    return [100 * run[quantity] for run in runs] if all(quantity in run for run in runs) else None
