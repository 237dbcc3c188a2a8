"""Learning-rate schedules, checkpoints and early stopping that monitor a logged metric."""

import copy

import pytest
import torch

pytest.importorskip("lightning")
import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from tiny_runs import IMAGES, Small, fit, loader_of

from kdkernels.distill import KD, Supervised
from kdkernels.distill.engine import checkpoints


@pytest.fixture(autouse=True)
def _use_temporary_folder(tmp_path_factory, monkeypatch):
    """Change to a temporary folder, because a Trainer without options writes its checkpoints to the
    current folder.
    """
    monkeypatch.chdir(tmp_path_factory.mktemp("current"))


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("every", [1, 2])
def test_plateau_schedule_monitors_a_validation_metric(mode, every):
    method = KD(Small(), Small(), scheduler=lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, mode, patience=0, factor=0.5, threshold=10.0))
    trainer = fit(method, max_epochs=4, check_val_every_n_epoch=every)
    config = trainer.lr_scheduler_configs[0]
    assert config.monitor == {"max": "val/accuracy", "min": "val/cross_entropy"}[mode]
    assert config.scheduler.last_epoch == 4 // every
    with pytest.raises(ValueError, match=r"monitors 'val/.*there is no validation"):
        fit(method, limit_val_batches=0)


@pytest.mark.parametrize("watcher", [EarlyStopping, ModelCheckpoint])
def test_monitoring_a_metric_that_is_not_logged_raises_before_training(watcher, tmp_path):
    student = Small()
    before = copy.deepcopy(student.state_dict())
    for name in ("val_loss", "val_acc"):
        with pytest.raises(ValueError, match=rf"{watcher.__name__} monitors '{name}', which is not logged: use val/accuracy, val/cross_entropy"):
            fit(KD(student, Small()), callbacks=[watcher(monitor=name)], enable_checkpointing=True, default_root_dir=tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    fit(KD(student, Small()), callbacks=[watcher(monitor="train/loss")], enable_checkpointing=True, default_root_dir=tmp_path)


def test_default_schedule_requires_max_epochs_or_max_steps():
    with pytest.raises(ValueError, match="give max_epochs or max_steps, or a scheduler"):
        fit(KD(Small(), Small()), max_epochs=-1, max_time="00:00:00:20")
    constant = KD(Small(), Small(), scheduler=lambda o: torch.optim.lr_scheduler.ConstantLR(o))
    assert fit(constant, max_epochs=-1, max_time="00:00:00:01").global_step > 0


@pytest.mark.parametrize("name", ["val/acc", "val/loss", "lr"])
def test_early_stopping_on_other_metrics_that_are_not_logged_raises(name):
    with pytest.raises(ValueError, match=f"EarlyStopping monitors '{name}', which is not logged"):
        fit(Supervised(Small()), callbacks=[EarlyStopping(monitor=name)])


def _unlabelled_loader():
    return torch.utils.data.DataLoader([{"image": image} for image, _ in IMAGES], batch_size=4)


def _labelled_loader():
    return loader_of(torch.stack([image for image, _ in IMAGES]), torch.tensor([label for _, label in IMAGES]))


def _fit_with_loaders(method, loaders, **options):
    """Train, and return the trainer; raise an error only before the first step."""
    options = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False} | options
    trainer = L.Trainer(**options)
    try:
        trainer.fit(method, _labelled_loader(), loaders)
    except ValueError:
        assert trainer.global_step == 0
        raise
    return trainer


@pytest.mark.parametrize("watcher", [EarlyStopping, ModelCheckpoint])
def test_monitor_names_one_of_the_validation_loaders(watcher):
    one, two = [_labelled_loader()], [_labelled_loader(), _labelled_loader()]
    names = "use val/accuracy/dataloader_idx_0 or val/accuracy/dataloader_idx_1"
    for loaders, name, message in (
        (two, "val/accuracy", f"there are 2 validation loaders: {names}"),
        (two, "val/accuracy/dataloader_idx_2", f"there are 2 validation loaders: {names}"),
        (one, "val/accuracy/dataloader_idx_0", "there is one validation loader: use val/accuracy"),
    ):
        for sanity_steps in (0, 2):
            with pytest.raises(ValueError, match=f"{watcher.__name__} monitors '{name}', but {message}"):
                _fit_with_loaders(Supervised(Small()), loaders, callbacks=[watcher(monitor=name)], num_sanity_val_steps=sanity_steps)
    _fit_with_loaders(Supervised(Small()), two, callbacks=[watcher(monitor="val/accuracy/dataloader_idx_1")])


@pytest.mark.parametrize("watcher", [EarlyStopping, ModelCheckpoint])
def test_monitoring_validation_without_labels_raises_before_training(watcher):
    for loaders, name, which in (
        (_unlabelled_loader(), "val/accuracy", "validation"),
        ([_labelled_loader(), _unlabelled_loader()], "val/cross_entropy/dataloader_idx_1", "validation loader 1"),
    ):
        with pytest.raises(ValueError, match=f"{watcher.__name__} monitors '{name}', which is not logged: the batches of {which} have no labels"):
            _fit_with_loaders(Supervised(Small()), loaders, callbacks=[watcher(monitor=name)])
    loaders = [_unlabelled_loader(), _labelled_loader()]
    _fit_with_loaders(Supervised(Small()), loaders, callbacks=[watcher(monitor="val/accuracy/dataloader_idx_1")])


def test_defaults_monitor_the_first_of_several_validation_loaders(tmp_path):
    method = Supervised(Small(), scheduler=lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, "max", patience=0, factor=0.5, threshold=10.0))
    trainer = _fit_with_loaders(method, [_labelled_loader(), _labelled_loader()], callbacks=checkpoints(tmp_path, "val/accuracy"))
    assert trainer.lr_scheduler_configs[0].monitor == "val/accuracy/dataloader_idx_0"
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 2
    best = trainer.checkpoint_callbacks[1]
    assert best.best_model_path == str(tmp_path / "best.ckpt")
    one_epoch = _fit_with_loaders(
        Supervised(Small()), [_labelled_loader(), _unlabelled_loader()], max_epochs=1, callbacks=checkpoints(tmp_path, "val/accuracy")
    )
    assert one_epoch.checkpoint_callbacks[1].best_model_score == one_epoch.callback_metrics["val/accuracy/dataloader_idx_0"]
