"""kdkernels.compat against the packages themselves: ``make test-peers``.

Run in an environment of its own, with the versions in requirements.txt. RepDistiller, mdistiller
and attention-transfer are not packages; tests/test_compat.py has transcriptions of their formulas.
Liger's kernels run in Triton's interpreter, in float32.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from liger_kernel.transformers.jsd import LigerJSD
from liger_kernel.transformers.kl_div import LigerKLDIVLoss
from modelopt.torch.distill.losses import LogitsDistillationLoss
from torchdistill.losses import mid_level
from trl.experimental.gkd.gkd_trainer import GKDTrainer

from kdkernels import compat


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def same(ours, theirs, *inputs, rtol=1e-9, atol=1e-13):
    """Compare values and the gradients of the first input, a tensor or a dict of tensors."""
    results = []
    for function in (ours, theirs):
        given = [{k: v.clone().requires_grad_() for k, v in x.items()} if isinstance(x, dict) else x.clone().requires_grad_() for x in inputs]
        loss = function(*given)
        weights = torch.arange(1, loss.numel() + 1).view(loss.shape)
        first = list(given[0].values()) if isinstance(given[0], dict) else [given[0]]
        results.append([loss, *torch.autograd.grad((loss * weights).sum(), first)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, check_dtype=False)


LABELS = torch.tensor([3, 0, 9, 1, 1, 5])
PLACES = ("fc", "output", "fc", "output")


@pytest.mark.parametrize("targets", [None, LABELS], ids=["no targets", "targets"])
@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.5},
        {"alpha": 0},
        {"alpha": None, "beta": 1},
        {"alpha": 0.3, "beta": 2, "reduction": "sum"},
        {"alpha": 0.3, "reduction": "mean", "label_smoothing": 0.1},
    ],
    ids=str,
)
def test_torchdistill_kd(options, targets):
    losses = [module.KDLoss(*PLACES, 4.0, **options) for module in (compat.torchdistill, mid_level)]
    functions = [lambda s, t, loss=loss: loss({"fc": {"output": s}}, {"fc": {"output": t}}, targets) for loss in losses]
    same(*functions, randn(6, 10), randn(6, 10, seed=1))


def maps(seed):
    return {name: randn(4, c, h, h, seed=seed + h) for name, c, h in (("a", 8, 8), ("b", 16, 4))}


def outputs(features):
    return {name: {"output": x} for name, x in features.items()}


@pytest.mark.parametrize("mode", ["code", "paper"])
def test_torchdistill_attention(mode):
    pairs = {name: {who: {"path": name, "io": "output"} for who in ("student", "teacher")} | {"weight": w} for name, w in (("a", 2), ("b", 3))}
    losses = [module.ATLoss(pairs, mode=mode) for module in (compat.torchdistill, mid_level)]
    same(*(lambda s, t, loss=loss: loss(outputs(s), outputs(t)) for loss in losses), maps(0), maps(100))


def test_torchdistill_fsp():
    pair = {f"{who}_{place}": {"path": path, "io": "output"} for who in ("student", "teacher") for place, path in (("first", "a"), ("second", "b"))}
    losses = [module.FSPLoss({"pair": pair | {"weight": 2}}) for module in (compat.torchdistill, mid_level)]
    same(*(lambda s, t, loss=loss: loss(outputs(s), outputs(t)) for loss in losses), maps(0), maps(100))


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum", "none"])
@pytest.mark.parametrize("shape", [(6, 10), (2, 5, 10)], ids=str)
def test_modelopt(shape, reduction):
    losses = compat.modelopt.LogitsDistillationLoss(3.0, reduction=reduction), LogitsDistillationLoss(3.0, reduction)
    same(*losses, randn(*shape), randn(*shape, seed=1))


@pytest.mark.parametrize("beta", [0, 0.3, 1])
@pytest.mark.parametrize(
    "options",
    [{}, {"labels": torch.tensor([[1, -100, 2], [-100, 5, 0]])}, {"reduction": "sum"}, {"reduction": "mean"}, {"num_items_in_batch": 9}],
    ids=["no labels", "labels", "sum", "mean", "items"],
)
def test_trl(beta, options):
    functions = compat.trl.generalized_jsd_loss, GKDTrainer.generalized_jsd_loss
    same(*(lambda s, t, f=f: f(s, t, beta=beta, temperature=2.0, **options) for f in functions), randn(2, 3, 7), randn(2, 3, 7, seed=1))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("labels", [None, torch.tensor([4, -100, 2, 0])], ids=["no labels", "labels"])
def test_liger_jsd(beta, labels):
    losses = compat.liger.LigerJSD(beta), LigerJSD(beta)
    functions = [lambda s, t, loss=loss: loss(s.log_softmax(-1), t.log_softmax(-1).detach(), labels) for loss in losses]
    same(*functions, randn(4, 50, dtype=torch.float32), randn(4, 50, seed=1, dtype=torch.float32), rtol=1e-4, atol=1e-6)


class Epsilon(float):
    """A number with a method that compiled kernels have and Triton's interpreter lacks."""

    def to(self, _dtype):
        return self


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
@pytest.mark.parametrize("log_target", [False, True])
def test_liger_kl_div(reduction, log_target):
    losses = [module(Epsilon(1e-10), reduction=reduction, log_target=log_target) for module in (compat.liger.LigerKLDIVLoss, LigerKLDIVLoss)]

    def function(s, t, loss):
        t = t.log_softmax(-1).detach()
        return loss(s.log_softmax(-1), t if log_target else t.exp())

    same(
        *(lambda s, t, loss=loss: function(s, t, loss) for loss in losses),
        *(randn(4, 50, seed=i, dtype=torch.float32) for i in (0, 1)),
        rtol=1e-4,
        atol=1e-6,
    )


def test_patches():
    """Every target is patched and restored in the real packages."""
    import kdkernels

    own = LigerJSD, LogitsDistillationLoss, mid_level.KDLoss, GKDTrainer.generalized_jsd_loss
    import liger_kernel.transformers
    import modelopt.torch.distill.losses
    from torchdistill.losses.registry import MIDDLE_LEVEL_LOSS_DICT

    def current():
        return (
            liger_kernel.transformers.LigerJSD,
            modelopt.torch.distill.losses.LogitsDistillationLoss,
            MIDDLE_LEVEL_LOSS_DICT["KDLoss"],
            GKDTrainer.generalized_jsd_loss,
        )

    assert current() == own
    patches = [kdkernels.patch(target) for target in ("liger_kernel", "modelopt", "torchdistill", "trl")]
    patched = current()
    assert all(x.__module__.startswith("kdkernels.compat") for x in patched)
    assert patched[1](3.0)(randn(6, 10), randn(6, 10, seed=1)) == compat.modelopt.LogitsDistillationLoss(3.0, "mean")(
        randn(6, 10), randn(6, 10, seed=1)
    )
    for applied in patches:
        applied.undo()
    assert current() == own
