"""Invalid values for every argument of every public op and loss raise a TypeError or ValueError
that names the argument.
"""

import math

import numpy
import pytest
import torch

import kdkernels as kd
from kdkernels import nn

X, F, V = torch.randn(4, 10), torch.rand(2, 3, 4, 4), torch.randn(2, 5, 2)
LABELS = torch.arange(4)
NUMBERS = [None, "2", [2.0], {}, True, torch.tensor(2.0, requires_grad=True), math.nan, -1.0, 1j, 10**400]
POSITIVE = [*NUMBERS, 0, math.inf]
TENSORS = [None, "x", 3.0, [1.0], X.long(), X.to(torch.complex64), X.to(torch.float8_e4m3fn), X.to_sparse()]
CHOICES = [3, "other", ["mean"], torch.ones(2), b"mean"]
FLAGS = [None, 1, "yes", torch.tensor(True)]
INTEGERS = [None, 1.0, "1", True, torch.tensor(1), [1]]

# name: (function, valid arguments, {argument: invalid values})
CALLS = {
    "temperature_kl": (
        kd.temperature_kl,
        {"student": X, "teacher": X},
        {
            "student": [*TENSORS, X[0], torch.zeros(4, 0), torch.tensor(1.0)],
            "teacher": [*TENSORS, X[:3], X.to("meta")],
            "temperature": [
                *(n for n in POSITIVE if not isinstance(n, torch.Tensor)),
                torch.tensor([1.0, 1.0, 1.0]),
                torch.tensor([1.0, math.inf, 1.0, 1.0]),
                torch.tensor([1.0, math.nan, 1.0, 1.0]),
                torch.tensor([1.0, -1.0, 1.0, 1.0]),
                torch.tensor(0.0),
                torch.tensor(True),
                torch.tensor(2),
            ],
            "dim": [*INTEGERS, 2, -3],
            "direction": [None, *CHOICES],
            "reduction": [None, *CHOICES],
            "beta": [*NUMBERS, 1.5, math.inf],
            "scale_by_t2": FLAGS,
            "include_entropy": FLAGS,
            "target_eps": [*NUMBERS, math.inf],
            "mask": [3, "x", [True] * 4, torch.ones(4), torch.ones(3, dtype=torch.bool)],
            "normalizer": [
                *(n for n in POSITIVE if n is not None),
                torch.ones(2),
                torch.tensor(0.0),
                torch.tensor(-4.0),
                torch.tensor(math.nan),
                torch.tensor(math.inf),
                torch.tensor(0),
                torch.tensor(True),
            ],
        },
    ),
    "temperature_kl jsd": (kd.temperature_kl, {"student": X, "teacher": X, "direction": "jsd"}, {"beta": [*NUMBERS, 1.5]}),
    "attention_pool": (
        kd.attention_pool,
        {"x": F},
        {"x": [*TENSORS, X, F[:, :0], F[..., :0]], "p": POSITIVE, "reduce": [None, *CHOICES], "normalize": CHOICES, "eps": POSITIVE},
    ),
    "attention_transfer_loss": (
        kd.attention_transfer_loss,
        {"student": F, "teacher": F},
        {
            "student": [*TENSORS, F[:1], F[:, :0], F.to("meta")],
            "teacher": [*TENSORS, F[:1], F.flatten(2)],
            "p": POSITIVE,
            "variant": [None, *CHOICES],
            "reduce": [None, *CHOICES],
            "eps": POSITIVE,
        },
    ),
    "rbf_correlation": (kd.rbf_correlation, {"x": V, "y": V}, {"x": [*TENSORS, X, V[:1]], "y": [*TENSORS, V[..., :1]], "beta": POSITIVE}),
    "rbf_correlation_loss": (
        kd.rbf_correlation_loss,
        {"sx": V, "sy": V, "tx": V, "ty": V},
        {**{n: [*TENSORS, V[:, :3], V[0]] for n in ("sx", "sy", "tx", "ty")}, "beta": POSITIVE, "reduction": [None, "mean", *CHOICES]},
    ),
    "truncated_svd": (
        kd.truncated_svd,
        {"x": V, "k": 1},
        {"x": [*TENSORS, V[0, 0]], "k": [*INTEGERS, -1, 3], "sign": CHOICES, "return_u": FLAGS, "gap_eps": [n for n in NUMBERS if n is not None]},
    ),
    "feature_svd": (kd.feature_svd, {"features": F, "k": 1}, {"features": [*TENSORS, X], "k": [*INTEGERS, 4]}),
    "truncated_svds": (
        kd.truncated_svds,
        {"xs": [V, V], "k": 1},
        {"xs": [None, 3, numpy.array(2.0), V, [], [V, None], [V, V.long()]], "k": [*INTEGERS, 3]},
    ),
    "align_singular_vectors": (
        kd.align_singular_vectors,
        {"student": V, "teacher": V},
        {"student": [*TENSORS, V[:1]], "teacher": [*TENSORS, V[:, :2]], "weight": [3, V.long(), V], "flip": [None, *CHOICES]},
    ),
    "kd_loss": (
        nn.kd_loss,
        {"student": X, "teacher": X, "labels": LABELS},
        {
            "student": [*TENSORS, X[None], X.to("meta")],
            "teacher": [*TENSORS, X[:3]],
            "labels": [None, 3, [0] * 4, LABELS[:3], LABELS.bool(), X[:3], X.to(torch.float8_e4m3fn)],
            "temperature": [None, "4", 0, math.nan],
            "gamma": [None, "x", math.nan, X.to_sparse()],
            "alpha": [None, [1.0], -1.0],
        },
    ),
    "svd_kd_loss": (
        nn.svd_kd_loss,
        {"student": [F, F], "teacher": [F, F]},
        {
            "student": [None, F, [F, None], [F, F.long()], [F[0, 0], F]],
            "teacher": [None, F, [F, "x"], [F, F[:1]]],
            "k": [*INTEGERS, 0],
            "align": [None, *CHOICES],
            "grad": [None, *CHOICES],
            "weighting": [None, *CHOICES],
            "loss": [None, *CHOICES],
            "extra": [*INTEGERS, -1],
            "beta": POSITIVE,
        },
    ),
    "attention_transfer_losses": (
        nn.attention_transfer_losses,
        {"student": [F], "teacher": [F]},
        {"student": [None, F, [None]], "teacher": [None, F, ["x"]], "p": [None, "2", 0, [2.0, 2.0]], "reduce": [None, "other", ["mean"] * 2]},
    ),
}


def _argument_cases():
    for name, (function, valid, invalid) in CALLS.items():
        for argument, values in invalid.items():
            yield pytest.param(function, valid, argument, values, id=f"{name}-{argument}")


@pytest.mark.parametrize(("function", "valid", "argument", "values"), _argument_cases())
def test_errors_name_the_argument(function, valid, argument, values):
    for value in values:
        with pytest.raises((TypeError, ValueError)) as caught:
            function(**{**valid, argument: value})
        assert argument in str(caught.value), f"{argument}={value!r}: {caught.value}"


@pytest.mark.parametrize("name", CALLS)
def test_valid_arguments_are_accepted(name):
    function, valid, _ = CALLS[name]
    function(**valid)


def test_numpy_numbers_are_accepted():
    import numpy as np

    torch.testing.assert_close(kd.temperature_kl(X, X.flip(1), np.float32(2)), kd.temperature_kl(X, X.flip(1), 2.0))
    torch.testing.assert_close(kd.attention_pool(F, np.int64(2)), kd.attention_pool(F))
    assert kd.truncated_svd(V, np.int64(1))[1].shape == (2, 1)
