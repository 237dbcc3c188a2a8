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


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_images_without_a_finite_prediction_are_not_selected(tmp_path, value):
    """As of a teacher in float16 whose logits overflow."""

    class Broken(nn.Module):
        def forward(self, x):
            logits = x[:, :, 0, 0].clone()
            logits[:, 1] = torch.where(x.mean((1, 2, 3)) > 0.5, value, logits[:, 1])
            return logits

    broken = {i for i in range(50) if POOL[i].float().mean() / 255 > 0.5}
    assert 0 < len(broken) < 50
    index = select_samples(Broken(), POOL, 50 - len(broken), tmp_path / "i.pt")
    assert set(index.indices.tolist()) == set(range(50)) - broken
    assert set(index.noisiest[: len(broken)].tolist()) == broken
    with pytest.raises(ValueError, match="logits are not finite for 1 of the images that would be selected"):
        select_samples(Broken(), POOL, 51 - len(broken), tmp_path / "j.pt")
    bright = [POOL[i] for i in sorted(broken)] * 2
    with pytest.raises(ValueError, match=r"the teacher \(Broken\) returned logits that are not finite for all of the first 5 images"):
        select_samples(Broken(), bright, 5, tmp_path / "k.pt", batch_size=5)
    assert not list(tmp_path.glob("k.*"))


def _same(a, b):
    names = ("indices", "values", "labels", "noisiest", "noisiest_values", "class_counts")
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


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
    assert resumed[0] == runs[-1] + 3  # all finished batches were stored
    assert _same(whole, parts)
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
        with pytest.raises(ValueError, match=r"i\.pt' is not a complete file of select_samples: remove it"):
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
    assert _same(one, two)
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


def test_damaged_files(tmp_path):
    (tmp_path / "pool").mkdir()
    for i in range(6):
        Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(tmp_path / "pool" / f"{i}.png")
    for i in (1, 4):
        content = (tmp_path / "pool" / f"{i}.png").read_bytes()
        (tmp_path / "pool" / f"{i}.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cannot read the image .*1\.png"):
        select_samples(_teacher(), ImagePool(tmp_path / "pool", size=4), 3, tmp_path / "i.pt")
    with pytest.warns(UserWarning, match=r"cannot read the image .*4\.png"):
        index = select_samples(_teacher(), ImagePool(tmp_path / "pool", size=4, on_error="skip"), 4, tmp_path / "i.pt", batch_size=3)
    assert sorted(index.indices.tolist()) == [0, 2, 3, 5]
    with (
        pytest.warns(UserWarning, match="this file is not selected"),
        pytest.raises(ValueError, match="or the files are damaged: select fewer images"),
    ):
        select_samples(_teacher(), ImagePool(tmp_path / "pool", size=4, on_error="skip"), 5, tmp_path / "j.pt", batch_size=3)
    for options, message in (({"on_error": "stop"}, "on_error must be"), ({"size": 0}, "size must be an integer"), ({"mode": "P"}, "mode must be")):
        with pytest.raises(ValueError, match=message):
            ImagePool(tmp_path / "pool", **options)


def test_normalization(tmp_path):
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    index = select_samples(_teacher(), POOL, 50, tmp_path / "a.pt", mean=mean, std=std)
    normalized = [((x.float() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)) for x in POOL]
    same = select_samples(_teacher(), normalized, 50, tmp_path / "b.pt")
    torch.testing.assert_close(index.values, same.values, rtol=1e-4, atol=1e-6)


FLOATS = [image.float() / 255 for image in POOL]


@pytest.mark.parametrize(
    ("pool", "options", "message"),
    [
        (POOL, {"batch_size": True}, "batch_size must be an integer >= 1, got True"),
        (POOL, {"batch_size": "8"}, "batch_size must be an integer >= 1, got '8'"),
        (POOL, {"save_every": 2.5}, r"save_every must be an integer >= 1, got 2\.5"),
        *((POOL, {"size": size}, "size must be an integer >= 1, two of them") for size in (0, -1, True, 32.0, "32", (32,), (32, 32, 3))),
        (POOL, {"mean": 0.5, "std": 0.5}, "mean must be a list of numbers, one for each channel, got 0.5"),
        (POOL, {"mean": [0.5], "std": [0.5]}, "mean and std must have one number for each of the 3 channels of the pool"),
        (POOL, {"mean": [0.5, 0.5], "std": [0.5]}, "mean and std must have one number for each channel"),
        (POOL, {"mean": [0.5] * 3, "std": [0.0] * 3}, "std must be positive"),
        ([image[:1] for image in POOL], {"mean": [0.5] * 3, "std": [0.5] * 3}, "each of the 1 channels of the pool"),
        ([255 * image for image in FLOATS], {"mean": [0.5] * 3, "std": [0.5] * 3}, r"float images must lie in \[0, 1\] if mean is given"),
        ([*POOL[:20], *(image[:, :2] for image in POOL[20:])], {}, "must have one dtype and one shape, or size must be given"),
        ([*POOL[:20], *FLOATS[20:]], {}, "must have one dtype and one shape"),
        ([*POOL[:15], *FLOATS[15:]], {}, "must have one dtype, because it determines the value of white"),
        (iter(POOL), {}, "pool must be a map-style dataset"),
        ([*POOL[:9], None, *POOL[10:]], {}, "image 9 of the pool must be a tensor"),
        ([*POOL[:9], {"x": 1}, *POOL[10:]], {}, "image 9 of the pool is a dict without .image."),
        ([*POOL[:9], (), *POOL[10:]], {}, "image 9 of the pool must be a tensor"),
    ],
)
def test_wrong_options_and_pools_raise(pool, options, message, tmp_path):
    with pytest.raises((TypeError, ValueError), match=message):
        select_samples(_teacher(), pool, 5, tmp_path / "i.pt", **{"batch_size": 10} | options)
    assert not list(tmp_path.glob("i.pt"))


def test_place_that_cannot_be_written_raises_before_any_work(tmp_path):
    reads = []

    class Watched(list):
        def __getitem__(self, i):
            reads.append(i)
            return super().__getitem__(i)

    (tmp_path / "file").write_text("")
    for path, error in ((tmp_path / "file" / "i.pt", OSError), (tmp_path, ValueError)):
        with pytest.raises(error):
            select_samples(_teacher(), Watched(POOL), 5, path)
    assert not reads


def test_teacher_and_integers_of_numpy(tmp_path):
    teacher = _teacher().train()
    layer = nn.Sequential(nn.BatchNorm2d(3), teacher)
    layer[0].eval()
    select_samples(layer, POOL, np.int64(5), tmp_path / "i.pt", batch_size=np.int32(7))
    assert [module.training for module in layer] == [False, True]
    images = [image.float().requires_grad_() for image in POOL]
    select_samples(layer, images, 5, tmp_path / "j.pt")


def test_changed_first_batch_of_an_interrupted_run_raises(tmp_path):
    def interrupt(done, total):
        if done >= 20:
            raise Stop

    with pytest.raises(Stop):
        select_samples(_teacher(), POOL, 6, tmp_path / "i.pt", batch_size=5, on_progress=interrupt)
    with pytest.raises(ValueError, match="is from another pool"):
        select_samples(_teacher(), [POOL[1], *POOL[1:]], 6, tmp_path / "i.pt", batch_size=5)
    (tmp_path / "i.pt.part-0-of-1").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"part-0-of-1' is not a complete file of select_samples: remove it"):
        select_samples(_teacher(), POOL, 6, tmp_path / "i.pt", batch_size=5)
    for stored in ({"provenance": 1}, {"provenance": {"version": 2}}, [1]):
        torch.save(stored, tmp_path / "k.pt")
        with pytest.raises(ValueError, match=r"k\.pt' is not a complete"):
            SampleIndex.load(tmp_path / "k.pt")


def test_invalid_arguments_raise_before_any_work(tmp_path):
    path = tmp_path / "i.pt"
    for call, message in (
        (lambda: select_samples(_teacher(), POOL, 0, path), "count must be an integer >= 1, got 0"),
        (lambda: select_samples(_teacher(), POOL, 51, path), "at most the number of images of the pool, 50, got 51"),
        (lambda: select_samples(_teacher(), POOL, 5, path, batch_size=0), "batch_size must be an integer >= 1, got 0"),
        (lambda: select_samples(_teacher(), POOL, 5, path, mean=(0, 0, 0)), "mean and std must be given together"),
        (lambda: select_samples(nn.Conv2d(3, 2, 1), POOL, 5, path), r"must return logits \[B, K\]"),
        (lambda: select_samples(_teacher(), [*POOL[:9], "a"], 5, path), "image 9 of the pool must be a tensor"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call()
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="no folder"):
        ImagePool(tmp_path / "none")
