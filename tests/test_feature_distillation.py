"""Feature distillation in one stage, and in two stages with frozen layers."""

import copy

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("lightning")
from tiny_runs import Small, data_of, fit

from kdkernels.distill import FeatureDistillation


def _networks():
    torch.manual_seed(0)
    return Small(), Small()


def test_loss_is_the_mean_squared_error():
    student, teacher = _networks()
    method = FeatureDistillation(student, teacher, "features", beta=3.0, gamma=0.5, alpha=0.25, temperature=2.0).double().eval()
    batch = {"image": torch.rand(4, 3, 8, 8, dtype=torch.float64), "label": torch.tensor([0, 1, 2, 0])}
    logits, losses = method.losses(batch)
    target = teacher.features(batch["image"])
    assert losses["feature"].item() == pytest.approx(3 * F.mse_loss(student.features(batch["image"]), target).item(), rel=1e-12, abs=0)
    assert losses["cross_entropy"].item() == pytest.approx(0.5 * F.cross_entropy(logits, batch["label"]).item(), rel=1e-9, abs=0)
    assert set(losses) == {"feature", "cross_entropy", "kl"}


def test_stages_train_the_layers_of_their_own():
    """The first stage changes the layers up to the tap only, the second one the other layers."""
    states = {}
    for epochs in (1, 2, 3):
        method = FeatureDistillation(*_networks(), "features.1", first_stage_epochs=1, scheduler=lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1))
        states[0] = copy.deepcopy(method.student.state_dict())
        fit(method, max_epochs=epochs)
        states[epochs] = method.student.state_dict()
    for name, first in states[1].items():
        in_front = name.startswith(("features.0", "features.1"))
        changed = [not torch.equal(states[a][name], states[b][name]) for a, b in ((0, 1), (1, 2), (2, 3))]
        assert changed == ([True, False, False] if in_front else [False, True, True]), name
        assert first.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"student_tap": "features", "first_stage_epochs": 2}, "the first stage has 2 epochs, the training only 2"),
        (
            {"student_tap": "head", "first_stage_epochs": 1},
            "the second stage has nothing to train, because no layer with weights is behind student_tap",
        ),
    ],
)
def test_stages_that_train_nothing_are_warned_of(options, message):
    with pytest.warns(UserWarning, match=message):
        fit(FeatureDistillation(*_networks(), **options), data_of(), max_epochs=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"student_tap": "head"}, None),
        ({"student_tap": None}, "student_tap must be the name of a layer, got None"),
        ({"student_tap": "features", "teacher_tap": 1}, "teacher_tap must be the name of a layer, got 1"),
        ({"student_tap": "features.0", "teacher_tap": "head"}, r"must have outputs of the same shape, got \[2, 4, 4, 4\] and \[2, 3\]"),
        ({"student_tap": "features", "beta": -1.0}, "beta, the weight of a term"),
        ({"student_tap": "nothing"}, "Small has no layer 'nothing'"),
        ({"student_tap": "features", "first_stage_epochs": 1.5}, "first_stage_epochs must be an integer, got 1.5"),
        ({"student_tap": "features", "first_stage_epochs": 1, "beta": 0.0}, "beta is 0, so that the first stage has nothing to train"),
    ],
)
def test_options(options, message):
    if message is None:
        fit(FeatureDistillation(*_networks(), **options), data_of())
        return
    with pytest.raises((TypeError, ValueError), match=message):
        fit(FeatureDistillation(*_networks(), **options), data_of())
    with pytest.raises(ValueError, match="FeatureDistillation needs a teacher"):
        FeatureDistillation(Small(), None, "features")
