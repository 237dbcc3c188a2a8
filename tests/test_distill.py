"""The methods in training: trained and frozen parameters, losses, and invalid inputs."""

import copy

import pytest
import torch
from torch import nn

L = pytest.importorskip("lightning")
from kdkernels.data import Augment, ClutterDigits  # noqa: E402
from kdkernels.distill import KD, Distiller, Supervised, kd_loss  # noqa: E402
from kdkernels.distill.batch import as_batch  # noqa: E402
from kdkernels.models import TinyCNN, pair_features  # noqa: E402
from kdkernels.tasks import Classification  # noqa: E402


@pytest.fixture(scope="module")
def data():
    module = ClutterDigits(train_size=64, val_size=32, test_size=48, batch_size=16)
    module.setup()
    return module


def _trainer(folder, **kwargs):
    options = dict(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, max_epochs=1)
    return L.Trainer(**options | kwargs)


def test_teacher_is_frozen_and_not_in_the_checkpoint(data, tmp_path):
    student, teacher = TinyCNN(4), TinyCNN(8)
    before_teacher, before_student = copy.deepcopy(teacher.state_dict()), copy.deepcopy(student.state_dict())
    module = KD(student, teacher)
    trainer = _trainer(tmp_path)
    trainer.fit(module, data)
    assert all(torch.equal(v, teacher.state_dict()[k]) for k, v in before_teacher.items())  # including batch norm statistics
    assert not torch.equal(before_student["fc.weight"], student.fc.weight)
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    trainer.save_checkpoint(tmp_path / "kd.ckpt")
    stored = torch.load(tmp_path / "kd.ckpt", weights_only=True)
    assert all(key.startswith("student.") for key in stored["state_dict"])
    optimized = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert optimized == {id(p) for p in student.parameters()}


def test_teacher_is_converted_with_the_module():
    module = KD(TinyCNN(2), TinyCNN(2)).double()
    assert module.teacher.fc.weight.dtype == torch.float64


def test_teacher_weights_from_checkpoints(data, tmp_path):
    first = Supervised(TinyCNN(8))
    trainer = _trainer(tmp_path)
    trainer.fit(first, data)
    trainer.save_checkpoint(tmp_path / "teacher.ckpt")
    torch.save(first.student.state_dict(), tmp_path / "teacher.pt")
    for file in ("teacher.ckpt", "teacher.pt"):
        module = KD(TinyCNN(4), TinyCNN(8), teacher_weights=tmp_path / file)
        assert torch.equal(module.teacher.fc.weight, first.student.fc.weight)
    with pytest.raises(FileNotFoundError, match="weights: there is no file"):
        KD(TinyCNN(4), TinyCNN(8), teacher_weights=tmp_path / "nowhere.ckpt")
    with pytest.raises(ValueError, match="does not fit TinyCNN"):
        KD(TinyCNN(4), TinyCNN(9), teacher_weights=tmp_path / "teacher.pt")


def test_losses_of_kd_sum_to_kd_loss(data):
    module = KD(TinyCNN(4), TinyCNN(8), temperature=3.0, gamma=0.2, alpha=0.7).eval()
    batch = data.finish(next(iter(data.val_dataloader())))
    logits, losses = module.losses(batch)
    expected = kd_loss(logits, module.teacher(batch["image"]), batch["label"], 3.0, gamma=0.2, alpha=0.7)
    assert torch.allclose(sum(losses.values()), expected, rtol=1e-6)
    with pytest.raises(ValueError, match="temperature must be > 0"):
        KD(TinyCNN(4), TinyCNN(8), temperature=0)


def test_methods_can_share_a_teacher(data, tmp_path):
    teacher = TinyCNN(8)
    methods = [KD(TinyCNN(4), teacher), KD(TinyCNN(2), teacher)]
    assert methods[0].teacher is methods[1].teacher
    before = copy.deepcopy(teacher.state_dict())
    for method in methods:
        _trainer(tmp_path).fit(method, data)
    assert all(torch.equal(v, teacher.state_dict()[k]) for k, v in before.items())


def test_batches_may_be_pairs(tmp_path):
    pairs = torch.utils.data.TensorDataset(torch.randn(12, 3, 32, 32), torch.randint(10, (12,)))
    loader = torch.utils.data.DataLoader(pairs, batch_size=4)
    trainer = _trainer(tmp_path)
    trainer.fit(KD(TinyCNN(2), TinyCNN(2)), loader, loader)
    assert "val/accuracy" in trainer.callback_metrics


def test_cross_entropy_of_mixed_labels():
    logits, label, other = torch.randn(6, 10), torch.randint(10, (6,)), torch.randint(10, (6,))
    mix = torch.rand(6)
    target = mix[:, None] * nn.functional.one_hot(label, 10) + (1 - mix[:, None]) * nn.functional.one_hot(other, 10)
    expected = nn.functional.cross_entropy(logits, target)
    torch.testing.assert_close(Classification().label_loss(logits, {"label": label, "mixed_label": other, "mix": mix}), expected)


@pytest.mark.parametrize("method", ["mixup", "cutmix"])
def test_training_with_mixed_images(data, tmp_path, method):
    mixed = ClutterDigits(train_size=64, val_size=32, test_size=48, batch_size=16, augment=Augment(crop=2, **{method: 0.5}))
    trainer = _trainer(tmp_path)
    trainer.fit(KD(TinyCNN(2), TinyCNN(2)), mixed)
    assert trainer.callback_metrics["train/loss_kl"].isfinite()


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_training_in_several_precisions(data, tmp_path, precision):
    trainer = _trainer(tmp_path, precision=precision)
    trainer.fit(KD(TinyCNN(2), TinyCNN(2)), data)
    assert trainer.callback_metrics["train/loss_kl"].isfinite()


# Invalid inputs: the error comes before training, and names the cause.


def test_wrong_number_of_classes_raises(data, tmp_path):
    with pytest.raises(ValueError, match=r"the data have 10 classes, but the student \(TinyCNN\) has 7"):
        _trainer(tmp_path).fit(Supervised(TinyCNN(2, num_classes=7)), data)
    with pytest.raises(ValueError, match=r"the data have 10 classes, but the teacher \(TinyCNN\) has 12"):
        _trainer(tmp_path).fit(KD(TinyCNN(2), TinyCNN(2, num_classes=12)), data)
    pairs = torch.utils.data.TensorDataset(torch.randn(8, 3, 32, 32), torch.full((8,), 10))
    loader = torch.utils.data.DataLoader(pairs, batch_size=4)  # data without the number of classes
    with pytest.raises(ValueError, match=r"student and teacher must have the same number of classes, got 10 and 12"):
        _trainer(tmp_path).fit(KD(TinyCNN(2), TinyCNN(2, num_classes=12)), loader)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 9\], the classes of the networks; a training batch has 10 to 10"):
        _trainer(tmp_path).fit(Supervised(TinyCNN(2)), loader)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 9\]"):  # already where validation is tried out
        _trainer(tmp_path).fit(Supervised(TinyCNN(2)), torch.utils.data.DataLoader(torch.utils.data.Subset(pairs, [])), loader)


def test_network_that_returns_no_logits_raises(data, tmp_path):
    with pytest.raises(
        ValueError, match=r"the student \(Conv2d\) must return logits \[B, K\] for images \[2, 3, 32, 32\], it returned \[2, 4, 32, 32\]"
    ):
        _trainer(tmp_path).fit(Supervised(nn.Conv2d(3, 4, 3, padding=1)), data)


class Hint(KD):
    """A minimal method that compares features."""

    def check_features(self, student, teacher):
        pair_features(student, teacher, channels=True)

    def losses(self, batch):
        _, teacher_features = self.teacher_outputs(batch)
        logits, features = self.student_outputs(batch)
        return logits, {"hint": sum((s.mean((2, 3)) - t.mean((2, 3))).square().mean() for s, t in pair_features(features, teacher_features))}


def test_taps_that_do_not_match_raise(data, tmp_path):
    with pytest.raises(ValueError, match=r"student tap 'block1' \[2, 2, 16, 16\] and teacher tap 'block1' \[2, 4, 16, 16\] do not match"):
        _trainer(tmp_path).fit(Hint(TinyCNN(2), TinyCNN(4), student_taps=["block1"], teacher_taps=["block1"]), data)
    trainer = _trainer(tmp_path)
    trainer.fit(Hint(TinyCNN(2), TinyCNN(1), student_taps=["block1"], teacher_taps=["block2"], optimizer=torch.optim.AdamW), data)


def test_non_finite_loss_stops_training_before_the_step(data, tmp_path):
    class NonFinite(KD):
        def losses(self, batch):
            logits, losses = super().losses(batch)
            if self.global_step == 2 and self.training:
                losses["kl"] = losses["kl"] / 0 * 0
            return logits, losses

    method = NonFinite(TinyCNN(2), TinyCNN(2))
    with pytest.raises(
        FloatingPointError, match=r"not finite at step 2 \(epoch 0, batch 2\): cross_entropy = [\d.]+, kl = nan.*not_finite_step_2"
    ) as error:
        _trainer(tmp_path).fit(method, data)
    assert all(p.isfinite().all() for p in method.parameters())
    (path,) = tmp_path.glob("not_finite_step_2_rank_0.pt")
    assert str(path) in str(error.value)
    stored = torch.load(path, weights_only=True)
    assert stored["batch"]["image"].shape == (16, 3, 32, 32)
    restored = KD(TinyCNN(2), method.teacher)
    restored.student.train()
    torch.testing.assert_close(restored.replay(path)["cross_entropy"].item(), stored["losses"]["cross_entropy"])


def test_method_without_teacher_raises():
    with pytest.raises(ValueError, match="need a teacher"):
        Distiller(TinyCNN(2), teacher_weights="file.pt")


@pytest.mark.parametrize("name", ["labels", "target", "targets", "y"])
def test_labels_under_another_key_raise(name):
    """Otherwise the network would be trained without labels."""
    with pytest.raises(ValueError, match=f"must have the key \"label\", but the batch has the key '{name}': rename it"):
        as_batch({"image": torch.zeros(4, 3, 8, 8), name: torch.zeros(4, dtype=torch.long)})


@pytest.mark.parametrize("label", [torch.zeros(3), torch.tensor(1), torch.zeros(8, 1)])
def test_another_number_of_labels_than_of_images_raises(label):
    with pytest.raises(ValueError, match="one label for each of its 4 images, got labels of shape"):
        as_batch({"image": torch.zeros(4, 3, 8, 8), "label": label})
