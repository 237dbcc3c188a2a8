"""Methods with the options of Lightning's Trainer, and with networks, teachers and data loaders
that cause problems only in training.
"""

import copy
import logging
import pickle

import pytest
import torch
from torch import nn

pytest.importorskip("lightning")
import lightning as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from tiny_runs import IMAGES, Small, data_of, fit, loader_of

from kdkernels.data import Digits, FromDatasets
from kdkernels.data.loading import Batches
from kdkernels.distill import FSP, KD, SVDKD, AttentionTransfer, Supervised
from kdkernels.distill.engine import checkpoints
from kdkernels.models import FeatureTaps, TinyCNN


@pytest.fixture(autouse=True)
def _use_temporary_folder(tmp_path_factory, monkeypatch):
    """Change to a temporary folder, because a Trainer without options writes its checkpoints to the
    current folder.
    """
    monkeypatch.chdir(tmp_path_factory.mktemp("current"))


# Checkpoints.


@pytest.mark.parametrize(
    ("options", "step"),
    [
        ({"max_epochs": 5, "check_val_every_n_epoch": 3}, 15),
        ({"max_epochs": 2, "check_val_every_n_epoch": 3}, 6),
        ({"max_epochs": 2, "limit_val_batches": 0}, 6),
        ({"max_epochs": 2, "val_check_interval": 0.5}, 6),
        ({"max_epochs": 9, "max_steps": 4}, 4),
        ({"max_epochs": 9, "max_steps": 2, "accumulate_grad_batches": 2}, 2),
        ({"max_epochs": 2, "overfit_batches": 1}, 2),
        ({"max_epochs": 2, "limit_train_batches": 2}, 4),
    ],
    ids=str,
)
def test_last_checkpoint_holds_the_last_step(tmp_path, options, step):
    monitor = None if options.get("limit_val_batches") == 0 else "val/accuracy"
    method = KD(Small(), Small(8))
    trainer = fit(method, callbacks=checkpoints(tmp_path, monitor), enable_checkpointing=True, **options)
    assert trainer.global_step == step
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert stored["global_step"] == step
    assert all(torch.equal(v, stored["state_dict"][f"student.{k}"]) for k, v in method.student.state_dict().items())


def test_resuming_with_another_optimizer_raises(tmp_path):
    fit(KD(Small(), Small()), callbacks=checkpoints(tmp_path), enable_checkpointing=True)
    old = torch.load(tmp_path / "last.ckpt", weights_only=True)
    del old["kdkernels"]["stepped_by"]  # written by a version that did not store this entry
    torch.save(old, tmp_path / "old.ckpt")
    others = {
        "optimizer": lambda p: torch.optim.AdamW(p, lr=1e-3),
        "scheduler": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [1]),
    }
    for name, other in others.items():
        for file in ("last.ckpt", "old.ckpt") if name == "optimizer" else ("last.ckpt",):
            trainer = L.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
            with pytest.raises(ValueError, match=r"the checkpoint was trained with .*cannot be resumed with .*(AdamW|MultiStepLR).*student_weights"):
                trainer.fit(KD(Small(), Small(), **{name: other}), data_of(), ckpt_path=tmp_path / file, weights_only=True)
    trainer = L.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(KD(Small(), Small()), data_of(), ckpt_path=tmp_path / "old.ckpt", weights_only=True)
    assert trainer.global_step == 6


# Weights of micro-batches, with options that change the number of micro-batches per optimizer step.


class Recorder(L.Callback):
    """Records the weight of each sample in each optimizer step.

    In a step all weights must be equal.
    """

    def __init__(self):
        self.steps, self.window = [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.window += [batch["share"] / len(batch["label"]) / trainer.accumulate_grad_batches] * len(batch["label"])

    def on_before_optimizer_step(self, *_):
        self.steps.append(self.window)
        self.window = []


@pytest.mark.parametrize(
    "options",
    [
        {"callbacks": [GradientAccumulationScheduler({0: 1, 1: 2, 2: 3})]},
        {"accumulate_grad_batches": 2, "limit_train_batches": 3},
        {"accumulate_grad_batches": 4, "limit_train_batches": 0.8},
        {"accumulate_grad_batches": 2, "overfit_batches": 3},
        {"accumulate_grad_batches": 3, "reload_dataloaders_every_n_epochs": 1},
        {"accumulate_grad_batches": 2},
    ],
    ids=["scheduled", "2 of 3", "4 of 0.8", "2, overfitted", "3, reloaded", "2"],
)
@pytest.mark.parametrize("count", [10, 11, 12])
def test_all_samples_of_an_optimizer_step_have_equal_weight(options, count):
    recorder = Recorder()
    options = options | {"callbacks": [*options.get("callbacks", []), recorder], "max_epochs": 4, "limit_val_batches": 0}
    trainer = fit(Supervised(Small()), data_of(IMAGES[:count], batch_size=2), **options)
    assert len(recorder.steps) == trainer.global_step
    assert not recorder.window
    for weights in recorder.steps:
        torch.testing.assert_close(torch.tensor(weights), torch.full((len(weights),), 1 / len(weights)))
    assert trainer.optimizers[0].param_groups[0]["lr"] < 0.01  # the learning-rate schedule has reached its end


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_batch_of_every_process_has_at_least_two_samples(world):
    for size in range(2 * world, 40):
        for batch_size in (2, 5, 7):
            batches = [list(Batches(size, batch_size, True, min_samples=2, rank=r, world=world)) for r in range(world)]
            counts = [len(draw.index) for process_batches in batches for draw in process_batches]
            assert min(counts) >= 2
            assert sorted(i for process_batches in batches for draw in process_batches for i in draw.index) == list(range(size))


def test_batch_norm_never_receives_a_batch_of_one_sample():
    student = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    assert fit(Supervised(student), data_of(IMAGES[:9])).global_step == 2


# Overfitting, predicting, pickling.


def test_overfit_batches_repeats_the_same_batches_in_order():
    seen = []

    class RecordIndices(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            seen.append(batch["index"].tolist())

    fit(Supervised(Small()), max_epochs=2, overfit_batches=2, callbacks=[RecordIndices()])
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2


def test_predict_returns_logits_in_dataset_order():
    method = KD(Small(), Small()).eval()
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    found = trainer.predict(method, data_of(batch_size=5))
    assert torch.cat([f["index"] for f in found]).tolist() == list(range(12))
    with torch.no_grad():
        expected = method.student(torch.stack([image for image, _ in IMAGES]))
    torch.testing.assert_close(torch.cat([f["logits"] for f in found]), expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda: KD(TinyCNN(4), TinyCNN(4)),
        lambda: Supervised(TinyCNN(4)),
        lambda: AttentionTransfer(TinyCNN(4), TinyCNN(4), ["block1"], ["block1"]),
        lambda: FSP(TinyCNN(4), TinyCNN(4), ["block1", "block2"], ["block1", "block2"]),
        lambda: SVDKD(TinyCNN(4), TinyCNN(4), ["block1", "block2"], ["block1", "block2"]),
    ],
    ids=["KD", "Supervised", "AttentionTransfer", "FSP", "SVDKD"],
)
def test_methods_can_be_pickled_and_copied(make):
    method = make()
    image = torch.rand(2, 3, 32, 32)
    method.eval()
    for other in (pickle.loads(pickle.dumps(method)), copy.deepcopy(method)):
        assert torch.equal(other(image), method(image))
        assert other.student_taps.module is other.student
        assert other.teacher is None or other.teacher is not method.teacher
    optimizer = method.make_optimizer(method.student.parameters())
    assert (optimizer.defaults["lr"], optimizer.defaults["momentum"], optimizer.defaults["nesterov"]) == (0.1, 0.9, True)


# Networks.


def test_teacher_stays_unchanged_even_if_train_is_called_on_it():
    teacher = Small()
    method = KD(Small(), teacher)

    class Unfreeze(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            teacher.train()

    teacher.train()
    before = copy.deepcopy(teacher.state_dict())
    fit(method, callbacks=[Unfreeze()])
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    method.train()
    assert not any(part.training for part in teacher.modules())


def test_layers_shared_by_student_and_teacher_raise():
    student, teacher = Small(), Small()
    teacher.features = student.features
    with pytest.raises(ValueError, match=r"student and teacher share 9 tensors \(features.0.weight, .*copy.deepcopy"):
        KD(student, teacher)
    assert all(p.requires_grad for p in student.parameters())
    with pytest.raises(ValueError, match="share"):
        KD(student, student)


class Hidden(Small):
    """Returns a dict without logits in training mode."""

    def forward(self, x):
        logits = super().forward(x)
        return {"scores": logits, "loss": None} if self.training else logits


class Gray(Small):
    def __init__(self):
        super().__init__()
        self.features[0] = nn.Conv2d(1, 4, 3)


class Broken(Small):
    def forward(self, x):
        if self.training:
            raise KeyError("switch")
        return super().forward(x)


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (Hidden, r"in training mode the student \(Hidden\) must return logits .* it returned a dict of 'scores': \[2, 3\], 'loss': NoneType"),
        (Gray, r"the student \(Gray\) cannot process images \[2, 3, 8, 8\]: .*expected input"),
        (Broken, r"in training mode the student \(Broken\) cannot process images \[2, 3, 8, 8\]: 'switch'"),
    ],
)
@pytest.mark.parametrize("loader", [False, True])
def test_networks_are_checked_in_training_mode(student, message, loader):
    data = torch.utils.data.DataLoader(IMAGES, batch_size=1) if loader else None  # a first batch of one image
    with pytest.raises(ValueError, match=message):
        fit(Supervised(student()), data)


def test_network_check_changes_neither_student_nor_random_state():
    student = nn.Sequential(Small(), nn.Dropout(0.5))
    method = Supervised(student)
    before = copy.deepcopy(student.state_dict())
    method._trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    state = torch.get_rng_state()
    method._check_networks(torch.rand(2, 3, 8, 8, generator=torch.Generator()), 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    assert student.training


def test_uninitialized_lazy_layers_raise():
    for name, networks in {"student": (nn.LazyLinear(3), Small()), "teacher": (Small(), nn.LazyLinear(3))}.items():
        with pytest.raises(ValueError, match=rf"the {name} \(LazyLinear\) has layers whose sizes are not known yet"):
            KD(*networks)


def test_layers_inside_compiled_modules_cannot_be_tapped():
    network = torch.compile(Small(), backend="eager")
    for name in ("features.2", "_orig_mod.features.2"):
        with pytest.raises(ValueError, match=rf"layer '{name}' of Small cannot be tapped: torch.compile hides"):
            FeatureTaps(network, [name])
    part = Small()
    part.features = torch.compile(part.features, backend="eager")
    with pytest.raises(ValueError, match=r"layer 'features\.2' of Small cannot be tapped"):
        FeatureTaps(part, ["features.2"])
    _, caught = FeatureTaps(part, ["features"])(torch.rand(2, 3, 8, 8))  # the compiled module as a whole can be tapped
    assert caught["features"].shape == (2, 4, 2, 2)
    inside = Small()
    inside.features.compile(backend="eager")
    with pytest.raises(ValueError, match="cannot be tapped"):
        FeatureTaps(inside, ["features.0"])
    fit(KD(network, Small()))


def test_labels_are_checked_in_every_batch_of_training():
    """Lightning's sanity check of validation runs first. It must not count as the check of
    training.
    """
    late = IMAGES[:8] + [(image, 7) for image, _ in IMAGES[8:]]
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 2\]"):
        fit(Supervised(Small()), data_of(late))
    loaders = [torch.utils.data.DataLoader(images, batch_size=4) for images in (late, IMAGES)]
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match="a training batch has 7 to 7"):
        trainer.fit(Supervised(Small()), *loaders)


def test_soft_labels_train():
    soft = [(image, torch.eye(3)[label] * 0.9 + 1 / 30) for image, label in IMAGES]
    method = KD(Small(), Small())
    metrics = fit(method, FromDatasets(soft, soft, num_classes=3, batch_size=4)).callback_metrics
    assert metrics["val/cross_entropy"].isfinite()
    hard = fit(method, data_of(), max_epochs=0).validate(method, data_of(), verbose=False)[0]
    assert hard["val/accuracy"] == pytest.approx(float(metrics["val/accuracy"]))


# Warnings and log messages.


def test_teacher_no_better_than_chance_causes_a_warning(caplog):
    data = Digits(batch_size=200)
    with pytest.warns(UserWarning, match=r"the teacher \(TinyCNN\) classifies .* no better than chance with 10 classes: check that its weights"):
        fit(KD(TinyCNN(2), TinyCNN(2)), data, limit_train_batches=1)


def test_teacher_accuracy_is_logged_once(caplog):
    class PartlyCorrect(nn.Module):
        """Predicts the correct class for two thirds of the images."""

        def forward(self, x):
            keys = torch.stack([image for image, _ in IMAGES])
            nearest = torch.cdist(x.flatten(1), keys.flatten(1)).argmin(1)
            return nn.functional.one_hot(torch.where(nearest % 3 == 2, 0, nearest % 3), 3).float()

    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        fit(KD(Small(), PartlyCorrect()), max_epochs=3)
    messages = [r.getMessage() for r in caplog.records if "teacher's accuracy" in r.getMessage()]
    assert messages == ["the teacher's accuracy on the 12 validation images: 0.6667"]


def test_cross_entropy_has_the_same_definition_in_training_and_validation():
    frozen = Small().requires_grad_(False)
    frozen.head.weight.requires_grad_(True)
    method = KD(frozen.eval(), Small(), gamma=0.25, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    for part in frozen.modules():  # so that both modes use the statistics of the batch
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 0.0
            part.track_running_stats = False
            part.running_mean = part.running_var = None
    metrics = fit(method, data_of(batch_size=12)).callback_metrics
    torch.testing.assert_close(metrics["train/cross_entropy"], metrics["val/cross_entropy"])
    torch.testing.assert_close(metrics["train/loss_cross_entropy"], 0.25 * metrics["train/cross_entropy"])
    torch.testing.assert_close(metrics["train/loss"], metrics["train/loss_cross_entropy"] + metrics["train/loss_kl"])


# The first stage of training in two stages.


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv, self.scale = nn.Conv2d(width, width, 3, padding=1), nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return x + self.scale * self.conv(x)


class ResidualNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.head = nn.Conv2d(3, 4, 3, 2), Residual(4), Residual(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.b(self.a(self.stem(x))).mean((2, 3)))


def test_first_stage_trains_branches_whose_scale_is_initially_zero():
    student = ResidualNet()
    before = copy.deepcopy(student.state_dict())
    optimizer = lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1)  # noqa: E731
    taps = ["stem", "a"]
    fit(FSP(student, ResidualNet(), taps, taps, first_stage_epochs=2, optimizer=optimizer), max_epochs=2)
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"stem.weight", "stem.bias", "a.conv.weight", "a.conv.bias", "a.scale"}


# Further cases.


@pytest.mark.parametrize("options", [{"max_steps": 2}, {"max_steps": 4}, {"max_steps": 2, "accumulate_grad_batches": 2}], ids=str)
def test_run_ended_by_max_steps_resumes_exactly(tmp_path, options):
    """Also if the run ended in the middle of an epoch: the remaining batches follow when it is
    resumed.
    """

    def method():
        torch.manual_seed(5)
        return Supervised(Small(), scheduler=lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0))

    common = {key: value for key, value in options.items() if key != "max_steps"} | {"max_epochs": 3}
    whole, first, second = method(), method(), method()
    expected = fit(whole, **common)
    fit(first, callbacks=checkpoints(tmp_path), enable_checkpointing=True, **common | options)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False, **common)
    trainer.fit(second, data_of(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert trainer.global_step == expected.global_step
    assert all(torch.equal(v, second.student.state_dict()[k]) for k, v in whole.student.state_dict().items())


@pytest.mark.parametrize("options", [{"batch_size": 3}, {"batch_size": 6}, {"order_seed": 1}], ids=str)
def test_resuming_within_an_epoch_in_another_sample_order_raises(tmp_path, options):
    fit(Supervised(Small()), callbacks=checkpoints(tmp_path), enable_checkpointing=True, max_steps=2)
    trainer = L.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"within an epoch of 12 samples in batches of 4 .*, and cannot be resumed within it with 12 samples"):
        trainer.fit(Supervised(Small()), data_of(**options), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    fit(Supervised(Small()), callbacks=checkpoints(tmp_path), enable_checkpointing=True, max_epochs=1)  # allowed at the end of an epoch
    trainer = L.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    trainer.fit(Supervised(Small()), data_of(**options), ckpt_path=tmp_path / "last.ckpt", weights_only=True)


def test_load_from_checkpoint_restores_a_method(tmp_path):
    method = KD(Small(), Small())
    trainer = fit(method)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = KD.load_from_checkpoint(tmp_path / "a.ckpt", student=Small(), teacher=Small(), weights_only=True)
    assert all(torch.equal(v, loaded.student.state_dict()[k]) for k, v in method.student.state_dict().items())


def test_splits_use_different_random_numbers():
    class Noise(torch.utils.data.Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, i):
            return torch.rand(3, 8, 8), i % 3

    data = FromDatasets(Noise(), Noise(), Noise(), num_classes=3, batch_size=12)
    data.setup()
    seen = []
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        batch = next(iter(loader))
        seen.append(batch["image"][batch["index"].argsort()])
    assert all((a[:, None] != b[None]).flatten(2).any(2).all() for a, b in [seen[:2], seen[1:], seen[::2]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i, image, label: ((image * 255).byte() if i % 2 else image, label), "all images must have the same dtype"),
        (lambda i, image, label: {"image": image, "label": label, "mix": 0.5}, r"fields \['mix'\], names that are reserved in a batch"),
        (lambda i, image, label: {"image": image, "label": label, "name": "x"}, r"field 'name' of sample \d+ must be a number, .*, got str"),
        (lambda i, image, label: (image, "cat"), r"field 'label' of sample \d+ must be a number, .*, got str"),
        (lambda i, image, label: {"image": image, "label": label} | ({"x": 1} if i else {}), "all samples must have the same fields"),
        (lambda i, image, label: next(iter(())), r"the dataset raised StopIteration for sample \d+"),
    ],
)
def test_invalid_samples_raise(change, message):
    class Odd(torch.utils.data.Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, i):
            return change(i, *IMAGES[i])

    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        fit(Supervised(Small()), FromDatasets(Odd(), Odd(), num_classes=3, batch_size=4))


def test_label_formats_of_plain_data_loaders():
    images, labels = torch.stack([image for image, _ in IMAGES]), torch.tensor([label for _, label in IMAGES])
    for good in (labels[:, None], labels.int(), labels.to(torch.uint8), torch.eye(3)[labels]):
        assert fit(Supervised(Small()), loader_of(images, good)).callback_metrics["train/loss"] > 0
    for bad, message in (
        (torch.eye(3)[labels] * 5 - 2, "must be >= 0 and have the sum 1 for each image"),
        (torch.eye(3).long()[labels], r"must be class indices \[B\], or probabilities \[B, K\] of a floating-point dtype"),
        (torch.eye(4)[labels], r"must have the shape \[B, 3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(Supervised(Small()), loader_of(images, bad))
    with pytest.raises(TypeError, match=r"images must be floating point, got torch.uint8"):
        fit(Supervised(Small()), loader_of((images * 255).byte(), labels))
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    trainer.fit(Supervised(Small()), loader_of(images, labels), [loader_of(images, labels), loader_of(images, labels)])
    assert "val/accuracy/dataloader_idx_1" in trainer.callback_metrics


def test_validation_checks_the_number_of_classes():
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"the data have 4 classes, but the student \(Small\) returned logits \[4, 3\]"):
        trainer.validate(Supervised(Small()), FromDatasets(IMAGES, IMAGES, num_classes=4, batch_size=4))


def test_student_passed_in_eval_mode_is_set_to_training_mode():
    method = Supervised(Small().eval())
    fit(method)
    assert method.student.features[1].num_batches_tracked == 3
    partly = Small()
    partly.features.eval()  # intended: frozen statistics
    fit(Supervised(partly))
    assert partly.features[1].num_batches_tracked == 0


class Detached(Small):
    def forward(self, x):
        return super().forward(x).detach()


def test_students_without_trainable_outputs_and_invalid_temperatures_raise():
    for student in (Small().requires_grad_(False), Detached()):
        with pytest.raises(ValueError, match="do not depend on any trainable parameter"):
            fit(Supervised(student))
    for temperature in (0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="temperature must be > 0 and finite"):
            KD(Small(), Small(), temperature=temperature)


def test_tensor_memory_shared_with_the_teacher_raises():
    student, teacher = Small(), Small()
    teacher.head.weight.data = student.head.weight.data
    with pytest.raises(ValueError, match=r"share 1 tensors \(head.weight\)"):
        KD(student, teacher)
