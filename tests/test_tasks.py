"""Tasks: finding logits in outputs, losses and metrics computed by hand, segmentation, several
teachers, and data without labels.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("lightning")
import lightning as L
from PIL import Image

from kdkernels import reference
from kdkernels.data import Augment, FromDatasets, SegmentedClutterDigits
from kdkernels.distill import FSP, KD, SVDKD, AttentionTransfer, GradientAttentionTransfer, Supervised
from kdkernels.distill.engine import checkpoints
from kdkernels.models import TinyCNN, TinyFCN
from kdkernels.tasks import Classification, Segmentation, find_logits

TAPS = ["block1", "block2"]


@pytest.fixture(scope="module")
def data():
    module = SegmentedClutterDigits(train_size=16, val_size=8, test_size=2, batch_size=8, augment=Augment(crop=3, flip=True))
    module.setup()
    return module


def _trainer(**options):
    options = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False} | options
    return L.Trainer(enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, **options)


def _fit(method, data, **options):
    trainer = _trainer(**options)
    trainer.fit(method, data)
    return trainer


# Logits in the outputs of networks.


class Output:
    def __init__(self, **values):
        self.__dict__.update(values)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, None), lambda x: [x], lambda x: {"logits": x, "out": None}, lambda x: {"out": x}])
def test_find_logits_in_outputs(wrap):
    logits = torch.ones(2, 3)
    assert find_logits(wrap(logits)) is logits
    assert find_logits(Output(logits=logits, out=None)) is logits
    assert find_logits(Output(out=logits)) is logits


@pytest.mark.parametrize(
    ("output", "found"),
    [
        ({"scores": torch.ones(2, 3), "n": 1}, r"a dict of 'scores': \[2, 3\], 'n': int"),
        ((None, torch.ones(2)), r"a tuple of NoneType, \[2\]"),
        ((), "an empty tuple"),
        (Output(scores=1), "Output with the attributes scores"),
        (None, "NoneType"),
    ],
)
def test_error_describes_outputs_without_logits(output, found):
    with pytest.raises(TypeError, match=f"must return a tensor, a tuple or list .*; it returned {found}"):
        find_logits(output)


# Segmentation: losses and metrics compared with values computed by hand.

LABEL = torch.tensor([[[0, 1, 255], [2, 2, 255]], [[1, 1, 1], [255, 0, 0]]])


def _pixels(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 2, 3, generator=generator, dtype=dtype) for _ in range(2)]


def test_segmentation_losses_omit_ignored_pixels():
    student, teacher = _pixels()
    student.requires_grad_()
    task, batch = Segmentation(), {"label": LABEL}
    log_probabilities, total, kl = student.log_softmax(1), 0.0, 0.0
    for b, y, x in (LABEL != 255).nonzero().tolist():
        total = total - log_probabilities[b, LABEL[b, y, x], y, x]
        kl = kl + 9 * F.kl_div((student[b, :, y, x] / 3).log_softmax(0), (teacher[b, :, y, x] / 3).softmax(0), reduction="sum")
    torch.testing.assert_close(task.label_loss(student, batch), total / 12)
    torch.testing.assert_close(task.label_loss(student, batch, reduction="sum"), total / 6)
    torch.testing.assert_close(task.divergence(student, teacher, 3.0, batch), kl / 12)
    task.divergence(student, teacher, 3.0, batch).backward()
    ignored = (LABEL == 255)[:, None].expand_as(student)
    assert (student.grad[ignored] == 0).all()
    assert (student.grad[~ignored] != 0).all()
    torch.testing.assert_close(task.divergence(student, teacher, 3.0, {}), reference.temperature_kl(student, teacher, 3.0, dim=1))


def test_segmentation_losses_add_up_over_micro_batches():
    """The weighted losses of micro-batches sum to the loss of the batch, although the images have
    different numbers of ignored pixels.
    """
    student, teacher = _pixels()
    task = Segmentation()
    for loss in (lambda s, t, b: task.label_loss(s, b), lambda s, t, b: task.divergence(s, t, 2.0, b)):
        parts = [loss(student[i : i + 1], teacher[i : i + 1], {"label": LABEL[i : i + 1]}) for i in range(2)]
        torch.testing.assert_close(sum(parts) / 2, loss(student, teacher, {"label": LABEL}))


def test_segmentation_metrics_match_values_computed_by_hand():
    """Intersections over unions are 3/5, 2/5 and 1/2. Class 3 does not occur and does not count.

    The predictions are 0 0 1 / 2 1 0 and 1 0 1 / 0 0 0. Of the labelled pixels:
    Class 0: labelled 3, predicted 5, intersection 1 + 2 = 3, union 5.
    Class 1: labelled 4, predicted 3, intersection 2, union 5.
    Class 2: labelled 2, predicted 1, intersection 1, union 2.
    """
    prediction = torch.tensor([[[0, 0, 1], [2, 1, 0]], [[1, 0, 1], [0, 0, 0]]])
    task = Segmentation()
    metrics = task.metrics(4)
    inputs = task.metric_inputs(F.one_hot(prediction, 4).permute(0, 3, 1, 2).float(), {"label": LABEL})
    for part in (slice(0, 1), slice(1, 2)):
        for metric in metrics.values():
            metric.update(inputs[0][part], inputs[1][part])
    assert metrics["mean_iou"].compute().item() == pytest.approx((3 / 5 + 2 / 5 + 1 / 2) / 3)
    assert metrics["pixel_accuracy"].compute().item() == pytest.approx(6 / 9)
    assert task.count_correct(F.one_hot(prediction, 4).permute(0, 3, 1, 2).float(), {"label": LABEL}) == (6.0, 9)


def test_invalid_label_maps_raise():
    image, task = torch.zeros(2, 3, 2, 3), Segmentation()
    task.check_labels(LABEL, image, 3, "training")
    task.check_labels(torch.full_like(LABEL, 255), image, 3, "training")
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], .*, or be ignore_index \(255\); a training batch has 0 to 2"):
        task.check_labels(LABEL, image, 2, "training")
    with pytest.raises(ValueError, match=r"labels must be label maps \[2, 2, 3\] of class indices; a test batch has integers of shape \[2\]"):
        task.check_labels(torch.zeros(2, dtype=torch.int64), image, 3, "test")
    with pytest.raises(ValueError, match="for label maps, use the task Segmentation"):
        Classification().check_labels(LABEL, image, 3, "training")
    with pytest.raises(TypeError, match="ignore_index must be an integer"):
        Segmentation(ignore_index=None)


# Label maps under augmentation.


def _augment_label_images(count=6, side=9, **options):
    """Augment images whose channels equal the label map, so that both can be compared."""
    label = torch.randint(0, 200, (count, side, side), dtype=torch.uint8)
    batch = {"image": label[:, None].repeat(1, 3, 1, 1), "label": label, "index": torch.arange(count), "view": 3}
    return Augment(**options)(batch, lambda image: image.float())


@pytest.mark.parametrize(
    "options", [{"crop": 3}, {"flip": True}, {"rotate": 40.0}, {"crop": 2, "flip": True, "rotate": 20.0}, {"cutmix": 1.0}], ids=str
)
def test_label_maps_are_transformed_with_their_images(options):
    out = _augment_label_images(**options)
    inside = out["label"] != 255
    assert torch.equal(out["image"][:, 0][inside], out["label"][inside].float())
    assert (out["image"][:, 0][~inside] == 0).all()
    assert bool((~inside).any()) == ("crop" in options or "rotate" in options)
    assert "mixed_label" not in out
    assert "mix" not in out
    if "crop" in options:
        assert (_augment_label_images(**options, label_fill=7)["label"] != 255).all()


def test_mixup_of_label_maps_raises_before_training():
    data = SegmentedClutterDigits(train_size=4, val_size=2, test_size=2, augment=Augment(mixup=0.2))
    for call in (data.setup, lambda: _augment_label_images(mixup=0.2)):
        with pytest.raises(ValueError, match="mixup cannot be used with label maps: it would need two labels for each pixel"):
            call()


def test_labels_of_segmented_digits_match_the_masks(data):
    batch = data.finish(next(iter(data.val_dataloader())))
    label, mask = batch["label"], batch["mask"]
    assert (label.dtype, label.shape) == (torch.int64, (8, 32, 32))
    assert torch.equal(label > 0, mask)
    assert all(len(label[i].unique()) == 2 for i in range(8))  # background and one digit
    training = data.finish(next(iter(data.train_dataloader())))["label"]
    assert set(training.unique().tolist()) <= {*range(11), 255}
    assert (training == 255).any()


def test_label_maps_of_datasets(tmp_path):
    from PIL import Image

    image, label = torch.rand(3, 4, 5), torch.arange(20).view(4, 5) % 3
    for given in (label, label.to(torch.uint8), label.numpy(), Image.fromarray(label.to(torch.uint8).numpy())):
        loaded = FromDatasets([(image, given)] * 4, [(image, given)] * 4, num_classes=3, batch_size=2)
        loaded.setup()
        batch = loaded.finish(next(iter(loaded.train_dataloader())))
        assert torch.equal(batch["label"], label.expand(2, 4, 5))
    with pytest.raises(ValueError, match=r"the label map of sample 0 must have the image's height and width \[4, 5\], got shape \[2, 3\]"):
        FromDatasets([(image, label[:2, :3])] * 4, [(image, label)], num_classes=3).setup()


# Segmentation networks, and every method with them.


class Dict(TinyFCN):
    def forward(self, x):
        return {"out": super().forward(x)}


class Auxiliary(TinyFCN):
    """Returns a second output in training mode."""

    def forward(self, x):
        logits = super().forward(x)
        return (logits, logits[:, :2]) if self.training else logits


METHODS = {
    "Supervised": lambda s, t, **o: Supervised(s, **o),
    "KD": lambda s, t, **o: KD(s, t, **o),
    "AttentionTransfer": lambda s, t, **o: AttentionTransfer(s, t, TAPS, TAPS, alpha=0.9, **o),
    "FSP": lambda s, t, **o: FSP(s, t, TAPS, TAPS, alpha=0.9, **o),
    "SVDKD": lambda s, t, **o: SVDKD(s, t, TAPS, TAPS, alpha=0.9, **o),
    "GradientAttentionTransfer": lambda s, t, **o: GradientAttentionTransfer(s, t, **o),
    "symmetry": lambda s, t, **o: GradientAttentionTransfer(s, symmetry=True, **o),
}


@pytest.mark.parametrize(("name", "network"), [(name, Dict) for name in METHODS] + [(name, Auxiliary) for name in ("KD", "AttentionTransfer", "FSP")])
def test_methods_train_segmentation(data, name, network):
    method = METHODS[name](network(4), network(4, 2), task=Segmentation())
    metrics = _fit(method, data).callback_metrics
    assert {"val/mean_iou", "val/pixel_accuracy", "val/cross_entropy", "train/mean_iou", "train/loss"} <= set(metrics)
    assert all(value.isfinite() for value in metrics.values())
    assert 0 < metrics["val/pixel_accuracy"] <= 1


def test_validation_metrics_are_those_of_all_images(data):
    """Intersections and unions are summed over the batches, and reset before each validation."""
    method = Supervised(TinyFCN(4), task=Segmentation())
    small = SegmentedClutterDigits(train_size=16, val_size=8, test_size=2, batch_size=3)
    for inference_mode in (True, False, True):
        values = _trainer(inference_mode=inference_mode).validate(method, small, verbose=False)[0]
        batch = data.finish(next(iter(data.val_dataloader())))
        metrics = method.task.metrics(11)
        with torch.no_grad():
            logits = method.student.eval()(batch["image"])
        for name, metric in metrics.items():
            metric.update(*method.task.metric_inputs(logits, batch))
            assert values[f"val/{name}"] == pytest.approx(metric.compute().item(), rel=1e-6, abs=0)
        assert values["val/cross_entropy"] == pytest.approx(F.cross_entropy(logits, batch["label"]).item(), rel=1e-5, abs=0)


def test_networks_without_logits_for_every_pixel_raise(data):
    with pytest.raises(ValueError, match=r"the student \(TinyCNN\) must return logits \[B, K, H, W\] for images .*, it returned \[2, 11\]"):
        _fit(Supervised(TinyCNN(2, num_classes=11), task=Segmentation()), data)
    half = nn.Sequential(nn.Conv2d(3, 11, 3, 2, 1))
    with pytest.raises(ValueError, match=r"the teacher \(Sequential\) must return logits .*, it returned \[2, 11, 16, 16\]"):
        _fit(KD(TinyFCN(2), half, task=Segmentation()), data)
    with pytest.raises(ValueError, match=r"must return logits \[B, K\] .*, it returned \[2, 11, 32, 32\]"):
        _fit(Supervised(TinyFCN(2)), data)
    with pytest.raises(TypeError, match=r"task must be a kdkernels\.tasks\.Task, got str"):
        Supervised(TinyFCN(2), task="segmentation")


# The engine's guarantees for segmentation.


def _network(width):
    """Return a network without batch norm, whose statistics would depend on the micro-batch."""
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.Softplus(), nn.Conv2d(width, 11, 3, padding=1))


def _train(batch_size, accumulate, folder=None, stop=None, start=None, cutmix=0.0, precision="64-true"):
    torch.manual_seed(0)
    constant = {"scheduler": lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0)}  # the default schedule depends on the number of steps
    method = KD(_network(4), _network(6), task=Segmentation(), optimizer=lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9), **constant)
    augment = Augment(crop=6, flip=True, cutmix=cutmix)
    data = SegmentedClutterDigits(train_size=19, val_size=5, test_size=2, batch_size=batch_size, augment=augment)
    options = {"callbacks": checkpoints(folder, every=1), "enable_checkpointing": True} if folder else {}
    steps = {"max_steps": stop} if stop else {}
    trainer = _trainer(max_epochs=2, precision=precision, accumulate_grad_batches=accumulate, **options, **steps)
    trainer.fit(method, data, ckpt_path=start, weights_only=True)
    return method.student.state_dict(), trainer.callback_metrics


def test_segmentation_does_not_depend_on_micro_batches():
    whole, metrics = _train(8, 1)
    split, split_metrics = _train(2, 4)
    for name, value in whole.items():
        torch.testing.assert_close(split[name], value, rtol=1e-11, atol=1e-13)
    for name in ("val/mean_iou", "val/cross_entropy"):
        assert split_metrics[name].item() == pytest.approx(metrics[name].item(), rel=1e-6, abs=0)


def test_segmentation_resumes_exactly(tmp_path):
    options = {"cutmix": 0.5, "precision": "32-true"}
    whole, metrics = _train(4, 1, **options)
    _train(4, 1, tmp_path, stop=3, **options)
    resumed, resumed_metrics = _train(4, 1, tmp_path, start=tmp_path / "last.ckpt", **options)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert torch.equal(metrics["val/mean_iou"], resumed_metrics["val/mean_iou"])


# Several teachers.


def test_combined_teachers_match_values_computed_by_hand():
    generator = torch.Generator().manual_seed(1)
    student, first, second = (torch.randn(5, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    task, temperature = Classification(), 2.5
    mean = 0.25 * (first / temperature).softmax(1) + 0.75 * (second / temperature).softmax(1)
    expected = temperature**2 * F.kl_div((student / temperature).log_softmax(1), mean, reduction="batchmean")
    torch.testing.assert_close(task.divergence(student, [first, second], temperature, {}, weights=[1, 3]), expected)
    single = [reference.temperature_kl(student, teacher, temperature) for teacher in (first, second)]
    combined = task.divergence(student, [first, second], temperature, {}, combine="divergences", weights=[2, 6])
    torch.testing.assert_close(combined, 0.25 * single[0] + 0.75 * single[1])
    torch.testing.assert_close(task.divergence(student, [first, first], temperature, {}), single[0])
    excluded = first.clone()
    excluded[:, 0] = -math.inf  # a class excluded by every teacher
    assert task.divergence(student, [excluded, excluded], temperature, {}).isfinite()


@pytest.mark.parametrize("combine", ["probabilities", "divergences"])
def test_several_teachers_train_one_student(tmp_path, combine):
    images = [(torch.rand(3, 8, 8), i % 3) for i in range(8)]
    data = FromDatasets(images, images, num_classes=3, batch_size=4)
    teachers = [TinyCNN(2, num_classes=3), TinyCNN(3, num_classes=3)]
    torch.save(TinyCNN(2, num_classes=3).state_dict(), tmp_path / "first.pt")
    method = KD(TinyCNN(2, num_classes=3), teachers, teacher_weights=[str(tmp_path / "first.pt"), None], combine=combine, combine_weights=[1.0, 2.0])
    before = [{k: v.clone() for k, v in t.state_dict().items()} for t in teachers]
    assert torch.equal(before[0]["fc.weight"], torch.load(tmp_path / "first.pt")["fc.weight"])
    trainer = _fit(method, data)
    assert trainer.callback_metrics["train/loss_kl"] > 0
    assert all(torch.equal(v, t.state_dict()[k]) for t, old in zip(teachers, before, strict=True) for k, v in old.items())
    assert method.double().teachers[1].fc.weight.dtype == torch.float64


def test_invalid_teachers_raise():
    student, teachers = TinyCNN(2), [TinyCNN(2), TinyCNN(3)]
    for make, message in {
        (lambda: AttentionTransfer(student, teachers, ["block1"], ["block1"])): "AttentionTransfer takes one teacher, got 2; KD takes several",
        (lambda: KD(student, [])): "teacher is an empty list",
        (lambda: KD(student, teachers, combine="mean")): "combine must be 'probabilities' or 'divergences', got 'mean'",
        (lambda: KD(student, teachers, combine_weights=[1.0])): "one weight for each of the 2 teachers, got 1",
        (lambda: KD(student, teachers, combine_weights=[1.0, 0.0])): "must be > 0 and finite",
        (lambda: KD(student, teachers, teacher_weights=["a.pt"])): "one file for each of the 2 teachers, got 1",
        (lambda: KD(student, [TinyCNN(2), student])): "student and teacher share",
    }.items():
        with pytest.raises(ValueError, match=message):
            make()
    for weights in (1.0, "11", ["1", 2.0]):
        with pytest.raises(TypeError, match="combine_weights must be a list of numbers, got"):
            KD(student, teachers, combine_weights=weights)


def test_label_maps_may_be_arrays_of_any_strides_and_byte_order():
    labels = np.arange(16 * 16).reshape(16, 16) % 3
    for array in (labels[:, ::-1], labels.astype(">u2"), labels.T, labels.astype("uint8")[::-1]):
        items = [(torch.zeros(3, 16, 16), array)] * 4
        data = FromDatasets(items, items, num_classes=3, batch_size=4)
        data.setup()
        got = next(iter(data.val_dataloader()))["label"]
        assert torch.equal(got[0].long(), torch.from_numpy(array.astype("int64")))


def test_tasks_and_teachers_in_a_config(tmp_path):
    from kdkernels.distill.restore import instantiate

    def net(width):
        return {"class_path": "kdkernels.models.TinyFCN", "init_args": {"width": width}}

    torch.save(TinyFCN(3).state_dict(), tmp_path / "b.pt")
    weights = {"teacher_weights": [None, str(tmp_path / "b.pt")], "combine_weights": [1, 3]}
    task = {"class_path": "kdkernels.tasks.Segmentation", "init_args": {"ignore_index": 7}}
    model = {"student": net(2), "teacher": [net(4), net(3)], "combine": "divergences", "task": task, **weights}
    data = {"class_path": "kdkernels.data.SegmentedClutterDigits", "init_args": {"train_size": 4}}
    method, loaded = instantiate({"model": {"class_path": "kdkernels.distill.KD", "init_args": model}, "data": data})
    assert (type(method.task), method.task.ignore_index, loaded.num_classes) == (Segmentation, 7, 11)
    assert [teacher.stem[0].out_channels for teacher in method.teachers] == [4, 3]
    assert torch.equal(method.teachers[1].stem[0].weight, torch.load(tmp_path / "b.pt")["stem.0.weight"])
    assert (method.combine, list(method.combine_weights)) == ("divergences", [1, 3])


# Data without labels.


def _images(labels):
    images = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return [(image, i % 3) if labels else image for i, image in enumerate(images)]


@pytest.mark.parametrize("labelled_validation", [True, False])
def test_kd_trains_without_labels(tmp_path, labelled_validation):
    data = FromDatasets(_images(False), _images(labelled_validation), num_classes=3, batch_size=4, augment=Augment(cutmix=0.5, mixup=0.5))
    student = TinyCNN(2, num_classes=3)
    before = student.fc.weight.detach().clone()
    method = KD(student, TinyCNN(3, num_classes=3))
    trainer = _fit(method, data, enable_checkpointing=True, callbacks=checkpoints(tmp_path, "val/accuracy"))
    names = set(trainer.callback_metrics)
    assert {"train/loss", "train/loss_kl"} <= names
    assert names.isdisjoint({"train/loss_cross_entropy", "train/accuracy", "train/cross_entropy"})
    assert ("val/accuracy" in names) == labelled_validation == (tmp_path / "best.ckpt").exists()
    assert not torch.equal(student.fc.weight, before)
    assert (tmp_path / "last.ckpt").exists()


def test_training_without_labels_equals_training_with_label_weight_0():
    students = []
    for labels in (True, False):
        torch.manual_seed(2)
        method = KD(TinyCNN(2, num_classes=3), TinyCNN(3, num_classes=3), gamma=0.0)
        _fit(method, FromDatasets(_images(labels), _images(True), num_classes=3, batch_size=4))
        students.append(method.student.state_dict())
    assert all(torch.equal(value, students[1][name]) for name, value in students[0].items())


def test_methods_that_need_labels_raise_without_them():
    make = lambda: TinyCNN(2, num_classes=3)  # noqa: E731
    data = FromDatasets(_images(False), _images(True), num_classes=3, batch_size=4)
    blocks = ["block1", "block2"]
    for method, message in {
        Supervised(make()): "Supervised trains on labels alone, and the first training batch has none",
        KD(make(), make(), alpha=0.0): "the first training batch has no labels, and KD without labels trains on T\\^2 KL alone: set alpha",
        AttentionTransfer(make(), make(), blocks, blocks): "AttentionTransfer without labels would train only the layers up to the last tap",
        FSP(make(), make(), blocks, blocks): "FSP without labels would train only the layers up to the last tap",
        GradientAttentionTransfer(make(), make()): "GradientAttentionTransfer needs labels, because it differentiates the loss on the labels",
    }.items():
        with pytest.raises(ValueError, match=message):
            _fit(method, data)


def test_two_stage_training_without_labels():
    blocks = ["block1", "block2"]
    method = FSP(TinyCNN(2, num_classes=3), TinyCNN(2, num_classes=3), blocks, blocks, first_stage_epochs=1, alpha=0.5)
    data = FromDatasets(_images(False), _images(True), num_classes=3, batch_size=4)
    assert _fit(method, data, max_epochs=2).callback_metrics["train/loss_kl"] > 0


def _loader(*batches):
    return torch.utils.data.DataLoader(list(batches), batch_size=None, shuffle=False)


@pytest.mark.parametrize("labels_first", [True, False])
def test_batches_with_and_without_labels_in_one_run_raise(labels_first):
    image, label = torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])
    batches = [{"image": image, "label": label}, {"image": image}]
    method = KD(TinyCNN(2, num_classes=3), TinyCNN(2, num_classes=3))
    first, second = ("labels", "none") if labels_first else ("none", "labels")
    message = f"training batches must have labels or none: the first has {first}, but batch 1 of epoch 0 has {second}"
    with pytest.raises(ValueError, match=message):
        _trainer(limit_val_batches=0).fit(method, _loader(*batches[:: 1 if labels_first else -1]))


def test_weights_that_leave_nothing_to_train():
    make = lambda: TinyCNN(2, num_classes=3)  # noqa: E731
    data = FromDatasets(_images(True), _images(True), num_classes=3, batch_size=4)
    with pytest.raises(ValueError, match="the loss of KD is always 0: gamma"):
        _fit(KD(make(), make(), gamma=0.0, alpha=0.0), data)
    blocks = ["block1", "block2"]
    for cls in (AttentionTransfer, FSP, SVDKD):
        with pytest.warns(UserWarning, match=f"{cls.__name__} trains only the layers up to the last tap: gamma"):
            _fit(cls(make(), make(), blocks, blocks, gamma=0.0), data)


def test_validation_without_a_labelled_pixel_warns():
    image = torch.rand(4, 3, 16, 16)
    labelled, ignored = ({"image": image, "label": torch.full((4, 16, 16), value)} for value in (1, 255))
    method = KD(TinyFCN(2, num_classes=3), TinyFCN(2, num_classes=3), task=Segmentation())
    with pytest.warns(UserWarning, match="none of the pixels of the val images"):
        _trainer().fit(method, _loader(labelled), _loader(ignored))
    with pytest.warns(UserWarning, match="none of the pixels of the train images"):
        _trainer().fit(method, _loader(ignored), _loader(labelled))


@pytest.mark.filterwarnings("error:none of the pixels")
def test_validation_with_some_ignored_maps_does_not_warn():
    image = torch.rand(4, 3, 16, 16)
    labelled, ignored = ({"image": image, "label": torch.full((4, 16, 16), value)} for value in (1, 255))
    method = KD(TinyFCN(2, num_classes=3), TinyFCN(2, num_classes=3), task=Segmentation())
    _trainer(max_epochs=2).fit(method, _loader(labelled), _loader(ignored, labelled))
    options = dict(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    L.Trainer(max_epochs=1, num_sanity_val_steps=1, **options).fit(method, _loader(labelled), _loader(ignored, labelled))


def _maps(label):
    return [(torch.rand(3, 16, 16), label)] * 4


def test_label_fill_may_exceed_the_dtype_of_the_label_maps():
    augment = Augment(crop=4, label_fill=-100)
    data = FromDatasets(_maps(np.zeros((16, 16), "uint8")), _maps(np.zeros((16, 16), "uint8")), num_classes=3, batch_size=4, augment=augment)
    seen = []
    method = KD(TinyFCN(2, num_classes=3), TinyFCN(2, num_classes=3), task=Segmentation(ignore_index=-100))
    check_labels = method.task.check_labels
    method.task.check_labels = lambda label, *arguments, **options: seen.append(label.unique().tolist()) or check_labels(label, *arguments, **options)
    _fit(method, data)
    assert seen[0] == [-100, 0]


@pytest.mark.parametrize(
    ("fill", "ignored", "message"), [(255, -100, "ignore_index of Segmentation \\(-100\\), got 255"), (2, -100, ""), (255, 255, "")]
)
def test_label_fill_must_be_a_class_or_ignored(fill, ignored, message):
    label = torch.zeros(16, 16).long()
    data = FromDatasets(_maps(label), _maps(label), num_classes=3, batch_size=4, augment=Augment(crop=4, label_fill=fill))
    method = KD(TinyFCN(2, num_classes=3), TinyFCN(2, num_classes=3), task=Segmentation(ignored))
    if not message:
        _fit(method, data)
        return
    with pytest.raises(ValueError, match=f"label_fill of Augment.*{message}"):
        _fit(method, data)


@pytest.mark.parametrize("label", [torch.zeros(1, 16, 16).long(), torch.zeros(16, 16), Image.new("RGB", (16, 16))], ids=["[1, H, W]", "float", "RGB"])
def test_errors_for_wrong_label_maps_name_the_expected_shape(label):
    data = FromDatasets(_maps(label), _maps(label), num_classes=3, batch_size=4)
    with pytest.raises(ValueError, match=r"the label of sample 0 must be .* or a label map of integers \[H, W\], got"):
        data.setup()


def test_samples_with_the_label_none_have_no_label():
    items = [(image, None) for image in torch.rand(8, 3, 8, 8)]
    data = FromDatasets(items, _images(True), num_classes=3, batch_size=4)
    assert "train/loss_kl" in _fit(KD(TinyCNN(2, num_classes=3), TinyCNN(2, num_classes=3)), data).callback_metrics
    mixed = FromDatasets([*items[:4], *_images(True)], _images(True), num_classes=3, batch_size=12)
    with pytest.raises(ValueError, match="all samples must have the same fields"):
        _fit(KD(TinyCNN(2, num_classes=3), TinyCNN(2, num_classes=3)), mixed)


def test_teachers_may_be_a_module_list():
    teachers = nn.ModuleList([TinyCNN(2, num_classes=3), TinyCNN(3, num_classes=3)])
    method = KD(TinyCNN(2, num_classes=3), teachers, combine_weights=[1.0, 2.0])
    assert method.teachers == list(teachers)
    with pytest.raises(ValueError, match="KD needs a teacher, got teacher=None"):
        KD(TinyCNN(2), None)
    with pytest.raises(ValueError, match="AttentionTransfer takes one teacher, got 2"):
        AttentionTransfer(TinyCNN(2), teachers, ["block1"], ["block1"])


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_weights_must_be_finite_and_not_negative(weight):
    make, blocks = (lambda: TinyCNN(2, num_classes=3)), (["block1", "block2"],) * 2
    for cls, taps, name in ((KD, (), "gamma"), (AttentionTransfer, blocks, "beta"), (FSP, blocks, "alpha"), (SVDKD, blocks, "beta")):
        with pytest.raises(ValueError, match=f"{name}, the weight of a term of the loss, must be finite and >= 0, got"):
            cls(make(), make(), *taps, **{name: weight})
