"""Find the logits in what a network returns."""

from __future__ import annotations

from torch import Tensor

NAMES = ("logits", "out")  # of a dict's entry or an object's attribute; "out" is torchvision's for segmentation
EXPECTED = f"a tensor, a tuple or list whose first element is the logits, or a dict or an object with {' or '.join(map(repr, NAMES))}"


def find_logits(output: object) -> Tensor:
    """The logits in the output of a network.

    The output may be a tensor; a tuple or a list, of which the first element is taken; a dict with ``logits`` or ``out``; or an object
    with such an attribute. Other outputs (auxiliary heads, hidden states) are ignored.

    Raises:
        TypeError: no logits were found; lists what the network returned.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, (tuple, list)):
        found = output[0] if output else None
    elif isinstance(output, dict):
        found = next((output[name] for name in NAMES if name in output), None)
    else:
        found = next((getattr(output, name) for name in NAMES if hasattr(output, name)), None)
    if not isinstance(found, Tensor):
        raise TypeError(f"a network must return {EXPECTED}; it returned {describe_output(output)}")
    return found


def describe_output(output: object) -> str:
    """A network's output for an error message: the shape of a tensor, or the type and the contents of anything else."""
    if isinstance(output, Tensor):
        return str(list(output.shape))
    kind = type(output).__name__
    if isinstance(output, (tuple, list)):
        return f"a {kind} of {', '.join(_short(value) for value in output)}" if output else f"an empty {kind}"
    if isinstance(output, dict):
        return f"a {kind} of {', '.join(f'{name!r}: {_short(value)}' for name, value in output.items())}" if output else f"an empty {kind}"
    attributes = [name for name in getattr(output, "__dict__", {}) if not name.startswith("_")]
    return f"{kind} with the attributes {', '.join(attributes)}" if attributes else kind


def _short(value: object) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__
