"""The options of the ops have the same values in Python, C++ and Triton, and raw ops raise for
other values.
"""

import re

import pytest
import testing_ops  # noqa: F401  registers the CUDA kernels on CPU tensors
import torch

from kdkernels.options import NAMES, VALUES, Implementation, Reduction, Sign

OPS = torch.ops.kdkernels
X, F, V = torch.randn(3, 4), torch.rand(2, 3, 4), torch.randn(2, 5, 2)

# (option, the raw op as a function of the option's value, members that the op does not support)
RAW_OPS = {
    "direction": ("direction", lambda o: OPS.temperature_kl(X, X, 1.0, None, None, None, -1, o, 0.5, 1, True, True, 0.0, False), ()),
    "reduction": ("reduction", lambda o: OPS.temperature_kl(X, X, 1.0, None, None, None, -1, 0, 0.5, o, True, True, 0.0, False), ()),
    "reduce": ("reduce", lambda o: OPS.attention_pool(F, 2.0, o, 0, 1e-12), ()),
    "normalize": ("normalize", lambda o: OPS.attention_pool(F, 2.0, 0, o, 1e-12), ()),
    "variant": ("variant", lambda o: OPS.attention_transfer_loss(F, F, 2.0, o, 0, 1e-12, False), ()),
    "reduction of rbf_correlation_loss": (
        "reduction",
        lambda o: OPS.rbf_correlation_loss(V, V, V, V, 8.0, o, [False] * 4),
        (Reduction.MEAN,),
    ),
    "sign": ("sign", lambda o: OPS.truncated_svd(V, 1, o, False, 1e-6, False), ()),
    "implementation": ("implementation", lambda o: OPS.truncated_svd(V, 1, Sign.NONE, False, 1e-6, False, o), ()),
    "implementation of align_singular_vectors": ("implementation", lambda o: OPS.align_singular_vectors(V, V, None, True, o), ()),
}


@pytest.mark.parametrize("name", RAW_OPS)
def test_cpp_has_the_same_values(name):
    """The error message of the C++ check lists the members of its enum."""
    option, call, unsupported = RAW_OPS[name]
    for bad in (-1, len(VALUES[option]), 2**40, -(2**62), *unsupported):
        with pytest.raises(ValueError, match=f"^{option} must be one of") as caught:
            call(int(bad))
        listed = {int(value): member for value, member in re.findall(r"(\d+) \((\w+)\)", str(caught.value))}
        assert listed == {value: member or "none" for value, member in NAMES[option].items() if value not in unsupported}


@pytest.mark.parametrize("name", RAW_OPS)
def test_every_value_is_accepted(name):
    option, call, unsupported = RAW_OPS[name]
    for value in NAMES[option]:
        if value not in unsupported and not (option == "implementation" and value == Implementation.TRITON):  # has separate tests
            call(value)


@pytest.mark.parametrize("bad", [-1, 3, 2**40])
def test_launchers_reject_other_values(bad):
    """The launchers for CUDA tensors check the options before they import Triton."""
    from kdkernels.ops.registration import _launcher

    with pytest.raises(ValueError, match=r"^reduce must be one of 0 \(mean\), 1 \(sum\), 2 \(max\), got"):
        _launcher("attention_pool", "attention_pool")(F, 2.0, bad, 0, 1e-12)
    with pytest.raises(ValueError, match=r"^direction must be one of 0 \(forward\), 1 \(reverse\), 2 \(jsd\), got"):
        _launcher("temperature_kl", "temperature_kl")(X, X, 1.0, None, None, None, -1, bad, 0.5, 1, True, True, 0.0, False)


def test_names_match_the_enum_members():
    from kdkernels import options

    for option, values in VALUES.items():
        members = getattr(options, option.capitalize())
        assert {name or "none": value for name, value in values.items()} == {m.name.lower(): m.value for m in members}
