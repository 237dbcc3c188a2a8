"""Data modules: their contents, invalid inputs, and the splits."""

import hashlib
import io
import os
import pickle
import struct
import tarfile
import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

pytest.importorskip("lightning")
from kdkernels.data import CIFAR10, CIFAR100, Augment, ClutterDigits, Digits, FromDatasets, ImageFolder
from kdkernels.data import cifar as cifar_module
from kdkernels.data import digits as digits_module

# Data included in the package.


@pytest.fixture(scope="module")
def clutter():
    data = ClutterDigits(train_size=64, val_size=32, test_size=48, batch_size=16)
    data.setup()
    return data


def test_clutter_digits_batches(clutter):
    batch = clutter.finish(next(iter(clutter.train_dataloader())))
    assert batch["image"].shape == (16, 3, 32, 32)
    assert batch["image"].dtype == torch.float32
    assert batch["label"].dtype == torch.int64
    assert batch["mask"].shape == (16, 32, 32)
    assert batch["mask"].dtype == torch.bool
    assert batch["mask"].flatten(1).any(1).all()  # every image contains a digit
    fields = clutter.splits["test"].fields
    # digit and background differ by the requested contrast, minus noise and clamping
    for image, mask in zip(fields["image"].float() / 255, fields["mask"], strict=True):
        assert abs(image[:, mask].mean() - image[:, ~mask].mean()) > 0.1
    first = clutter.finish(clutter.splits["test"][[0]])["image"][0, 0, 0]
    assert torch.allclose(first, (fields["image"][0, 0, 0] / 255 - clutter.mean[0]) / clutter.std[0])


def test_clutter_digits_depend_only_on_seed_and_index(clutter):
    """An image does not depend on the size of its split, or on whether images are in memory."""
    streamed = ClutterDigits(train_size=10**12, val_size=32, test_size=48, max_memory=0, batch_size=16)
    streamed.setup()
    other = ClutterDigits(train_size=64, val_size=32, test_size=48, seed=1)
    other.setup()
    for split in ("train", "val", "test"):
        some = [3, 31, 7]
        cached, generated = clutter.splits[split][some], streamed.splits[split][some]
        assert all(torch.equal(cached[name], generated[name]) for name in cached)
        assert not torch.equal(cached["image"], other.splits[split][some]["image"])
    batch = next(iter(streamed.train_dataloader()))  # a batch from a shuffled split of 10^12 images
    assert batch["image"].shape == (16, 3, 32, 32)
    assert batch["index"].max() > 10**9


def test_splits_share_no_scan():
    parts = digits_module.split_scans(1797)
    assert sorted(torch.cat(list(parts.values())).tolist()) == list(range(1797))


def test_clutter_digits_raises_for_invalid_arguments():
    with pytest.raises(ValueError, match="train_size must be at least 1"):
        ClutterDigits(train_size=0)
    with pytest.raises(ValueError, match=r"contrast must lie in \[0, 0.5\]"):
        ClutterDigits(contrast=0.9)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        ClutterDigits(batch_size=0)
    with pytest.raises(ValueError, match="call setup"):
        ClutterDigits().train_dataloader()


@pytest.mark.parametrize("channels", [1, 3])
def test_digits_are_normalized(channels):
    data = Digits(channels)
    data.setup()
    assert [len(data.splits[s]) for s in ("train", "val", "test")] == [1078, 270, 449]
    image = torch.cat([data.finish(batch)["image"] for batch in data.train_dataloader()])
    assert image.shape == (1078, channels, 8, 8)
    assert abs(image.mean()) < 0.01
    assert abs(image.std() - 1) < 0.01


# CIFAR, with archives in the official layout that the tests create.


class Python2Pickler(pickle._Pickler):
    """Writes strings like Python 2, as in the official files."""

    dispatch = dict(pickle._Pickler.dispatch)  # noqa: RUF012

    def _save(self, value):
        value = value.encode() if isinstance(value, str) else value
        self.write(b"U" + bytes([len(value)]) + value if len(value) < 256 else b"T" + struct.pack("<i", len(value)) + value)

    dispatch[bytes] = dispatch[str] = _save


def _pickled(count, label_key, labels):
    generator = np.random.default_rng(0)
    content = {b"data": generator.integers(0, 256, (count, 3072), dtype=np.uint8), label_key: generator.integers(0, labels, count).tolist()}
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(content)
    return file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"), content


@pytest.fixture(params=[CIFAR10, CIFAR100])
def archive(request, tmp_path, monkeypatch):
    """Return (class, root, contents of the files).

    Checksums are replaced by those of the test archive.
    """
    kind = request.param
    files, contents = {}, {}
    for names in kind.files.values():
        for name in names:
            raw, contents[name] = _pickled(20, kind.label_key, kind.num_classes)
            files[name] = raw
    monkeypatch.setattr(kind, "files", {s: {n: hashlib.md5(files[n]).hexdigest() for n in names} for s, names in kind.files.items()})
    path = tmp_path / kind.archive
    with tarfile.open(path, "w:gz") as tar:
        for name, raw in files.items():
            member = tarfile.TarInfo(f"{kind.folder}/{name}")
            member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))
    monkeypatch.setattr(kind, "archive_md5", hashlib.md5(path.read_bytes()).hexdigest())
    return kind, tmp_path, contents


def test_cifar_from_archive_and_from_folder(archive):
    kind, root, contents = archive
    packed = kind(root, val_size=5)
    packed.setup()
    train = torch.cat([torch.from_numpy(contents[n][b"data"]) for n in kind.files["train"]]).view(-1, 3, 32, 32)
    assert len(packed.splits["train"]) == len(train) - 5
    assert len(packed.splits["val"]) == 5
    assert len(packed.splits["test"]) == 20
    (root / kind.folder).mkdir()
    with tarfile.open(root / kind.archive) as tar:
        for member in tar:
            (root / member.name).write_bytes(tar.extractfile(member).read())
    os.unlink(root / kind.archive)
    unpacked = kind(root)
    unpacked.setup()
    assert torch.equal(unpacked.splits["train"].fields["image"], train)
    assert torch.equal(unpacked.splits["val"].fields["image"], packed.splits["test"].fields["image"])
    batch = unpacked.finish(next(iter(unpacked.val_dataloader())))
    expected = (unpacked.splits["val"].fields["image"][0, 1] / 255 - kind.mean[1]) / kind.std[1]
    torch.testing.assert_close(batch["image"][0, 1], expected)


def test_damaged_cifar_archive_raises(archive):
    kind, root, _ = archive
    raw = bytearray((root / kind.archive).read_bytes())
    raw[len(raw) // 2] ^= 1
    (root / kind.archive).write_bytes(raw)
    with pytest.raises(ValueError, match=r"is damaged or not the official file: its MD5 is .* Download it again from https://www.cs.toronto.edu"):
        kind(root).setup()


def test_missing_cifar_archive_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cifar-100-python.tar.gz .*'CIFAR100 python version'.* from https://www.cs.toronto.edu/~kriz"):
        CIFAR100(tmp_path).setup()


def test_cifar_files_cannot_run_code():
    class RunsCode:
        def __reduce__(self):
            return os.system, ("true",)

    with pytest.raises(pickle.UnpicklingError, match="is not allowed in a CIFAR file"):
        cifar_module._Unpickler(io.BytesIO(pickle.dumps({b"data": RunsCode()}))).load()


# Folders of images.


def _write_images(root, classes=("cat", "dog", "eel"), count=10):
    from PIL import Image

    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.full((20, 30, 3), 40 * label + i, np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.mark.parametrize("max_memory", [1.0, 0.0])
def test_image_folder_splits(tmp_path, max_memory):
    data = ImageFolder(_write_images(tmp_path / "images"), size=16, val_fraction=0.3, batch_size=4, max_memory=max_memory)
    data.setup()
    assert data.classes == ["cat", "dog", "eel"]
    assert [len(data.splits[s]) for s in ("train", "val")] == [21, 9]
    seen = []
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for batch in loader:
            assert batch["image"].shape[1:] == (3, 16, 16)
            assert batch["image"].dtype == torch.uint8
            assert torch.equal(batch["image"][:, 0, 0, 0] // 40, batch["label"])
            seen += batch["image"][:, 0, 0, 0].tolist()
    assert sorted(seen) == sorted(40 * label + i for label in range(3) for i in range(10))  # no image is lost, and none is in both splits
    assert sorted(b["label"].tolist().count(0) for b in [next(iter(data.val_dataloader()))]) == [3]


def test_image_folder_with_one_folder_per_split(tmp_path):
    _write_images(tmp_path / "train")
    _write_images(tmp_path / "val", count=2)
    data = ImageFolder(tmp_path, size=8)
    data.setup()
    assert {s: len(d) for s, d in data.splits.items()} == {"train": 30, "val": 6}
    _write_images(tmp_path / "test", classes=("cat", "fox"))
    with pytest.raises(ValueError, match=r"classes that the training images do not have: \['fox'\]"):
        ImageFolder(tmp_path, size=8).setup()


@pytest.mark.parametrize("max_memory", [1.0, 0.0])
def test_corrupt_image_is_skipped_or_raises(tmp_path, max_memory):
    root = _write_images(tmp_path / "images")
    broken = root / "dog" / "3.png"
    broken.write_bytes(broken.read_bytes()[:60])
    (root / "eel" / "5.png").write_bytes(b"not an image")
    (root / "eel" / "6.jpg").write_bytes(b"")

    def read(on_error):
        data = ImageFolder(root, size=8, on_error=on_error, max_memory=max_memory)
        data.setup()
        return sum(len(batch["label"]) for loader in (data.train_dataloader(), data.val_dataloader()) for batch in loader)

    with pytest.raises(ValueError, match=r"cannot read the image .*(3\.png|[56]\.(png|jpg))"):
        read("fail")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert read("skip") == 28
    named = "".join(str(w.message) for w in caught)
    assert all(name in named for name in ("3.png", "5.png", "6.jpg"))


def test_image_folder_raises_for_invalid_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="root: there is no folder"):
        ImageFolder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="a folder for each of at least 2 classes, found"):
        ImageFolder(tmp_path)
    root = _write_images(tmp_path / "images")
    (root / "fox").mkdir()
    with pytest.raises(ValueError, match="fox contains no image"):
        ImageFolder(root).setup()
    with pytest.raises(ValueError, match='on_error must be "fail" or "skip"'):
        ImageFolder(root, on_error="ignore")


# Any datasets.


class Noisy(Dataset):
    """A custom dataset with a random transform."""

    classes = ("a", "b")

    def __init__(self, size=20, form="pair"):
        self.size, self.form = size, form

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        image = torch.full((1, 4, 4), float(i)) + torch.rand(1) * np.random.rand()  # noqa: NPY002
        return {"image": image, "label": i % 2, "weight": 0.5} if self.form == "dict" else (image, i % 2)


@pytest.mark.parametrize("form", ["pair", "dict"])
@pytest.mark.parametrize("workers", [0, 1])
def test_from_datasets(form, workers):
    data = FromDatasets(Noisy(form=form), Noisy(6, form), batch_size=4, num_workers=workers)
    data.setup()
    assert data.num_classes == 2
    assert data.image_shape == (1, 4, 4)
    loader = data.train_dataloader()
    images = {}
    for epoch in (0, 0, 1):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            assert torch.equal(batch["image"][:, 0, 0, 0].long(), batch["index"])
            for i, image in zip(batch["index"].tolist(), batch["image"], strict=True):
                images.setdefault((epoch, i), []).append(image)
    assert all(torch.equal(*images[0, i]) for i in range(20))  # transforms of an epoch are reproducible
    assert not any(torch.equal(images[0, i][0], images[1, i][0]) for i in range(20))  # and differ in the next epoch
    if form == "dict":
        assert batch["weight"].tolist() == [0.5] * 4


def test_from_datasets_raises_for_unsupported_datasets():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(TypeError, match="train must be a map-style dataset"):
        FromDatasets(Stream(), Noisy())
    with pytest.raises(ValueError, match="val must not be empty"):
        FromDatasets(Noisy(), Noisy(0))
    with pytest.raises(TypeError, match="sample 0 must be"):
        FromDatasets([1, 2], Noisy()).setup()

    class VaryingSize(Noisy):
        def __getitem__(self, i):
            return torch.zeros(1, 4 + (i == 3), 4), 0

    data = FromDatasets(VaryingSize(), VaryingSize(), batch_size=20)
    data.setup()
    with pytest.raises(ValueError, match="the images of a batch must have the same shape"):
        next(iter(data.train_dataloader()))


def test_labels_of_different_shapes_raise():
    """Also if the data do not know the number of classes."""
    items = [(torch.zeros(1, 4, 4), torch.tensor(0) if i else torch.tensor([0.5, 0.5])) for i in range(6)]
    data = FromDatasets(items, items, batch_size=6)
    data.setup()
    assert data.num_classes is None
    with pytest.raises(ValueError, match="all labels must have the same shape; sample"):
        next(iter(data.train_dataloader()))


def test_views_repeat_over_epochs():
    data = Digits(augment=Augment(crop=1, views=3))
    data.setup()
    loader = data.train_dataloader()
    views = []
    for epoch in range(5):
        loader.sampler.set_epoch(epoch)
        views.append(next(iter(loader))["view"])
    assert views == [0, 1, 2, 0, 1]
    assert "view" not in next(iter(data.val_dataloader()))
    assert FromDatasets(Noisy(), Noisy(), augment=Augment(views=3)).views == 3
    assert FromDatasets(Noisy(), Noisy(), augment=Augment(views=3), views=2).views == 2
    assert FromDatasets(Noisy(), Noisy()).views is None
