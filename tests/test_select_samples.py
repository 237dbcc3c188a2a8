"""Selection of samples for DFND: exact, resumable, in several processes, with provenance."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

pytest.importorskip("lightning")
from kdkernels.data import ImagePool, SampleIndex, select_samples
from kdkernels.data.select_samples import smallest
from kdkernels.nn import noise_value

POOL = [torch.randint(256, (3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(i)) for i in range(50)]


def _teacher(seed=0, classes=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(48), nn.Linear(48, classes))


def _expected(teacher, pool, count):
    with torch.no_grad():
        values = noise_value(teacher.eval()(torch.stack(pool).float() / 255)).float()
    order = np.lexsort((np.arange(len(pool)), values.numpy()))[:count]
    return order.tolist(), values[torch.from_numpy(order)]


@pytest.mark.parametrize("count", [1, 7, 50])
@pytest.mark.parametrize("batch_size", [3, 64])
def test_selects_the_smallest_values_of_the_whole_pool(tmp_path, count, batch_size):
    teacher = _teacher().train()
    index = select_samples(teacher, POOL, count, tmp_path / "index.pt", batch_size=batch_size)
    assert teacher.training  # as before
    indices, values = _expected(teacher, POOL, count)
    assert index.indices.tolist() == indices
    torch.testing.assert_close(index.values, values, rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        assert torch.equal(index.labels, teacher(torch.stack([POOL[i] for i in indices]).float() / 255).argmax(1))
    assert [p.name for p in tmp_path.iterdir()] == ["index.pt"]  # no state is left


def test_equal_values_are_selected_in_the_order_of_the_pool(tmp_path):
    pool = [POOL[0], POOL[1], POOL[0], POOL[0], POOL[1]] * 3
    index = select_samples(_teacher(), pool, 4, tmp_path / "i.pt", batch_size=5)
    first, second = ([i for i in range(15) if torch.equal(pool[i], POOL[k])] for k in (0, 1))
    assert index.indices.tolist() in (first[:4], second[:4])
    entries = [(torch.tensor([2.0, 1.0]), torch.tensor([0, 5]), torch.tensor([7, 8])), (torch.tensor([1.0]), torch.tensor([3]), torch.tensor([9]))]
    values, indices, labels = smallest(entries, 2)
    assert (values.tolist(), indices.tolist(), labels.tolist()) == ([1.0, 1.0], [3, 5], [9, 8])


def test_values_that_are_not_numbers_come_last(tmp_path):
    class Broken(nn.Module):
        def forward(self, x):
            return torch.where(x.mean((1, 2, 3), keepdim=False)[:, None] > 0.5, torch.nan, x[:, :, 0, 0])

    index = select_samples(Broken(), POOL, 50, tmp_path / "i.pt")
    broken = [i for i in range(50) if POOL[i].float().mean() / 255 > 0.5]
    assert 0 < len(broken) < 50
    assert set(index.indices.tolist()[-len(broken) :]) == set(broken)


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop", [1, 9, 30])
def test_interrupted_run_is_continued(tmp_path, stop):
    whole = select_samples(_teacher(), POOL, 6, tmp_path / "whole.pt", batch_size=3, save_every=2)
    runs = []

    def interrupt(done, total):
        runs.append(done)
        if done >= stop:
            raise Stop

    with pytest.raises(Stop):
        select_samples(_teacher(), POOL, 6, tmp_path / "parts.pt", batch_size=3, save_every=2, on_progress=interrupt)
    assert not (tmp_path / "parts.pt").exists()
    resumed = []
    parts = select_samples(_teacher(), POOL, 6, tmp_path / "parts.pt", batch_size=3, save_every=2, on_progress=lambda done, _: resumed.append(done))
    assert resumed[-1] == len(POOL)
    assert resumed[0] == 3 + 6 * (max(0, len(runs) - 1) // 2)  # begins behind the stored batches
    for a, b in zip(whole[:3], parts[:3], strict=True):
        assert torch.equal(a, b)
    assert whole.provenance == parts.provenance


def test_finished_index_is_not_computed_again(tmp_path):
    path = tmp_path / "i.pt"
    first = select_samples(_teacher(), POOL, 5, path)
    again = select_samples(_teacher(), POOL, 5, path, on_progress=lambda *_: pytest.fail("computed again"))
    assert torch.equal(first.indices, again.indices)


def test_index_of_another_teacher_or_pool_raises(tmp_path):
    path = tmp_path / "i.pt"
    index = select_samples(_teacher(), POOL, 5, path, batch_size=20)
    other = [POOL[-1], *POOL[1:]]
    for arguments, message in (
        ((_teacher(1), POOL, 5), "was made with another teacher"),
        ((_teacher(), POOL[:-1], 5), r"another pool \(pool_size 50, now 49\)"),
        ((_teacher(), POOL, 6), r"another count \(count 5, now 6\)"),
        ((_teacher(), other, 5), "another pool: the images 0 to 19 differ"),
    ):
        with pytest.raises(ValueError, match=message):
            select_samples(*arguments, path, batch_size=20)
    with pytest.raises(ValueError, match="another teacher"):
        index.check(teacher=_teacher(1))
    with pytest.raises(ValueError, match="images 40 to 49 differ"):
        index.check(pool=[*POOL[:-1], POOL[0]])
    index.check(teacher=_teacher(), pool=POOL, count=5)
    for text in (b"", b"abc"):
        path.write_bytes(text)
        with pytest.raises(ValueError, match=r"i\.pt' is not an index file"):
            SampleIndex.load(path)
    with pytest.raises(FileNotFoundError):
        SampleIndex.load(tmp_path / "none.pt")


def test_stored_state_of_another_pool_raises(tmp_path):
    def interrupt(done, total):
        if done >= 20:
            raise Stop

    with pytest.raises(Stop):
        select_samples(_teacher(), POOL, 6, tmp_path / "i.pt", batch_size=5, save_every=1, on_progress=interrupt)
    with pytest.raises(ValueError, match=r"stored state .* is from another pool"):
        select_samples(_teacher(), POOL[::-1], 6, tmp_path / "i.pt", batch_size=5)
    with pytest.raises(ValueError, match="another teacher"):
        select_samples(_teacher(1), POOL, 6, tmp_path / "i.pt", batch_size=5)


SCRIPT = """
import sys
import torch
sys.path.insert(0, {folder!r})
from test_select_samples import POOL, _teacher
from kdkernels.data import select_samples
torch.distributed.init_process_group("gloo")
select_samples(_teacher(), POOL, 7, sys.argv[1], batch_size=4)
torch.distributed.destroy_process_group()
"""


def test_two_processes_give_the_result_of_one(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(folder=str(Path(__file__).parent)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), str(tmp_path / "two.pt")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    one, two = select_samples(_teacher(), POOL, 7, tmp_path / "one.pt", batch_size=4), SampleIndex.load(tmp_path / "two.pt")
    assert all(torch.equal(a, b) for a, b in zip(one[:3], two[:3], strict=True))
    assert one.provenance == two.provenance
    assert {p.name for p in tmp_path.iterdir()} == {"run.py", "one.pt", "two.pt"}


def test_images_of_any_size(tmp_path):
    """Files of a folder, and images that are resized."""
    for i, (width, height) in enumerate([(8, 8), (20, 10), (7, 33)]):
        image = np.full((height, width, 3), 60 * i, np.uint8)
        (tmp_path / "pool" / "a").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "pool" / "a" / f"{i}.png")
    pool = ImagePool(tmp_path / "pool", size=4)
    assert len(pool) == 3
    assert [pool[i].unique().tolist() for i in range(3)] == [[0], [60], [120]]
    index = select_samples(_teacher(), pool, 2, tmp_path / "a.pt")
    mixed = [(torch.full((3, 5 + i, 9), 60 * i, dtype=torch.uint8), i) for i in range(3)]
    resized = select_samples(_teacher(), mixed, 2, tmp_path / "b.pt", size=4)
    assert torch.equal(index.indices, resized.indices)
    with pytest.raises(ValueError, match="must have one shape, or size must be given"):
        select_samples(_teacher(), mixed, 2, tmp_path / "c.pt")


def test_normalization(tmp_path):
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    index = select_samples(_teacher(), POOL, 50, tmp_path / "a.pt", mean=mean, std=std)
    normalized = [((x.float() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)) for x in POOL]
    same = select_samples(_teacher(), normalized, 50, tmp_path / "b.pt")
    torch.testing.assert_close(index.values, same.values, rtol=1e-4, atol=1e-6)


def test_invalid_arguments_raise_before_any_work(tmp_path):
    path = tmp_path / "i.pt"
    for call, message in (
        (lambda: select_samples(_teacher(), POOL, 0, path), "count must be an integer >= 1, got 0"),
        (lambda: select_samples(_teacher(), POOL, 51, path), "at most the number of images of the pool, 50, got 51"),
        (lambda: select_samples(_teacher(), POOL, 5, path, batch_size=0), "batch_size and save_every must be at least 1"),
        (lambda: select_samples(_teacher(), POOL, 5, path, mean=(0, 0, 0)), "mean and std must be given together"),
        (lambda: select_samples(nn.Conv2d(3, 2, 1), POOL, 5, path), r"must return logits \[B, K\]"),
        (lambda: select_samples(_teacher(), [*POOL[:9], "a"], 5, path), "image 9 of the pool must be a tensor"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call()
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="no folder"):
        ImagePool(tmp_path / "none")
