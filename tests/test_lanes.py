"""The task Lanes: losses computed by hand, bad input, and training with every guarantee of the
engine.
"""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("lightning")
import lightning as L

from kdkernels.data import Augment, FromDatasets
from kdkernels.distill import KD, GradientAttentionTransfer, Supervised
from kdkernels.distill.engine import checkpoints
from kdkernels.tasks import Lanes
from kdkernels.tasks.lanes import lane_cross_entropy, lane_existence, lane_iou_loss

LABEL = torch.tensor([[[0, 1, 2, 255], [0, 1, 255, 2]], [[0, 0, 0, 0], [255, 0, 0, 0]], [[2, 2, 0, 0], [0, 0, 0, 255]]])


def _logits(dtype=torch.float64):
    return torch.randn(3, 3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=dtype)


def test_cross_entropy_matches_a_sum_over_pixels():
    logits = _logits()
    log_probability, total = logits.log_softmax(1), 0.0
    for b, y, x in (LABEL != 255).nonzero().tolist():
        lane = LABEL[b, y, x]
        total = total - (0.3 if lane == 0 else 1.0) * log_probability[b, lane, y, x]
    torch.testing.assert_close(lane_cross_entropy(logits, LABEL, 0.3), total / 24)
    torch.testing.assert_close(lane_cross_entropy(logits, LABEL, 0.3, reduction="sum"), total / 8)
    assert Lanes(2, background_weight=0.3).label_loss(logits, {"label": LABEL}) == lane_cross_entropy(logits, LABEL, 0.3)


def test_iou_loss_matches_counts_computed_by_hand():
    """The mean over three samples, of which the second has no lane and adds 0."""
    logits = _logits().requires_grad_()
    probability, total = logits.softmax(1), 0.0
    for b in (0, 2):
        predicted = labelled = overlap = 0.0
        for y in range(2):
            for x in range(4):
                lane = int(LABEL[b, y, x])
                if lane != 255:
                    predicted = predicted + 1 - probability[b, 0, y, x]
                    labelled += lane > 0
                    overlap = overlap + (probability[b, lane, y, x] if lane else 0.0)
        total = total + 1 - overlap / (predicted + labelled - overlap)
    loss = lane_iou_loss(logits, LABEL)
    torch.testing.assert_close(loss, total / 3)
    (gradient,) = torch.autograd.grad(loss, logits)
    (expected,) = torch.autograd.grad(total / 3, logits)
    torch.testing.assert_close(gradient, expected)
    assert (gradient[(LABEL == 255)[:, None].expand_as(gradient)] == 0).all()
    assert torch.autograd.gradcheck(lambda x: lane_iou_loss(x, LABEL), (_logits().requires_grad_(),))


def test_iou_loss_is_0_for_perfect_and_1_for_wrong_predictions():
    label = torch.where(LABEL == 255, 0, LABEL)
    perfect = 200 * F.one_hot(label, 3).permute(0, 3, 1, 2).double()
    assert lane_iou_loss(perfect, LABEL) == 0
    swapped = perfect[:, [0, 2, 1]]  # every lane pixel has the number of the other lane
    torch.testing.assert_close(lane_iou_loss(swapped, LABEL), torch.tensor(2 / 3, dtype=torch.float64))  # the second sample adds 0
    ignored = torch.full_like(LABEL, 255)
    logits = _logits().requires_grad_()
    (gradient,) = torch.autograd.grad(lane_iou_loss(logits, ignored) + lane_cross_entropy(logits, ignored), logits)
    assert (gradient == 0).all()


def test_existence_loss_matches_the_formula():
    logits, existence = _logits(), torch.tensor([[1.5, -0.5], [-2.0, 3.0], [0.3, 0.0]], dtype=torch.float64)
    from_label = torch.tensor([[True, True], [False, False], [False, True]])
    assert torch.equal(lane_existence(LABEL, 2), from_label)
    for batch, target in (({}, from_label), ({"existence": ~from_label}, ~from_label), ({"existence": from_label.float() / 2}, from_label / 2)):
        losses = Lanes(2, iou_weight=0.2, existence_weight=0.3).output_losses({"logits": logits, "existence": existence}, {"label": LABEL} | batch)
        probability, target = existence.sigmoid(), target.double()
        expected = -(target * probability.log() + (1 - target) * (1 - probability).log()).mean()
        torch.testing.assert_close(losses["existence"], 0.3 * expected)
        torch.testing.assert_close(losses["iou"], 0.2 * lane_iou_loss(logits, LABEL))
    assert set(Lanes(2).output_losses(logits, {"label": LABEL})) == {"iou"}
    assert set(Lanes(2, iou_weight=0).output_losses((logits,), {"label": LABEL})) == set()


def test_losses_add_up_over_micro_batches():
    output = {"logits": _logits(), "existence": torch.randn(3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)}
    task = Lanes(2)

    def losses(part):
        values, batch = {name: value[part] for name, value in output.items()}, {"label": LABEL[part]}
        return task.output_losses(values, batch) | {"cross_entropy": task.label_loss(values["logits"], batch)}

    whole, parts = losses(slice(None)), [losses(slice(i, i + 1)) for i in range(3)]
    for name, value in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts) / 3, value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    logits, existence, batch = _logits(dtype), torch.ones(3, 2, dtype=dtype), {"label": LABEL}
    task = Lanes(2)
    half = task.output_losses({"logits": logits, "existence": existence}, batch) | {"label": task.label_loss(logits, batch)}
    single = task.output_losses({"logits": logits.float(), "existence": existence.float()}, batch) | {"label": task.label_loss(logits.float(), batch)}
    assert all(value.dtype == torch.float32 for value in half.values())
    assert half == single


def test_mirrored_labels_are_numbered_from_left_to_right():
    mirrored = Lanes(2).mirrored_label(LABEL)
    assert mirrored[0].tolist() == [[255, 1, 2, 0], [1, 255, 2, 0]]
    assert torch.equal(Lanes(2).mirrored_label(mirrored), LABEL)


# Bad input.


def test_invalid_options_raise():
    for options, error, message in (
        ({"lanes": 0}, ValueError, r"lanes must lie in \[1, 254\], got 0"),
        ({"lanes": 2.0}, TypeError, "lanes must be an integer, got 2.0"),
        ({"ignore_index": 4}, ValueError, "ignore_index must not be one of the classes 0 to 4, got 4"),
        ({"ignore_index": None}, TypeError, "ignore_index must be an integer"),
        ({"iou_weight": None}, TypeError, "iou_weight must be a number, got None"),
        ({"background_weight": "x"}, TypeError, "background_weight must be a number, got 'x'"),
        ({"iou_weight": -1}, ValueError, "iou_weight must be finite and >= 0, got -1"),
        ({"existence_weight": math.inf}, ValueError, "existence_weight must be finite and >= 0, got inf"),
        ({"background_weight": 0}, ValueError, "background_weight must be finite and > 0, got 0"),
        ({"tusimple_variant": "paper"}, ValueError, 'tusimple_variant must be "points" or "script"'),
    ):
        with pytest.raises(error, match=message):
            Lanes(**options)


def test_invalid_labels_raise():
    task, image = Lanes(2), torch.zeros(3, 3, 2, 4)
    task.check_labels(LABEL, image, 3, "training")
    with pytest.raises(ValueError, match=r"labels must be 0 \(background\), a lane from 1 to 2, or ignore_index \(255\); a test batch has 0 to 3"):
        task.check_labels(torch.where(LABEL == 2, 3, LABEL), image, 3, "test")
    with pytest.raises(ValueError, match="a training batch has -1 to 2"):
        task.check_labels(torch.where(LABEL == 255, -1, LABEL), image, 3, "training")
    with pytest.raises(ValueError, match=r"labels must be label maps \[3, 2, 4\] of lanes; a training batch has integers of shape \[3\]"):
        task.check_labels(torch.zeros(3, dtype=torch.int64), image, 3, "training")
    for field, message in (
        (torch.ones(3, 4), r"must be a tensor \[3, 2\], got \[3, 4\]"),
        (torch.full((3, 2), 2), r"must lie in \[0, 1\], got 2 to 2"),
        (torch.full((3, 2), math.nan), r"must lie in \[0, 1\], got nan"),
        ([1, 0], r"must be a tensor \[3, 2\], got list"),
    ):
        with pytest.raises(ValueError, match=message):
            task.existence({"label": LABEL, "existence": field})


def test_empty_batches_and_labels_of_bytes():
    task, logits = Lanes(2), _logits()
    existence = torch.randn(len(LABEL), 2, dtype=torch.float64)
    empty = {"logits": logits[:0], "existence": existence[:0]}
    assert {name: value.item() for name, value in task.output_losses(empty, {"label": LABEL[:0]}).items()} == {"iou": 0.0, "existence": 0.0}
    output, label = {"logits": logits, "existence": existence}, LABEL.to(torch.uint8)
    assert task.label_loss(logits, {"label": label}) == task.label_loss(logits, {"label": LABEL})
    assert task.output_losses(output, {"label": label}) == task.output_losses(output, {"label": LABEL})


def test_where_the_existence_is_found():
    """In a dict or an object by its name, in a tuple by its shape."""
    task, logits, existence = Lanes(2), _logits(), torch.randn(len(LABEL), 2, dtype=torch.float64)
    batch, image = {"label": LABEL}, torch.zeros(len(LABEL), 3, *LABEL.shape[1:])
    named = task.output_losses({"logits": logits, "existence": existence}, batch)
    assert task.output_losses((logits, existence), batch) == named
    assert task.predictions((logits, existence)).keys() == {"logits", "existence"}
    assert set(task.output_losses(logits, batch)) == set(task.output_losses((logits, existence[:, :1]), batch)) == {"iou"}
    with pytest.warns(UserWarning, match=r"output 'exist' is a tensor \[B, 2\] like the existence"):
        task.check_output({"logits": logits, "exist": existence}, image)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for output in (logits, (logits, existence), {"logits": logits, "other": existence[:, :1]}):
            task.check_output(output, image)


def test_flip_of_a_single_class():
    data = _data(augment=Augment(flip=True))
    Lanes(1).check_data(data)
    with pytest.raises(ValueError, match="cannot be used with Lanes"):
        Lanes(2).check_data(data)


class Net(nn.Module):
    """Two convolutions and the existence of the lanes, without batch norm, whose statistics would
    depend on the micro-batch.
    """

    def __init__(self, width=4, lanes=2, existence=None):
        super().__init__()
        self.body, self.head = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, lanes + 1, 3, padding=1)
        self.exists = nn.Linear(width, lanes if existence is None else existence)

    def forward(self, x):
        x = F.softplus(self.body(x))
        return {"logits": self.head(x), "existence": self.exists(x.mean((2, 3)))}


def _data(batch_size=8, train_size=11, label=lambda label: label, **options):
    generator = torch.Generator().manual_seed(3)
    items = []
    for i in range(train_size):
        image, lanes = torch.rand(3, 16, 24, generator=generator), torch.zeros(16, 24, dtype=torch.int64)
        lanes[3:, 5 + i % 3] = 1
        if i % 4:
            lanes[5:, 15 + i % 5] = 2
        image[:, lanes > 0] = 1.0
        items.append({"image": image, "label": label(lanes)})
    return FromDatasets(items, items[:4], num_classes=3, batch_size=batch_size, **options)


def _fit(method, data, folder=None, stop=None, start=None, **options):
    options = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "num_sanity_val_steps": 0} | options
    options |= {"callbacks": checkpoints(folder, every=1)} if folder else {}
    trainer = L.Trainer(
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=folder is not None, max_steps=stop or -1, **options
    )
    trainer.fit(method, data, ckpt_path=start, weights_only=True)
    return trainer.callback_metrics


def test_mistakes_raise_before_the_first_step():
    task = Lanes(2)
    for method, data, message in (
        (Supervised(Net(existence=3), task=task), _data(), r"the student \(Net\): the output 'existence' must be a tensor \[2, 2\], .* got \[2, 3\]"),
        (Supervised(Net(lanes=3), task=task), _data(), r"must return logits \[B, 3, H, W\] for images .*, it returned \[2, 4, 16, 24\]"),
        (Supervised(Net(), task=task), _data(augment=Augment(flip=True)), r"Augment\(flip=True\) cannot be used with Lanes"),
        (Supervised(Net(), task=task), _data(augment=Augment(cutmix=1.0)), "cannot be used with Lanes: it pastes"),
        (Supervised(Net(), task=task), _data(augment=Augment(crop=1, label_fill=9)), "label_fill of Augment, .* got 9"),
        (Supervised(Net(), task=task), _data(label=lambda x: 3 * x), r"labels must be 0 \(background\), a lane from 1 to 2"),
    ):
        before = {name: value.clone() for name, value in method.student.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            _fit(method, data)
        assert all(torch.equal(value, before[name]) for name, value in method.student.state_dict().items())


# Training.

METHODS = {
    "Supervised": lambda **o: Supervised(Net(), **o),
    "KD": lambda **o: KD(Net(), Net(6), **o),
    "GradientAttentionTransfer": lambda **o: GradientAttentionTransfer(Net(), symmetry=True, **o),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_train_all_terms(name):
    method = METHODS[name](task=Lanes(2))
    before = method.student.exists.weight.detach().clone()
    metrics = _fit(method, _data(augment=Augment(crop=2)), max_epochs=1)
    pixels = {"lane_iou", "pixel_accuracy", "cross_entropy"}
    curves = {"f1", "tusimple_accuracy", "tusimple_false_positives", "tusimple_false_negatives"}
    losses = {"train/loss", "train/loss_cross_entropy", "train/loss_iou", "train/loss_existence"}
    assert losses | {f"train/{name}" for name in pixels} | {f"val/{name}" for name in pixels | curves} <= set(metrics)
    assert not {f"train/{name}" for name in curves} & set(metrics)
    assert all(value.isfinite() for value in metrics.values())
    assert not torch.equal(method.student.exists.weight, before)
    assert method._student_output is None  # the graph of the last step is freed


def test_terms_have_the_weight_of_the_loss_on_the_labels():
    batch = {"image": torch.rand(2, 3, 16, 24), "label": torch.randint(0, 3, (2, 16, 24))}
    method = KD(Net(), Net(6), gamma=0.5, task=Lanes(2))
    _, losses = method.losses(batch)
    terms = method.task.output_losses(method.student(batch["image"]), batch)
    for name in ("iou", "existence"):
        torch.testing.assert_close(losses[name], 0.5 * terms[name])


def _train(batch_size, accumulate, folder=None, precision="64-true", **options):
    torch.manual_seed(0)
    # The default schedule would depend on the number of steps.
    constant = {"scheduler": lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0)}
    method = Supervised(Net(), task=Lanes(2), optimizer=lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9), **constant)
    data = _data(batch_size, augment=Augment(crop=3))
    metrics = _fit(method, data, folder, accumulate_grad_batches=accumulate, precision=precision, **options)
    return method.student.state_dict(), metrics


def test_training_does_not_depend_on_micro_batches():
    whole, metrics = _train(8, 1)
    split, split_metrics = _train(4, 2)
    for name, value in whole.items():
        torch.testing.assert_close(split[name], value, rtol=1e-11, atol=1e-13)
    for name in ("val/f1", "val/lane_iou", "val/cross_entropy"):
        assert split_metrics[name].item() == pytest.approx(metrics[name].item(), rel=1e-6, abs=0)


def test_training_resumes_exactly(tmp_path):
    options = {"precision": "32-true"}
    whole, metrics = _train(4, 1, **options)
    _train(4, 1, tmp_path, stop=4, **options)
    resumed, resumed_metrics = _train(4, 1, tmp_path, start=tmp_path / "last.ckpt", **options)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert torch.equal(metrics["val/f1"], resumed_metrics["val/f1"])
