"""The trainers: what is trained and what is not, the losses, taps, data."""

import copy
import itertools

import pytest
import torch
from torch import nn

L = pytest.importorskip("lightning")
from kdkernels.data import ClutterDigits  # noqa: E402
from kdkernels.data.clutter_digits import MEAN, STD  # noqa: E402
from kdkernels.distill import KD, Supervised, kd_loss  # noqa: E402
from kdkernels.models import FeatureTaps, TinyCNN  # noqa: E402


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    module = ClutterDigits(train_size=64, val_size=32, test_size=48, batch_size=16, cache_dir=tmp_path_factory.mktemp("cache"))
    module.setup()
    return module


def _trainer(folder, **kwargs):
    options = dict(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, max_epochs=1)
    return L.Trainer(**options | kwargs)


def test_teacher_is_frozen_and_stays_out_of_the_checkpoint(data, tmp_path):
    student, teacher = TinyCNN(4), TinyCNN(8)
    before_teacher, before_student = copy.deepcopy(teacher.state_dict()), copy.deepcopy(student.state_dict())
    module = KD(student, teacher)
    trainer = _trainer(tmp_path)
    trainer.fit(module, data)
    assert all(torch.equal(v, teacher.state_dict()[k]) for k, v in before_teacher.items())  # batch norm statistics too
    assert not torch.equal(before_student["fc.weight"], student.fc.weight)
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    trainer.save_checkpoint(tmp_path / "kd.ckpt")
    stored = torch.load(tmp_path / "kd.ckpt", weights_only=True)
    assert all(key.startswith("student.") for key in stored["state_dict"])
    optimised = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert optimised == {id(p) for p in student.parameters()}


def test_teacher_moves_with_the_module():
    module = KD(TinyCNN(2), TinyCNN(2)).double()
    assert module.teacher.fc.weight.dtype == torch.float64


def test_a_checkpointed_student_becomes_the_teacher(data, tmp_path):
    first = Supervised(TinyCNN(8))
    trainer = _trainer(tmp_path)
    trainer.fit(first, data)
    trainer.save_checkpoint(tmp_path / "teacher.ckpt")
    torch.save(first.student.state_dict(), tmp_path / "teacher.pt")
    for file in ("teacher.ckpt", "teacher.pt"):
        module = KD(TinyCNN(4), TinyCNN(8), teacher_weights=tmp_path / file)
        assert torch.equal(module.teacher.fc.weight, first.student.fc.weight)
    with pytest.raises(FileNotFoundError, match="teacher_weights: there is no file"):
        KD(TinyCNN(4), TinyCNN(8), teacher_weights=tmp_path / "nowhere.ckpt")
    with pytest.raises(RuntimeError, match="size mismatch"):
        KD(TinyCNN(4), TinyCNN(9), teacher_weights=tmp_path / "teacher.pt")


def test_kd_step_is_kd_loss(data):
    module = KD(TinyCNN(4), TinyCNN(8), temperature=3.0, gamma=0.2, alpha=0.7).eval()
    batch = next(iter(data.val_dataloader()))
    logits, losses = module.losses(batch)
    expected = kd_loss(logits, module.teacher(batch["image"]), batch["label"], 3.0, gamma=0.2, alpha=0.7)
    assert torch.allclose(sum(losses.values()), expected, rtol=1e-6)
    with pytest.raises(ValueError, match="temperature must be > 0"):
        KD(TinyCNN(4), TinyCNN(8), temperature=0)


def test_resume_is_exact(data, tmp_path):
    """Two epochs in one go, and one epoch, a new process's worth of fresh objects, and the other: the same weights to the bit."""
    teacher = TinyCNN(8)

    class StopAfterFirst(L.Callback):
        def on_train_epoch_end(self, trainer, module):
            trainer.should_stop = True

    def run(folder, start=None, stop=False):
        L.seed_everything(3, verbose=False)
        keep = L.pytorch.callbacks.ModelCheckpoint(folder, save_last=True, save_top_k=0, enable_version_counter=False)
        trainer = _trainer(folder, max_epochs=2, enable_checkpointing=True, callbacks=[keep, *([StopAfterFirst()] if stop else [])])
        module = KD(TinyCNN(4), teacher)
        trainer.fit(module, ordered, ckpt_path=start, weights_only=True)
        return module.student.state_dict()

    class Ordered(L.LightningDataModule):  # the order of the images is not part of a checkpoint
        def train_dataloader(self):
            return data.val_dataloader()

        def val_dataloader(self):
            return data.val_dataloader()

    ordered = Ordered()
    whole = run(tmp_path / "whole")
    half = run(tmp_path / "half", stop=True)
    assert not torch.equal(half["fc.weight"], whole["fc.weight"])
    resumed = run(tmp_path / "half", start=tmp_path / "half" / "last.ckpt")
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_clutter_digits(data, tmp_path):
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (16, 3, 32, 32)
    assert batch["image"].dtype == torch.float32
    assert batch["label"].dtype == torch.int64
    assert batch["mask"].shape == (16, 32, 32)
    assert batch["mask"].dtype == torch.bool
    assert batch["mask"].flatten(1).any(1).all()  # a digit in every image
    same = ClutterDigits(train_size=64, val_size=32, test_size=48, cache_dir=tmp_path)
    same.setup()
    other = ClutterDigits(train_size=64, val_size=32, test_size=48, seed=1, cache_dir=tmp_path)
    other.setup()
    for split in ("train", "val", "test"):
        assert torch.equal(data.splits[split].image, same.splits[split].image)
        assert not torch.equal(data.splits[split].image, other.splits[split].image)
    assert not list(tmp_path.glob("*tmp*"))
    # ink and background differ by the contrast that was asked for, less noise and clamping
    images = same.splits["test"]
    for image, mask in zip(images.image.float() / 255, images.mask, strict=True):
        assert abs(image[:, mask].mean() - image[:, ~mask].mean()) > 0.1
    pixel = images[0]["image"][0, 0, 0]
    assert torch.allclose(pixel, (images.image[0, 0, 0, 0] / 255 - MEAN[0]) / STD[0])


def test_splits_share_no_digit():
    """Each split is drawn from a pool of scans of its own."""
    from kdkernels.data import clutter_digits

    edges = sorted(clutter_digits._SPLITS.values())
    assert edges[0][0] == 0
    assert edges[-1][1] == 1
    assert all(a[1] == b[0] for a, b in itertools.pairwise(edges))


def test_clutter_digits_refuses_nonsense():
    with pytest.raises(ValueError, match="train_size must be at least 1"):
        ClutterDigits(train_size=0)
    with pytest.raises(ValueError, match=r"contrast must lie in \[0, 0.5\]"):
        ClutterDigits(contrast=0.9)


def test_taps():
    model = TinyCNN(4)
    taps = FeatureTaps(model, ["block1", "block3.0"])
    logits, features = taps(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 10)
    assert {k: tuple(v.shape) for k, v in features.items()} == {"block1": (2, 4, 16, 16), "block3.0": (2, 16, 8, 8)}
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(ValueError, match=r"no layer 'blok1'; did you mean one of \['block1'"):
        FeatureTaps(model, ["blok1"])

    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(RuntimeError, match="did not run"):
        FeatureTaps(Unused(), ["unused"])(torch.zeros(1, 2))
