"""Times of a KD training step with the teacher's outputs read from the cache, and with them
computed.
"""

from typing import cast

import pytest
import torch

pytest.importorskip("lightning")
from kdkernels import models
from kdkernels.data import CIFAR100
from kdkernels.data.base import TensorImages
from kdkernels.distill import KD
from kdkernels.distill.teacher_cache import TeacherCache

from .suite import DEVICE, MODE, SMOKE, timed_row

# name, teacher, student, batch size, layers whose outputs are cached besides the logits, seconds
STEPS = [
    ("resnet56 to resnet20, batch 64, logits", "resnet56", "resnet20", 64, (), 20),
    ("resnet56 to resnet20, batch 64, logits and three maps", "resnet56", "resnet20", 64, ("layer1", "layer2", "layer3"), 20),
    ("wrn_40_2 to wrn_16_2, batch 64, logits", "wrn_40_2", "wrn_16_2", 64, (), 30),
]


class Noise(CIFAR100):
    """Random images of the size of CIFAR images."""

    def make_splits(self):
        size = 2 * self.batch_size
        images = TensorImages(image=torch.randint(256, (size, 3, 32, 32), dtype=torch.uint8), label=torch.randint(100, (size,)))
        return {"train": images, "val": images}


@pytest.mark.parametrize(("name", "teacher", "student", "batch_size", "taps", "seconds"), STEPS, ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.skipif(MODE == "quick", reason="not one of the main rows")
def bench_teacher_cache(name, teacher, student, batch_size, taps, seconds, bench, tmp_path):
    if SMOKE:
        teacher = student = "resnet8"
        batch_size = 4
    data = Noise(batch_size=batch_size)
    data.setup()
    cache = TeacherCache(tmp_path)
    method = KD(getattr(models, student)(), getattr(models, teacher)(), teacher_taps=taps, teacher_cache=cache).to(DEVICE)
    cache.open(method.teachers[0], list(taps), data)
    optimizer = method.make_optimizer(method.student.parameters())
    batch = data.finish({k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in next(iter(data.train_dataloader())).items()})
    uncached_batch = {k: v for k, v in batch.items() if k != "view"}
    expected, _ = method.teacher_outputs(uncached_batch)
    method.teacher_outputs(batch)
    torch.testing.assert_close(method.teacher_outputs(batch)[0], expected, rtol=1e-5, atol=1e-5)

    def step(batch):
        optimizer.zero_grad()
        cast(torch.Tensor, sum(method.losses(batch)[1].values())).backward()
        optimizer.step()

    bench(timed_row("teacher_cache", name, "step", {"fused": lambda: step(batch), "the teacher run": lambda: step(uncached_batch)}, seconds))
