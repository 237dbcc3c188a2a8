"""Readers of CULane, TuSimple and BDD100K, with small folders that the tests write."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kdkernels.data import BDD100KLanes, CULane, TuSimple
from kdkernels.data.lane_files import draw_label_map, numbered_from_left
from kdkernels.tasks import Lanes

SIZE = (20, 40)  # height and width of the images


def _image(path, value=100, size=SIZE):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size[::-1], (value, value, value)).save(path)


def _map(path, values, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).convert(mode).save(path)


def _vertical(*columns):
    """A label map with lanes that are vertical bands of 4 columns; ``None``: no lane."""
    label = np.zeros(SIZE, dtype=np.uint8)
    for lane, column in enumerate(columns, 1):
        if column is not None:
            label[:, column : column + 4] = lane
    return label


def _batch(data, split="train"):
    data.setup()
    return data.finish(next(iter({"train": data.train_dataloader, "val": data.val_dataloader, "test": data.test_dataloader}[split]())))


# Curves.


def _line(bottom, slope=0.0):
    """A curve from row 19 to row 5, with ``slope`` columns per row upward."""
    return np.array([[bottom, 19.0], [bottom + 14 * slope, 5.0]])


def test_lanes_are_numbered_from_the_own_vehicle():
    def numbers(*bottoms, lanes=4):
        curves = [_line(b) for b in bottoms]
        found = numbered_from_left(curves, *SIZE, lanes)
        return {lane: curve[0, 0] for lane, curve in found.items()}

    assert numbers(30, 5, 15, 38) == {1: 5, 2: 15, 3: 30, 4: 38}
    assert numbers(15, 30) == {2: 15, 3: 30}
    assert numbers(25) == {3: 25}
    assert numbers(5, 8, 15) == {1: 5, 2: 8, 3: 15}  # shifted: three on the left
    assert numbers(25, 30, 35) == {2: 25, 3: 30, 4: 35}
    assert numbers(1, 5, 15, 25, 30, 39) == {1: 5, 2: 15, 3: 25, 4: 30}  # the outermost are left out
    assert numbers(1, 5, 15, 25, lanes=6) == {1: 1, 2: 5, 3: 15, 4: 25}
    assert numbers(7, lanes=1) == {1: 7}
    assert numbers() == {}
    # A lane that leaves the image at its side is extended to the bottom.
    leaving = np.array([[25.0, 5.0], [39.0, 12.0]])  # reaches column 53 at row 19
    assert numbered_from_left([leaving, _line(36)], *SIZE, 4)[4] is leaving


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(-20, 60), max_size=8, unique=True), st.integers(1, 6))
def test_numbers_are_in_order(bottoms, lanes):
    found = numbered_from_left([_line(float(b)) for b in bottoms], *SIZE, lanes)
    assert len(found) == min(len(bottoms), lanes)
    assert set(found) <= set(range(1, lanes + 1))
    columns = [found[lane][0, 0] for lane in sorted(found)]
    assert columns == sorted(columns)


def test_label_maps_are_drawn_with_culanes_width():
    label = draw_label_map([np.array([[800.0, 0.0], [800.0, 589.0]])], (590, 1640), (590, 1640), 4)
    assert np.unique(label).tolist() == [0, 2]
    assert ((label == 2).sum(1) == 17).all()  # 8 pixels on each side of column 800, and the column itself
    small = draw_label_map([np.array([[8.0, 0.0], [8.0, 19.0]]), np.array([[30.0, 10.0], [30.0, 19.0]])], SIZE, (10, 20), 4)
    # Scaled by 1/2, the column 8 becomes (8 + 0.5) / 2 - 0.5 = 3.75, with 1.5 pixels on each side.
    assert np.unique(np.nonzero(small == 2)[1]).tolist() == [3, 4, 5]
    assert np.unique(np.nonzero(small == 3)[1]).tolist() == [14, 15, 16]
    assert small[:3, 14:17].max() == 0
    outside = draw_label_map([np.array([[-30.0, 19.0], [-5.0, 0.0]]), np.array([[60.0, 30.0], [30.0, 5.0]])], SIZE, SIZE, 2)
    assert np.unique(outside).tolist() == [0, 2]


# CULane.


def _culane(root):
    for name, columns, flags in (("a", (2, 12, 24, 34), "1 1 1 1"), ("b", (None, 12, 24, None), "0 1 1 0")):
        _image(root / f"driver/{name}.jpg")
        _map(root / f"laneseg_label_w16/driver/{name}.png", _vertical(*columns))
        with (root / "list.txt").open("a") as file:
            file.write(f"/driver/{name}.jpg /laneseg_label_w16/driver/{name}.png {flags}\n")
    _image(root / "driver/c.jpg")
    (root / "driver/c.lines.txt").write_text("12.5 19 12.5 10 12.5 0 \n26 19.0 26 0\n3 3\n")
    (root / "list").mkdir()
    (root / "list/train_gt.txt").write_text((root / "list.txt").read_text() + "\n")
    (root / "list/val.txt").write_text("/driver/c.jpg\n")
    return root


def test_culane(tmp_path):
    data = CULane(_culane(tmp_path), size=(10, 20), batch_size=2)
    batch = _batch(data)
    assert (batch["image"].shape, data.image_shape, data.num_classes) == ((2, 3, 10, 20), (3, 10, 20), 5)
    order = batch["index"].tolist()
    expected = [[True] * 4, [False, True, True, False]]
    assert batch["existence"].tolist() == [expected[i] for i in order]
    label = batch["label"][order.index(0)]
    for lane, column in enumerate((1, 6, 12, 17), 1):
        assert (label[:, column : column + 2] == lane).all()
        assert (label == lane).sum() == 20
    torch.testing.assert_close(batch["image"][0, 0, 0, 0].item(), (100 / 255 - 0.485) / 0.229, rtol=0.02, atol=0)
    # The validation images have curves, of which one has a single point and is left out.
    batch = _batch(data, "val")
    assert batch["existence"].tolist() == [[False, True, True, False]]
    assert batch["label"].unique().tolist() == [0, 2, 3]
    Lanes().check_labels(batch["label"], batch["image"], 5, "validation")
    assert set(data.splits) == {"train", "val"}
    assert data.splits["train"].fingerprint() != data.splits["val"].fingerprint()


def test_errors_of_culane_name_file_and_line(tmp_path):
    root = _culane(tmp_path)
    first = (root / "list.txt").read_text()
    good = "/driver/a.jpg /laneseg_label_w16/driver/a.png"
    for line, error, message in (
        (f"{good} 1 1 1", ValueError, "expected an image, or an image, a label map and 4 flags, got 5 fields"),
        (f"{good} 1 1 1 2", ValueError, "the flags of the lanes must be 0 or 1, got '1 1 1 2'"),
        ("/driver/x.jpg", FileNotFoundError, "there is no image '.*x.jpg'"),
        ("/driver/a.jpg", FileNotFoundError, "there is no file of lanes '.*a.lines.txt'"),
        ("/driver/a.jpg /x.png 1 1 1 1", FileNotFoundError, "there is no label map '.*x.png'"),
    ):
        (root / "list/train_gt.txt").write_text(first + line + "\n")
        with pytest.raises(error, match=f"train_gt.txt, line 3: {message}"):
            CULane(root).setup()
    (root / "list/train_gt.txt").write_text(first)
    for lines in ("1 2 3", "1 2 3 x", "1 2 nan 4"):
        (root / "driver/c.lines.txt").write_text(f"1 2 3 4\n{lines}\n")
        with pytest.raises(ValueError, match=f"c.lines.txt, line 2: expected x and y of each point of a lane, .* got '{lines}'"):
            CULane(root).setup()
    (root / "driver/c.lines.txt").write_text("")
    assert _batch(CULane(root), "val")["label"].max() == 0
    (root / "list/val.txt").write_text("\n")
    with pytest.raises(ValueError, match="has no images for val"):
        CULane(root).setup()
    (root / "list/val.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is neither a file '.*val_gt.txt' nor '.*val.txt'"):
        CULane(root).setup()


def test_invalid_images_and_label_maps_are_named(tmp_path):
    root = _culane(tmp_path)
    for path in ("a", "b"):
        for write, message in (
            (
                lambda p: _map(p, _vertical(1, 9, 17, 25) + 1),
                r"must have the values 0 \(background\), 1 to 4 \(lanes\) or 255 \(ignored\), but it has 5",
            ),
            (lambda p: _map(p, _vertical(1), "RGB"), "must be an image with one channel of 8 bits, .* it has the mode RGB"),
            (lambda p: _map(p, _vertical(1)[:10]), r"must have the height and width of its image \[20, 40\], got \[10, 40\]"),
            (lambda p: p.write_bytes(b"text"), "cannot read the image"),
        ):
            write(root / f"laneseg_label_w16/driver/{path}.png")
            with pytest.raises(ValueError, match=message) as caught:
                _batch(CULane(root))
            assert "laneseg_label_w16" in str(caught.value)
        _map(root / f"laneseg_label_w16/driver/{path}.png", _vertical(1, 9, 17, 25))
    (root / "driver/a.jpg").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"cannot read the image .*a\.jpg"):
        _batch(CULane(root))


# TuSimple.


def _tusimple(root, folder="train_set"):
    entries = [
        {"lanes": [[-2, 12, 12, 12], [26, 26, 26, 26], [-2, -2, -2, 38]], "h_samples": [4, 9, 14, 19], "raw_file": "clips/0/20.jpg"},
        {"lanes": [], "h_samples": [4, 9, 14, 19], "raw_file": "clips/1/20.jpg"},
    ]
    for i, entry in enumerate(entries):
        _image(root / folder / f"clips/{i}/20.jpg")
        for name in ("label_data_0313.json", "label_data_0601.json", "label_data_0531.json"):
            with (root / folder / name).open("a") as file:
                file.write(json.dumps(entry) + "\n")
    return root


def test_tusimple(tmp_path):
    data = TuSimple(_tusimple(tmp_path), size=SIZE, batch_size=4)
    batch = _batch(data)
    assert (len(data.splits["train"]), len(data.splits["val"]), data.num_classes) == (4, 2, 7)
    order = batch["index"].tolist()
    label, existence = batch["label"][order.index(0)], batch["existence"][order.index(0)]
    assert existence.tolist() == [False, False, True, True, False, False]  # a lane with one point is left out
    assert (label[9:, 11:14] == 3).all()  # 3 pixels wide
    assert (label[:8] == 3).sum() == 0
    assert (label[4:, 25:28] == 4).all()
    assert not batch["existence"][order.index(1)].any()
    other = TuSimple(tmp_path, lanes=2, size=SIZE, test_files=["label_data_0531.json"])
    assert _batch(other, "test")["existence"].tolist() == [[True, True], [False, False]]


def test_errors_of_tusimple_name_file_and_line(tmp_path):
    root = _tusimple(tmp_path)
    path = root / "train_set/label_data_0601.json"
    first = path.read_text().splitlines()[0]
    entry = json.loads(first)
    for wrong, error, message in (
        ("{", ValueError, "expected a JSON object, got '{'"),
        ("[1]", ValueError, "expected a JSON object with lanes, h_samples and raw_file; missing: lanes, h_samples, raw_file"),
        (json.dumps({"lanes": [], "raw_file": "x"}), ValueError, "expected a JSON object with lanes, h_samples and raw_file; missing: h_samples"),
        (json.dumps(entry | {"lanes": [[1, 2, 3]]}), ValueError, "lane 0 must have a column for each of the 4 h_samples, got 3"),
        (json.dumps(entry | {"lanes": [[1, 2, 3, "a"]]}), ValueError, "lane 0 must be a list of numbers"),
        (json.dumps(entry | {"lanes": 3}), ValueError, "lanes must be a list of lists of numbers, got 3"),
        (json.dumps(entry | {"h_samples": None}), ValueError, "h_samples must be a list of numbers, got None"),
        (json.dumps(entry | {"raw_file": "clips/x.jpg"}), FileNotFoundError, "there is no image '.*clips/x.jpg'"),
    ):
        path.write_text(f"{first}\n\n{wrong}\n")
        with pytest.raises(error, match=f"label_data_0601.json, line 3: {message}"):
            TuSimple(root).setup()
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no file of labels 'label_data_0601.json' in .*train_set"):
        TuSimple(root).setup()
    with pytest.raises(ValueError, match="val_files must name at least one file of labels"):
        TuSimple(root, val_files=[])


def test_one_class_for_all_lanes_of_tusimple(tmp_path):
    data = TuSimple(_tusimple(tmp_path), size=SIZE, lanes=1, batch_size=4)
    batch = _batch(data)
    label = batch["label"][batch["index"].tolist().index(0)]
    assert (label[4:, 25:28] == 1).all()
    assert (label[9:, 11:14] == 1).all()
    assert label.max() == 1


def test_files_of_tusimple_without_any_lane_raise(tmp_path):
    root = _tusimple(tmp_path)
    entry = {"lanes": [], "h_samples": [4, 9], "raw_file": "clips/0/20.jpg"}
    (root / "train_set/tasks.json").write_text(json.dumps(entry) + "\n")
    with pytest.raises(ValueError, match=r"test_files: no image in tasks\.json has a lane of two points"):
        TuSimple(root, test_files=["tasks.json"]).setup()
    with pytest.raises(TypeError, match=r"train_files must be a list of names of files, got 'label_data_0313\.json'"):
        TuSimple(root, train_files="label_data_0313.json")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "latin-1"])
def test_encodings_of_text_files(tmp_path, encoding):
    """A byte order mark of UTF-8 is ignored; other encodings are errors that name file and line."""
    culane, tusimple = _culane(tmp_path / "a"), _tusimple(tmp_path / "b")
    readers = {culane / "list/train_gt.txt": lambda: CULane(culane), tusimple / "train_set/label_data_0313.json": lambda: TuSimple(tusimple)}
    for path, make in readers.items():
        text = path.read_text() + ("\u00e9\n" if encoding == "latin-1" else "")
        line = 1 if encoding == "utf-16" else len(text.splitlines())
        path.write_text(text, encoding=encoding)
        if encoding == "utf-8-sig":
            make().setup()
            continue
        with pytest.raises(ValueError, match=rf"{path.name}, line {line}: expected text in UTF-8, got the byte 0x"):
            make().setup()


# BDD100K.


def _bdd100k(root):
    background, white, curb, crosswalk, styled = 8, 6, 4, 0, 6 + 16 + 32
    mask = np.full(SIZE, background, dtype=np.uint8)
    mask[:, 4:8], mask[:, 12:16], mask[:, 20:24], mask[:, 28:32], mask[:, 36:] = white, curb, crosswalk, styled, 255
    for split in ("train", "val"):
        for name in ("a", "b"):
            _image(root / f"images/100k/{split}/{name}.jpg")
            _map(root / f"labels/lane/masks/{split}/{name}.png", mask)
    return root


def test_bdd100k(tmp_path):
    batch = _batch(BDD100KLanes(_bdd100k(tmp_path), size=(10, 20), batch_size=2))
    expected = torch.zeros(20, dtype=torch.int64)
    expected[2:4] = expected[14:16] = 1
    assert torch.equal(batch["label"], expected.expand(2, 10, 20))
    assert batch["existence"].tolist() == [[True], [True]]
    data = BDD100KLanes(tmp_path, size=(10, 20), batch_size=2, categories=["road curb", "crosswalk"])
    expected = torch.zeros(20, dtype=torch.int64)
    expected[6:8] = expected[10:12] = 1
    assert torch.equal(_batch(data, "val")["label"][0], expected.expand(10, 20))
    Lanes(lanes=1).check_labels(batch["label"], batch["image"], 2, "training")


def test_bdd100k_reports_what_it_leaves_out(tmp_path):
    root = _bdd100k(tmp_path)
    _image(root / "images/100k/train/c.JPG")
    _map(root / "labels/lane/masks/train/c.png", np.full(SIZE, 8, dtype=np.uint8))
    (root / "images/100k/train/d.png").write_bytes(b"x")
    (root / "images/100k/train/._a.jpg").write_bytes(b"x")  # written by macOS
    _map(root / "labels/lane/masks/val/e.png", np.full(SIZE, 8, dtype=np.uint8))
    data = BDD100KLanes(root, size=(10, 20))
    with pytest.warns(UserWarning, match=r"(?s)2 files under .* are left out.*do not have the suffix \.jpg.*d\.png.*masks without an image.*e\.png"):
        data.setup()
    assert len(data.splits["train"]) == 3


def test_errors_of_bdd100k(tmp_path):
    root = _bdd100k(tmp_path)
    _map(root / "labels/lane/masks/train/a.png", np.zeros(SIZE, dtype=np.uint8), "RGB")
    with pytest.raises(ValueError, match=r"the label map .*a\.png must be an image with one channel"):
        _batch(BDD100KLanes(root))
    (root / "labels/lane/masks/val/b.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no mask \(.png\) for 1 of the 2 images in .*, such as b.jpg"):
        BDD100KLanes(root).setup()
    with pytest.raises(ValueError, match=r"categories must be some of crosswalk, .* got \['curb'\]"):
        BDD100KLanes(root, categories=["curb"])
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*100k"):
        BDD100KLanes(root / "images").setup()


def test_invalid_options_raise(tmp_path):
    for options, error, message in (
        ({"root": tmp_path / "x"}, FileNotFoundError, "root: there is no folder"),
        ({"size": (288,)}, ValueError, r"size must be the height and the width of the images, two integers >= 1, got \(288,\)"),
        ({"size": 64}, ValueError, "two integers >= 1, got 64"),
        ({"size": (64.0, 160)}, ValueError, r"two integers >= 1, got \(64\.0, 160\)"),
        ({"size": (True, 8)}, ValueError, r"two integers >= 1, got \(True, 8\)"),
        ({"mean": (0.5,)}, ValueError, "mean and std must hold 3 numbers each"),
        ({"std": (0.5, 0, 1)}, ValueError, "std must be positive"),
    ):
        with pytest.raises(error, match=message):
            CULane(**({"root": tmp_path} | options))
    for lanes in (0, 2.0, True):
        with pytest.raises(ValueError, match=rf"lanes must be an integer in \[1, 254\], got {lanes}"):
            TuSimple(tmp_path, lanes=lanes)
    with pytest.raises(TypeError, match="root must be the path of a folder, got None"):
        CULane(None)
