"""Methods that train modules besides the student resume exactly, in the middle of an epoch, with
these modules and their optimizers.
"""

import pytest
import torch

pytest.importorskip("lightning")
import lightning as L
import train_processes

from kdkernels.data import Augment, ClutterDigits
from kdkernels.distill.engine import checkpoints

METHODS = ("BYOT", "DFND", "DML", "DeepSupervision", "DualNet", "FFL", "FRSKD", "ONE", "SAD", "SLA")


def _optimizer(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def _run(folder, name, seed, **options):
    """Train for six steps, four of them in the first epoch."""
    torch.manual_seed(seed)
    method = train_processes.METHODS[name]({"optimizer": _optimizer, "scheduler": train_processes.constant})
    for teacher in method.teachers:  # the seed of the run makes the student only
        teacher.load_state_dict({key: torch.linspace(-1, 1, value.numel()).view(value.shape).sin() for key, value in teacher.state_dict().items()})
    data = ClutterDigits(train_size=16, val_size=4, test_size=2, batch_size=4, augment=Augment(crop=2, mixup=0.2 if name == "BYOT" else 0.0))
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=checkpoints(folder, every=3),
        max_epochs=2,
        max_steps=options.pop("max_steps", 6),
    )
    trainer.fit(method, data, **options)
    return method.state_dict()


@pytest.mark.parametrize("name", METHODS)
def test_resumed_run_equals_uninterrupted_run(name, tmp_path):
    whole = _run(tmp_path / "whole", name, seed=0)
    _run(tmp_path / "parts", name, seed=0, max_steps=3)
    resumed = _run(tmp_path / "parts", name, seed=1, ckpt_path=tmp_path / "parts" / "last.ckpt", weights_only=True)
    assert any(key.startswith(("branches.", "noise.")) for key in whole) == (name != "SAD")
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())
