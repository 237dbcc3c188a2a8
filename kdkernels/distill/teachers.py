"""The ``teacher`` and ``teacher_weights`` arguments of a method, as lists."""

from __future__ import annotations

from torch import nn

_LISTS = (list, tuple, nn.ModuleList)


def checked_teachers(method: str, teacher: object, takes_several: bool, has_cache: bool) -> list[nn.Module]:
    """Return the teachers as a list, which is empty without a teacher.

    Args:
        method: name of the method in messages.
        teacher: a network, a list of networks, or ``None``.
        takes_several: whether the method takes more than one teacher.
        has_cache: whether the outputs of the teacher are cached.

    Raises:
        TypeError: a teacher is not an nn.Module.
        ValueError: the list is empty, or there are more teachers than the method or the cache take.
    """
    teachers = _as_list(teacher)
    for network in teachers:
        if not isinstance(network, nn.Module):
            raise TypeError(f"teacher must be an nn.Module, got {type(network).__name__}")
    if isinstance(teacher, _LISTS) and not teachers:
        raise ValueError("teacher is an empty list: give at least one network")
    if len(teachers) > 1 and not takes_several:
        raise ValueError(f"{method} takes one teacher, got {len(teachers)}; KD takes several")
    if len(teachers) > 1 and has_cache:
        raise ValueError(f"teacher_cache keeps the outputs of one teacher, got {len(teachers)} teachers")
    return teachers


def weights_by_teacher(weights: object, count: int) -> list:
    """Return the weights' file of each of ``count`` teachers, or ``None`` for each.

    Raises:
        ValueError: there is not one file for each teacher.
    """
    if weights is None:
        return [None] * count
    files = list(weights) if isinstance(weights, (list, tuple)) else [weights]
    if len(files) != count:
        raise ValueError(f"teacher_weights must name one file for each of the {count} teachers, got {len(files)}")
    return files


def _as_list(teacher: object) -> list:
    return [] if teacher is None else list(teacher) if isinstance(teacher, _LISTS) else [teacher]
