"""The methods that ``kdkernels compare`` knows, and how a row of the comparison is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml
from torch import nn

from ...distill import (
    BYOT,
    DML,
    FFL,
    FRSKD,
    FSP,
    KD,
    ONE,
    SAD,
    SLA,
    SVDKD,
    AttentionTransfer,
    DeepSupervision,
    Distiller,
    DualNet,
    FeatureDistillation,
    GradientAttentionTransfer,
    Supervised,
)
from ..class_options import options_of
from ..user_errors import close_match


@dataclass(frozen=True)
class Networks:
    """What a method is built from: the networks and the layers that it compares."""

    student: nn.Module
    teacher: nn.Module | None
    layers: tuple[str, ...]
    teacher_layers: tuple[str, ...]
    new_student: Callable[[], nn.Module]  # makes further networks like the student
    steps: int  # optimizer steps of the training


@dataclass(frozen=True)
class Kind:
    """A method of the comparison.

    Args:
        cls: its class in :mod:`kdkernels.distill`.
        title: its name in tables.
        arguments: function that returns the networks and layers that the class takes.
        weight: name of the argument that is chosen on validation, or ``None``.
        grid: the values that are tried.
        options: arguments that differ from the defaults of the class.
        has_teacher: whether it uses the teacher.
        linked: function that returns further arguments for a weight.
        has_layers: whether it compares layers.
    """

    cls: type[Distiller]
    title: str
    arguments: Callable[[Networks], dict[str, Any]]
    weight: str | None = None
    grid: tuple[float, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    has_teacher: bool = False
    linked: Callable[[float], dict[str, Any]] = lambda weight: {}
    has_layers: bool = True


def _student(networks: Networks) -> dict[str, Any]:
    return {"student": networks.student}


def _student_and_teacher(networks: Networks) -> dict[str, Any]:
    return {"student": networks.student, "teacher": networks.teacher}


def _pairs_of_layers(networks: Networks) -> dict[str, Any]:
    return _student_and_teacher(networks) | {"student_taps": networks.layers, "teacher_taps": networks.teacher_layers}


def _last_layers(networks: Networks) -> dict[str, Any]:
    return _student_and_teacher(networks) | {"student_tap": networks.layers[-1], "teacher_tap": networks.teacher_layers[-1]}


def _own_layers(networks: Networks) -> dict[str, Any]:
    return {"student": networks.student, "student_taps": networks.layers}


def _own_last_layer(networks: Networks) -> dict[str, Any]:
    return {"student": networks.student, "student_taps": networks.layers[-1:]}


def _late_attention(networks: Networks) -> dict[str, Any]:
    return _own_layers(networks) | {"start_step": 2 * networks.steps // 3}


def _peer(networks: Networks) -> dict[str, Any]:
    return {"student": networks.student, "peers": [networks.new_student()]}


def _peer_split(networks: Networks) -> dict[str, Any]:
    return _peer(networks) | {"split": networks.layers[-1]}


def _peer_fused(networks: Networks) -> dict[str, Any]:
    return _peer(networks) | {"student_tap": networks.layers[-1]}


def _peer_fused_split(networks: Networks) -> dict[str, Any]:
    return _peer_fused(networks) | {"split": networks.layers[-1]}


BASELINE = "alone"
METHODS: dict[str, Kind] = {
    BASELINE: Kind(Supervised, "student alone", _student, has_layers=False),
    "kd": Kind(
        KD, "KD", _student_and_teacher, "alpha", (0.5, 0.9, 1.0), has_teacher=True, linked=lambda alpha: {"gamma": 1 - alpha}, has_layers=False
    ),
    "at": Kind(AttentionTransfer, "AT", _pairs_of_layers, "beta", (1.0, 10.0, 100.0, 1000.0), has_teacher=True),
    "at_kd": Kind(AttentionTransfer, "AT + KD", _pairs_of_layers, "beta", (1.0, 10.0, 100.0, 1000.0), {"gamma": 0.1, "alpha": 0.9}, has_teacher=True),
    "gradient_at": Kind(GradientAttentionTransfer, "gradient AT", _student_and_teacher, "beta", (0.1, 1.0, 10.0), has_teacher=True, has_layers=False),
    "fsp": Kind(FSP, "FSP", _pairs_of_layers, "beta", (0.1, 1.0, 10.0, 100.0), {"variant": "repdistiller"}, has_teacher=True),
    "svd_kd": Kind(SVDKD, "SVD-KD", _pairs_of_layers, "beta", (0.01, 0.1, 1.0, 10.0), has_teacher=True),
    "features": Kind(FeatureDistillation, "feature distillation", _last_layers, "beta", (0.1, 1.0, 10.0), has_teacher=True),
    "deep_supervision": Kind(DeepSupervision, "deep supervision", _own_layers, "exit_weight", (0.1, 0.3, 1.0)),
    "byot": Kind(BYOT, "BYOT", _own_layers, "alpha", (0.1, 0.3, 0.9)),
    "frskd": Kind(FRSKD, "FRSKD", _own_layers, "beta", (0.0, 1.0, 10.0, 100.0)),
    "sad": Kind(SAD, "SAD", _late_attention, "gamma", (0.01, 0.1, 1.0)),
    "sla": Kind(SLA, "SLA", _own_last_layer, "alpha", (0.1, 1.0)),
    "dml": Kind(DML, "DML", _peer, "alpha", (0.1, 0.3, 1.0), has_layers=False),
    "ffl": Kind(FFL, "FFL", _peer_fused_split, "alpha", (0.1, 0.3, 1.0)),
    "one": Kind(ONE, "ONE", _peer_split, "alpha", (0.1, 0.3, 1.0)),
    "dual_net": Kind(DualNet, "DualNet", _peer_fused, "network_weight", (0.3, 1.0)),
}


@dataclass(frozen=True)
class Row:
    """A row of the comparison: a method with some of its arguments, as ``svd_kd:loss=mean``."""

    method: str
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Row:
        """Read ``name:argument=value:argument=value``.

        Raises:
            ValueError: there is no such method or argument, or it is given twice.
        """
        name, _, rest = text.strip().partition(":")
        if name not in METHODS:
            hint = "; DFND has other training images than the rest and cannot be compared" if name == "dfnd" else close_match(name, list(METHODS))
            raise ValueError(f"there is no method {name!r}{hint}; the methods are {', '.join(METHODS)}")
        kind = METHODS[name]
        accepted = [option for option in options_of(kind.cls) if option not in _BUILT]
        found = parse_options(rest, accepted, text, kind.cls.__name__)
        if kind.weight in found:
            weight = found[kind.weight]
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
                raise ValueError(f"{text!r}: {kind.weight} must be a finite number >= 0, got {_short(weight)}")
        return cls(name, tuple(found.items()))

    @property
    def kind(self) -> Kind:
        return METHODS[self.method]

    @property
    def weight(self) -> float | None:
        """The weight, if it is given."""
        return None if self.kind.weight is None else dict(self.options).get(self.kind.weight)

    @property
    def grid(self) -> list[Row]:
        """The rows between which validation chooses: this row with each weight of the grid."""
        if self.kind.weight is None or self.weight is not None:
            return [self]
        return [Row(self.method, (*self.options, (self.kind.weight, weight))) for weight in self.kind.grid]

    @property
    def title(self) -> str:
        """The name in tables, without the weight."""
        others = [f"{name}={_short(value)}" for name, value in self.options if name != self.kind.weight]
        return ", ".join([self.kind.title, *others])

    def __str__(self) -> str:
        return ":".join([self.method, *(f"{name}={_short(value)}" for name, value in self.options)])

    def build(self, networks: Networks, optimizer: Callable) -> Distiller:
        """Return the method."""
        kind = self.kind
        arguments = dict(kind.options) | kind.arguments(networks)
        if self.weight is not None:
            arguments |= kind.linked(self.weight)
        return kind.cls(**arguments | dict(self.options), optimizer=optimizer)


# Arguments that the comparison sets itself.
_BUILT = {
    *("student", "teacher", "student_taps", "teacher_taps", "student_tap", "teacher_tap", "peers", "peer_taps"),
    *("student_weights", "teacher_weights", "teacher_cache", "optimizer", "scheduler", "task"),
}


def parse_options(text: str, accepted: list[str], whole: str, owner: str) -> dict[str, Any]:
    """Read ``argument=value:argument=value``.

    Args:
        text: the arguments; may be empty.
        accepted: their names.
        whole: the text around them, for errors.
        owner: name of the class or function that takes them, for errors.

    Raises:
        ValueError: an argument is unknown, has no value, or is given twice.
    """
    found: dict[str, Any] = {}
    for option in text.split(":") if text else []:
        key, equals, value = option.partition("=")
        if not equals or not value:
            raise ValueError(f"{whole!r}: an argument is written name=value, got {option!r}")
        if key not in accepted:
            raise ValueError(f"{whole!r}: {owner} has no argument {key!r}{close_match(key, accepted)}")
        if key in found:
            raise ValueError(f"{whole!r}: the argument {key} is given twice")
        found[key] = _value(value)
    return found


def _value(text: str) -> Any:
    """Return the value that a text means in YAML, where 1e-3 is also a number."""
    try:
        return float(text) if "e" in text.lower() else yaml.safe_load(text)
    except ValueError:
        return yaml.safe_load(text)


def _short(value: Any) -> str:
    return format(value, "g") if isinstance(value, float) else str(value).lower() if isinstance(value, bool) or value is None else str(value)


def parse_rows(text: str) -> list[Row]:
    """Read a list of rows, separated by commas, and put the student alone before them.

    Commas within brackets do not separate rows.

    Raises:
        ValueError: a row is wrong or occurs twice, or there is none.
    """
    names = [name for name in _split(text) if name.strip()]
    if not names:
        raise ValueError(f"give at least one method; the methods are {', '.join(METHODS)}")
    if "all" in names:
        names = [name for name in METHODS if name != BASELINE] + [name for name in names if name != "all"]
    rows = [Row.parse(name) for name in names]
    rows = rows if Row(BASELINE) in rows else [Row(BASELINE), *rows]
    for i, row in enumerate(rows):
        if row in rows[:i]:
            raise ValueError(f"{str(row)!r} is given twice")
    return rows


def _split(text: str) -> list[str]:
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts
