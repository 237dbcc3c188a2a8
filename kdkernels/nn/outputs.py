"""Find the logits in what a network returns."""

from __future__ import annotations

from torch import Tensor

# Names of the logits in a dict or an object. torchvision's segmentation networks use "out".
LOGITS_NAMES = ("logits", "out")
ACCEPTED_OUTPUTS = f"a tensor, a tuple or list whose first element is the logits, or a dict or an object with {' or '.join(map(repr, LOGITS_NAMES))}"


def find_logits(output: object) -> Tensor:
    """Return the logits in the output of a network.

    The output may be a tensor; a tuple or a list whose first element is the logits; a dict with
    ``logits`` or ``out``; or an object with one of these attributes. Other outputs (auxiliary
    heads, hidden states) are ignored.

    Raises:
        TypeError: no logits were found; lists what the network returned.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, (tuple, list)):
        found = output[0] if output else None
    elif isinstance(output, dict):
        found = next((output[name] for name in LOGITS_NAMES if name in output), None)
    else:
        found = next((getattr(output, name) for name in LOGITS_NAMES if hasattr(output, name)), None)
    if not isinstance(found, Tensor):
        raise TypeError(f"a network must return {ACCEPTED_OUTPUTS}; it returned {describe_output(output)}")
    return found


def describe_output(output: object) -> str:
    """Describe a network's output for an error message: a tensor's shape, or type and contents."""
    if isinstance(output, Tensor):
        return str(list(output.shape))
    kind = type(output).__name__
    if isinstance(output, (tuple, list)):
        return f"a {kind} of {', '.join(_describe_item(value) for value in output)}" if output else f"an empty {kind}"
    if isinstance(output, dict):
        return f"a {kind} of {', '.join(f'{name!r}: {_describe_item(value)}' for name, value in output.items())}" if output else f"an empty {kind}"
    attributes = [name for name in getattr(output, "__dict__", {}) if not name.startswith("_")]
    return f"{kind} with the attributes {', '.join(attributes)}" if attributes else kind


def _describe_item(value: object) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__
