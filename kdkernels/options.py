"""The options of the ops. Public functions take them as strings; ops and kernels take the integer
values of the enums below.

The C++ enums of the same names have the same values (csrc/check.h rejects every other value, and
tests/test_options.py compares the two). An option has one meaning in all ops: ``reduction`` is a
``Reduction`` wherever a schema has an argument of this name.
"""

from __future__ import annotations

from enum import IntEnum


class Direction(IntEnum):
    """Which divergence temperature_kl computes."""

    FORWARD = 0  # KL(teacher || student)
    REVERSE = 1
    JSD = 2


class Reduction(IntEnum):
    """How the losses of rows or samples are reduced to one number."""

    NONE = 0
    SUM = 1
    MEAN = 2  # temperature_kl only
    BATCHMEAN = 3


class Reduce(IntEnum):
    """How attention_pool pools over the channels."""

    MEAN = 0
    SUM = 1
    MAX = 2


class Normalize(IntEnum):
    """How an attention map is normalised over its spatial positions."""

    NONE = 0
    L2 = 1
    SOFTMAX = 2


class Variant(IntEnum):
    """Which of two published definitions attention_transfer_loss computes."""

    AUTHORS = 0  # the authors' code
    PAPER = 1


class Sign(IntEnum):
    """Whether the signs of singular vectors are fixed."""

    NONE = 0
    MAX_ABS = 1


class Implementation(IntEnum):
    """Which kernels compute truncated_svd and align_singular_vectors; see
    :func:`kdkernels.testing.implementation`.
    """

    FASTEST = 0
    CUDA = 1
    TRITON = 2
    TORCH = 3


def _named(members: type[IntEnum]) -> dict[str | None, int]:
    """Map lower-case names to integers, because some of torch's tracers reject enum members."""
    return {member.name.lower(): int(member) for member in members}


# For each option: the strings that public functions accept, and the integer value of each. The keys
# are the argument names, in the public functions and in the schemas of the ops.
VALUES: dict[str, dict[str | None, int]] = {
    "direction": _named(Direction),
    "reduction": _named(Reduction),
    "reduce": _named(Reduce),
    "normalize": {None: int(Normalize.NONE), "l2": int(Normalize.L2), "softmax": int(Normalize.SOFTMAX)},
    "variant": _named(Variant),
    "sign": {None: int(Sign.NONE), "max_abs": int(Sign.MAX_ABS)},
    "implementation": _named(Implementation),
}
NAMES = {option: {value: name for name, value in values.items()} for option, values in VALUES.items()}
