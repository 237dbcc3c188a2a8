"""Images of all kinds in folders and datasets, files that a folder ignores, and labels that are
probabilities.
"""

import os
import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
from PIL import Image

from kdkernels.data import FromDatasets, ImageFolder
from kdkernels.data.decode import as_pixels, read_image

RAMP = np.linspace(0, 255, 64 * 64).reshape(64, 64)


def _save(image, path, **options):
    image.save(path, **options)
    return path


# Pixels.


@pytest.mark.parametrize(
    ("pixels", "name"),
    [
        (RAMP.astype(np.uint8), "a.png"),
        ((RAMP * 257).astype(np.uint16), "a.png"),
        ((RAMP * 257).astype(np.uint16), "a.tiff"),
        ((RAMP * 257).astype(np.int32), "a.tiff"),
        ((RAMP / 255).astype(np.float32), "a.tiff"),
    ],
    ids=["8 bits", "16 bits", "16 bits, tiff", "32 bits, tiff", "float, tiff"],
)
def test_all_dtypes_are_decoded_to_the_same_pixels(tmp_path, pixels, name):
    path = _save(Image.fromarray(pixels), tmp_path / name)
    got = read_image(path, 64)
    assert got.dtype == torch.uint8
    assert got.shape == (3, 64, 64)
    assert (got.double() - torch.from_numpy(RAMP)).abs().max() <= 1


def test_values_of_unknown_range_raise(tmp_path):
    for pixels in (
        RAMP.astype(np.float32),
        (RAMP / 255 - 0.5).astype(np.float32),
        (RAMP * 1000).astype(np.int32),
        np.full((4, 4), np.nan, np.float32),
    ):
        path = _save(Image.fromarray(pixels), tmp_path / "a.tiff")
        with pytest.raises(ValueError, match=r"cannot read the image .*a.tiff: .* the value of white is not known otherwise: save the image"):
            read_image(path, 8)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
def test_color_modes(tmp_path, mode):
    """A white image, because every mode can represent white."""
    path = _save(Image.new("RGB", (20, 30), (255, 255, 255)).convert(mode), tmp_path / "a.tiff")
    assert (read_image(path, 8).double() - 255).abs().max() <= 2


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "RGB"])
def test_transparent_pixels_are_white(tmp_path, kind):
    """Fully transparent black pixels are decoded as white, not black."""
    options = {}
    if kind in ("RGBA", "LA"):
        image = Image.new("RGBA", (16, 16), (0, 0, 0, 0)).convert(kind)
    else:
        image = Image.new("RGB", (16, 16), (0, 0, 0)).convert(kind)
        options["transparency"] = image.getpixel((0, 0))
    assert read_image(_save(image, tmp_path / "a.png", **options), 8).min() == 255
    half_transparent = Image.new("RGBA", (16, 16), (0, 0, 0, 128))
    assert abs(int(read_image(_save(half_transparent, tmp_path / "b.png"), 8)[0, 0, 0]) - 127) <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    """One corner of the stored image is marked. EXIF 2.3 defines to which corner it moves."""
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:32, :32] = 255  # row 0, column 0
    exif = Image.Exif()
    exif[0x0112] = orientation
    got = read_image(_save(Image.fromarray(pixels), tmp_path / "a.png", exif=exif), 2)[0]
    position = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}[orientation]
    assert (got > 128).nonzero().tolist() == [list(position)]


def test_center_square_is_cropped(tmp_path):
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 200
    for oriented in (pixels, pixels.transpose(1, 0, 2)):
        assert (read_image(_save(Image.fromarray(oriented), tmp_path / "a.png"), 20) == 200).all()


def test_long_image_is_resized_from_its_square_only(tmp_path, monkeypatch):
    requested_sizes = []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, *a, **k: requested_sizes.append(size) or resize(self, size, *a, **k))
    for shape in ((1, 20000, 3), (20000, 1, 3)):
        path = _save(Image.fromarray(np.full(shape, 9, np.uint8)), tmp_path / "long.png")
        assert (read_image(path, 64) == 9).all()
    assert requested_sizes == [(64, 64)] * 2


def test_as_pixels_converts_images_of_datasets():
    ramp = torch.from_numpy(RAMP)
    assert torch.equal(as_pixels(ramp[None], "x"), ramp[None])  # float64 is kept
    assert as_pixels(ramp[None].half(), "x").dtype == torch.float32
    assert as_pixels(RAMP[..., None].repeat(3, 2), "x").shape == (3, 64, 64)
    sixteen_bits = (RAMP * 257).astype(np.uint16)
    for image in (sixteen_bits, torch.from_numpy(sixteen_bits)[None], Image.fromarray(sixteen_bits)):
        got = as_pixels(image, "x")
        got = got.double() / 255 if got.dtype == torch.uint8 else got.double()
        assert (got - ramp / 255).abs().max() <= 1 / 255
    assert as_pixels(RAMP > 100, "x").max() == 1
    palette = Image.fromarray(RAMP.astype(np.uint8)).convert("P")
    assert as_pixels(palette, "x").shape == (3, 64, 64)
    for bad, message in (
        (torch.zeros(1, 4, 4, dtype=torch.int64), "must be uint8, uint16 or floating point, got torch.int64"),
        (np.zeros((4, 4), np.int32), "uint8, uint16 or floating point"),
        (torch.zeros(4, 4), r"must have the shape \[C, H, W\], got \[4, 4\]"),
        (np.zeros(4), r"must have the shape \[H, W\] or \[H, W, C\]"),
        ([1, 2], "must be a tensor, an array or a PIL image, got list"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            as_pixels(bad, "the image of sample 3")


# Folders.


def _folder(root, classes=("ant", "bee"), count=4):
    for k, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(np.full((6, 6, 3), 100 * k + i, np.uint8)).save(root / name / f"{i}.png")
    return root


def _count(data):
    data.setup()
    return {split: len(images) for split, images in data.splits.items()}


def test_ignored_files_are_reported_once(tmp_path):
    root = _folder(tmp_path / "photos")
    (root / "ant" / ".ipynb_checkpoints").mkdir()
    Image.new("RGB", (4, 4)).save(root / "ant" / ".ipynb_checkpoints" / "0-checkpoint.png")
    (root / "ant" / "._0.png").write_bytes(b"Mac OS X")
    (root / "bee" / "Thumbs.db").write_bytes(b"Windows")
    (root / "bee" / "notes.txt").write_text("seen on Monday")
    (root / "stray.png").write_bytes((root / "ant" / "0.png").read_bytes())
    (root / ".git").mkdir()
    (root / "bee" / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"cannot read the image .*broken.jpg: .*; give on_error='skip' to leave out"):
        _count(ImageFolder(root, size=4))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = ImageFolder(root, size=4, on_error="skip")
        assert sum(_count(data).values()) == 8
    (report,) = [str(w.message) for w in caught if "left out" in str(w.message)]
    assert report.startswith(f"6 files under {root} are left out")
    for reason, names in {
        "3 are hidden": (".ipynb_checkpoints", "._0.png", "Thumbs.db"),
        "1 do not have the suffix of an image": ("notes.txt",),
        "1 are not in a class folder": ("stray.png",),
        "1 cannot be read as images": ("broken.jpg",),
    }.items():
        assert reason in report
        assert all(name in report for name in names)
    assert data.classes == ["ant", "bee"]


def test_folder_without_ignored_files_causes_no_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _count(ImageFolder(_folder(tmp_path / "photos"), size=4)) == {"train": 6, "val": 2}


def test_symbolic_links_and_nested_folders(tmp_path):
    root = _folder(tmp_path / "photos", count=2)
    elsewhere = _folder(tmp_path / "elsewhere", classes=("more", "deep/er"), count=3)
    os.symlink(elsewhere / "more", root / "ant" / "linked")
    os.symlink(elsewhere / "deep", root / "cat")
    os.symlink(root, root / "bee" / "round")  # a link to a parent folder
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = ImageFolder(root, size=4)
        data.setup()
    assert data.classes == ["ant", "bee", "cat"]
    labels = torch.cat([data.splits[s].fields["label"] for s in ("train", "val")])
    counts = labels.bincount().tolist()
    assert counts[0] == 5
    assert counts[2] == 3
    assert any("are links to a folder that contains them" in str(w.message) for w in caught)
    os.symlink(tmp_path / "nowhere.png", root / "ant" / "gone.png")
    with pytest.raises(ValueError, match=r"gone\.png"):
        ImageFolder(root, size=4).setup()


@pytest.mark.parametrize(("train", "val"), [("train", "val"), ("train", "valid"), ("training", "validation"), ("Train", "Val"), ("TRAIN", "Valid")])
def test_folder_names_of_the_splits(tmp_path, train, val):
    _folder(tmp_path / train)
    _folder(tmp_path / val, count=1)
    assert _count(ImageFolder(tmp_path, size=4)) == {"train": 8, "val": 2}


def test_ambiguous_split_folders_raise(tmp_path):
    for names, message in (
        (("train", "training", "val"), r"2 folders for train: \['train', 'training'\]"),
        (("train", "val", "extra"), r"has the split 'train' and the folders \['extra'\], which are not splits"),
        (("test", "val"), "must contain a folder 'train'"),
        (("Train", "Test"), "folders for training and for testing but none for validation: give val_fraction=0.2"),
    ):
        root = tmp_path / "-".join(names)
        for name in names:
            _folder(root / name)
        with pytest.raises(ValueError, match=message):
            ImageFolder(root, size=4)
    assert _count(ImageFolder(tmp_path / "Train-Test", size=4, val_fraction=0.25)) == {"train": 6, "val": 2, "test": 8}


def test_class_may_be_named_train(tmp_path):
    data = ImageFolder(_folder(tmp_path / "vehicles", classes=("car", "train")), size=4)
    assert data.classes == ["car", "train"]


# Labels.


def _batch(label, **options):
    samples = [(torch.rand(3, 4, 4), label)] * 4
    data = FromDatasets(samples, samples, batch_size=4, **options)
    data.setup()
    return next(iter(data.train_dataloader()))


def test_probability_labels_are_kept():
    for label in (torch.tensor([0.9, 0.1, 0.0]), np.array([0.9, 0.1, 0.0]), [0.9, 0.1, 0.0]):
        got = _batch(label, num_classes=3)["label"]
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, torch.tensor([[0.9, 0.1, 0.0]] * 4))
    assert _batch(torch.tensor([0, 1, 0]))["label"].tolist() == [[0.0, 1.0, 0.0]] * 4  # one-hot
    for label in (2, 2.0, np.int32(2), torch.tensor([2])):
        assert _batch(label)["label"].tolist() == [2] * 4


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (0.5, "must be a class number, or class probabilities"),
        (True, "must be a class number"),
        (torch.tensor([1.0, 1.0, 0.0]), "a sum of 2"),
        (torch.tensor([-0.5, 1.5, 0.0]), "a minimum of -0.5"),
        (torch.zeros(2, 2), r"got floating point of shape \[2, 2\]"),
        (3, r"labels must lie in \[0, 2\], the classes of the data; sample \d has 3"),
        (-1, r"sample \d has -1"),
        (torch.tensor([0.5, 0.5]), r"probabilities of 3 classes; the label of sample \d has 2"),
    ],
)
def test_invalid_labels_raise(label, message):
    with pytest.raises((TypeError, ValueError), match=message):
        _batch(label, num_classes=3)


def test_float64_images_stay_float64():
    samples = [(torch.rand(3, 4, 4, dtype=torch.float64), 0)] * 4
    data = FromDatasets(samples, samples, num_classes=2, batch_size=4, mean=(0.5,) * 3, std=(0.25,) * 3)
    data.setup()
    image = data.finish(next(iter(data.val_dataloader())))["image"]
    assert image.dtype == torch.float64
    assert torch.equal(image, torch.stack([(s[0] - 0.5) / 0.25 for s in samples]))
