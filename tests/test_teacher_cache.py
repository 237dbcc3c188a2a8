"""The cache of teacher outputs on disk returns the outputs of the teacher, and never those of
another teacher, image or augmentation.
"""

import json
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

pytest.importorskip("lightning")
import lightning as L
from torch.utils.data import TensorDataset

from kdkernels.data import Augment, ClutterDigits, Digits, FromDatasets
from kdkernels.distill import KD
from kdkernels.distill.teacher_cache import TeacherCache
from kdkernels.models import FeatureTaps, TinyCNN
from kdkernels.nn.hashing import hash_of


class CountingTeacher:
    """Runs a teacher with taps, and counts its images."""

    def __init__(self, names=("block1", "block2")):
        self.teacher = TinyCNN(3).eval().requires_grad_(False)
        self.taps, self.images = FeatureTaps(self.teacher, names), 0

    def __call__(self, image):
        self.images += len(image)
        with torch.no_grad():
            return self.taps(image)


def _data(**options):
    data = ClutterDigits(train_size=40, val_size=8, test_size=8, batch_size=16, **options)
    data.setup()
    return data


def _epoch(data, epoch):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return [data.finish(batch) for batch in loader]


def _open(folder, counting_teacher, data, **options):
    cache = TeacherCache(folder, **options)
    cache.open(counting_teacher.teacher, counting_teacher.taps.names, data)
    return cache


def _assert_same(actual, expected, **tolerance):
    torch.testing.assert_close(actual[0], expected[0], **tolerance)
    assert list(actual[1]) == list(expected[1])
    for name in expected[1]:
        torch.testing.assert_close(actual[1][name], expected[1][name], **tolerance)


def test_teacher_runs_once_per_sample_and_view(tmp_path):
    counting_teacher, data = CountingTeacher(), _data(augment=Augment(crop=2, flip=True, views=2))
    cache = _open(tmp_path, counting_teacher, data)
    for epoch in range(5):
        for batch in _epoch(data, epoch):
            _assert_same(cache.outputs(batch, counting_teacher), counting_teacher.taps(batch["image"]), rtol=1e-5, atol=1e-6)
    assert counting_teacher.images == 2 * 40
    assert (cache.hits, cache.misses) == (3 * 40, 2 * 40)
    new_teacher = CountingTeacher()
    new_teacher.teacher.load_state_dict(counting_teacher.teacher.state_dict())
    cache = _open(tmp_path, new_teacher, data)  # a second run
    for batch in _epoch(data, 7):
        cache.outputs(batch, new_teacher)
    assert new_teacher.images == 0


def test_batch_with_some_cached_samples(tmp_path):
    counting_teacher, data = CountingTeacher(), _data()
    cache = _open(tmp_path, counting_teacher, data)
    batch = _epoch(data, 0)[0]
    part_of_batch = {k: v[:5] if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    cache.outputs(part_of_batch, counting_teacher)
    _assert_same(cache.outputs(batch, counting_teacher), counting_teacher.taps(batch["image"]), rtol=1e-5, atol=1e-6)
    assert counting_teacher.images == 16


@pytest.mark.parametrize("changed", ["teacher", "taps", "images", "augmentation", "precision", "dtype"])
def test_changed_setting_does_not_use_old_entries(tmp_path, changed):
    counting_teacher, data = CountingTeacher(), _data(augment=Augment(crop=2, views=1))
    cache = _open(tmp_path, counting_teacher, data)
    for batch in _epoch(data, 0):
        cache.outputs(batch, counting_teacher)
    other, options = CountingTeacher(("block1",) if changed == "taps" else ("block1", "block2")), {}
    if changed != "teacher":
        other.teacher.load_state_dict(counting_teacher.teacher.state_dict())
    if changed == "images":
        data = _data(augment=Augment(crop=2, views=1), seed=1)
    if changed == "augmentation":
        data = _data(augment=Augment(crop=2, views=1, seed=1))
    if changed == "dtype":
        options = {"dtype": "float16"}
    other_cache = TeacherCache(tmp_path, **options)
    other_cache.open(other.teacher, other.taps.names, data, "bf16-mixed" if changed == "precision" else "32-true")
    for batch in _epoch(data, 0):
        _assert_same(other_cache.outputs(batch, other), other.taps(batch["image"]), rtol=1e-5, atol=1e-6)
    assert other.images == 40
    assert len(list(tmp_path.iterdir())) == 2
    meta = json.loads((other_cache.folder / "meta.json").read_text())
    assert meta["teacher"] == hash_of(other.teacher)
    assert meta["samples"] == 40


def test_hash_depends_on_every_weight_and_buffer():
    teacher = TinyCNN(2)
    first = hash_of(teacher)
    assert hash_of(teacher) == first
    teacher.block2[1].running_mean[1] += 1e-6
    second = hash_of(teacher)
    teacher.fc.bias.data[3] = -teacher.fc.bias.data[3]
    assert len({first, second, hash_of(teacher)}) == 3


def test_damaged_entries_are_recomputed(tmp_path):
    counting_teacher, data = CountingTeacher(), _data()
    cache = _open(tmp_path, counting_teacher, data)
    batches = _epoch(data, 0)
    for batch in batches:
        cache.outputs(batch, counting_teacher)
    for array in cache._views[0].arrays.values():
        array.flush()
    path = cache.folder / "view_00000_1.bin"  # features of block1
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)
    counting_teacher.images = 0
    cache = _open(tmp_path, counting_teacher, data)
    for batch in batches:
        _assert_same(cache.outputs(batch, counting_teacher), counting_teacher.taps(batch["image"]), rtol=1e-5, atol=1e-6)
    assert counting_teacher.images == 1
    assert cache.misses == 1


def test_float16_cache_needs_half_the_space(tmp_path):
    counting_teacher, data = CountingTeacher(), _data()
    cache = _open(tmp_path, counting_teacher, data, dtype="float16")
    batch = _epoch(data, 0)[0]
    cache.outputs(batch, counting_teacher)
    _assert_same(cache.outputs(batch, counting_teacher), counting_teacher.taps(batch["image"]), rtol=2e-3, atol=1e-3)
    assert (cache.folder / "view_00000_0.bin").stat().st_size == 40 * 10 * 2


def test_training_with_the_cache_gives_the_same_weights(tmp_path):
    def run(cache):
        torch.manual_seed(0)
        method = KD(TinyCNN(3), teacher, teacher_cache=cache)
        data = Digits(batch_size=77, augment=Augment(crop=1, views=2))
        trainer = L.Trainer(max_epochs=4, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        trainer.fit(method, data)
        return method.student.state_dict()

    teacher = TinyCNN(4)
    expected = run(None)
    first_cache, second_cache = TeacherCache(tmp_path), TeacherCache(tmp_path)
    first, second = run(first_cache), run(second_cache)
    assert (first_cache.misses, first_cache.hits) == (2 * 1078, 2 * 1078)
    assert (second_cache.misses, second_cache.hits) == (0, 4 * 1078)
    for name in expected:
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], expected[name], rtol=1e-3, atol=1e-4)  # the teacher processed the same images in other batches


def test_data_that_cannot_be_cached_raise(tmp_path):
    counting_teacher = CountingTeacher()
    with pytest.raises(ValueError, match="teacher_cache cannot be used with mixup or cutmix"):
        _open(tmp_path, counting_teacher, _data(augment=Augment(mixup=0.2)))
    with pytest.raises(ValueError, match=r"teacher_cache needs a data module of kdkernels\.data"):
        _open(tmp_path, counting_teacher, L.LightningDataModule())
    with pytest.raises(ValueError, match='dtype must be "float16" or "float32"'):
        TeacherCache(tmp_path, dtype="int8")
    with pytest.raises(RuntimeError, match="open"):
        TeacherCache(tmp_path).outputs(_epoch(_data(), 0)[0], counting_teacher)


def test_custom_datasets_have_different_fingerprints(tmp_path):
    images, labels = torch.rand(20, 3, 32, 32), torch.randint(10, (20,))

    def data(images, **options):
        module = FromDatasets(TensorDataset(images, labels), TensorDataset(images, labels), views=1, **options)
        module.setup()
        return module.fingerprint()

    assert data(images) == data(images.clone())
    assert data(images) != data(images + 0.1)
    assert data(images, fingerprint="a") == data(images + 0.1, fingerprint="a") != data(images, fingerprint="b")


def test_killed_run_leaves_no_wrong_entry(tmp_path):
    """After kill -9 while the cache is written, every stored entry is correct."""
    script = """
        import sys, torch
        from kdkernels.data import ClutterDigits
        from kdkernels.distill.teacher_cache import TeacherCache
        from kdkernels.models import FeatureTaps, TinyCNN
        torch.manual_seed(0)
        torch.set_num_threads(1)
        teacher = TinyCNN(16).eval()
        data = ClutterDigits(train_size=20_000, val_size=1, test_size=1, batch_size=50)
        data.setup()
        cache = TeacherCache(sys.argv[1])
        taps = FeatureTaps(teacher, ["block1"])
        cache.open(teacher, taps.names, data)
        for i, batch in enumerate(map(data.finish, data.train_dataloader())):
            with torch.no_grad():
                cache.outputs(batch, taps)
            print(i, flush=True)
        """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "0\n"
    time.sleep(0.7)
    process.send_signal(signal.SIGKILL)
    done = len(process.communicate()[0].splitlines())
    assert 0 < done < 399

    torch.manual_seed(0)
    teacher = TinyCNN(16).eval()
    data = ClutterDigits(train_size=20_000, val_size=1, test_size=1, batch_size=50)
    data.setup()
    cache, taps = TeacherCache(tmp_path), FeatureTaps(teacher, ["block1"])
    cache.open(teacher, taps.names, data)
    for i, batch in enumerate(map(data.finish, data.train_dataloader())):
        with torch.no_grad():
            _assert_same(cache.outputs(batch, taps), taps(batch["image"]), rtol=1e-4, atol=1e-5)
        if i == done + 3:
            break
    assert done * 50 <= cache.hits <= (done + 2) * 50
