"""SyntheticLanes: deterministic scenes, and label maps that agree with the geometry of the road."""

import pytest
import torch

pytest.importorskip("lightning")

from kdkernels.data import SyntheticLanes
from kdkernels.data.lane_scenes import LaneScenes, _Scene
from kdkernels.tasks import Lanes
from kdkernels.tasks.lane_curves import extract_columns
from kdkernels.tasks.lanes import lane_existence

SIZE = (64, 160)


def _scenes(**options):
    return LaneScenes(**({"seed": 3, "size": SIZE, "night": 0.2} | options))


def test_a_scene_depends_only_on_seed_and_index():
    index = torch.arange(9)
    images, labels = _scenes().make(index)
    assert (images.dtype, images.shape, labels.dtype, labels.shape) == (torch.uint8, (9, 3, *SIZE), torch.uint8, (9, *SIZE))
    for part in (torch.tensor([5]), torch.tensor([8, 2, 4])):
        image, label = _scenes().make(part)
        assert torch.equal(image, images[part])
        assert torch.equal(label, labels[part])
    assert not any(torch.equal(images[i], images[j]) for i in range(9) for j in range(i))
    other, _ = _scenes(seed=4).make(index)
    assert not any(torch.equal(*pair) for pair in zip(images, other, strict=True))


def test_images_that_are_kept_in_memory_do_not_change():
    splits = [SyntheticLanes(6, 3, 2, max_memory=memory).make_splits() for memory in (1.0, 0.0)]
    for name in ("train", "val", "test"):
        for index in ([1], [1, 0], [0, 1]):  # partly generated before
            in_memory, on_request = (split[name][index] for split in splits)
            assert all(torch.equal(in_memory[field], on_request[field]) for field in ("image", "label", "index"))
    assert [split["train"].keep for split in splits] == [True, False]
    assert not torch.equal(splits[0]["train"][[0]]["image"], splits[0]["val"][[0]]["image"])
    assert splits[1]["train"].fingerprint() != splits[1]["val"].fingerprint()
    assert splits[1]["train"][1]["label"].shape == SIZE


def test_batches_fit_the_task():
    data = SyntheticLanes(8, 4, 4, size=(32, 64), batch_size=4)
    data.setup()
    batch = data.finish(next(iter(data.train_dataloader())))
    assert batch["image"].shape == (4, 3, 32, 64)
    assert batch["label"].dtype == torch.int64
    assert (data.image_shape, data.num_classes) == ((3, 32, 64), 5)
    Lanes().check_data(data)
    Lanes().check_labels(batch["label"], batch["image"], 5, "training")


def test_labels_are_the_lines_of_the_road():
    """The middle of a labelled line at a row is the column of the formula, to one pixel."""
    index = torch.arange(40)
    scene = _Scene(_scenes(), index)
    label = scene.label().long()
    rows = [63, 55, 47, 39]
    maps = torch.stack([label == lane for lane in range(1, 5)], 1).float()
    columns = extract_columns(maps, rows)
    t = (torch.tensor(rows) + 0.5 - 64 * scene.horizon.view(-1, 1)) / (64 * (1 - scene.horizon.view(-1, 1)))  # [B, R]
    middle = scene.vanishing.view(-1, 1) + scene.curvature.view(-1, 1) * (1 - t) ** 2
    offset = scene.lines.view(-1, 4, 1) * scene.lane_width.view(-1, 1, 1)
    expected = (middle[:, None] + offset * t[:, None]) * 160 - 0.5
    inside = ~columns.isnan() & (expected > 6) & (expected < 153)
    assert inside.sum() > 200
    assert ((columns - expected).abs()[inside] <= 1).all()
    assert torch.equal(lane_existence(label, 4) & ~scene.present, torch.zeros(40, 4, dtype=torch.bool))
    # Lines are in order from left to right.
    pairs = columns[:, 1:] - columns[:, :-1]
    assert (pairs[~pairs.isnan()] > 0).all()


def test_scenes_vary():
    index = torch.arange(200)
    scene = _Scene(_scenes(), index)
    assert 0.1 < scene.is_night.float().mean() < 0.3
    share = lane_existence(scene.label().long(), 4).float().mean(0)
    assert (share > torch.tensor([0.3, 0.8, 0.8, 0.3])).all()
    assert (share < 1).all()
    images = _scenes(night=0.5).make(torch.arange(24))[0].float()
    night = _Scene(_scenes(night=0.5), torch.arange(24)).is_night.flatten()
    assert images[night].mean() < 0.5 * images[~night].mean()


def test_a_painted_line_is_lighter_than_the_road():
    """On days without noise, the pixels of labelled lines are lighter on average than the road
    beside them.
    """
    images, labels = _scenes(night=0.0).make(torch.arange(30))
    grey, lower = images.float().mean(1)[:, 40:], labels[:, 40:]
    beside = (torch.nn.functional.max_pool2d((lower > 0).float(), (1, 13), 1, (0, 6)) > 0) & (lower == 0)
    lines = torch.stack([grey[i][lower[i] > 0].mean() for i in range(30)])
    roads = torch.stack([grey[i][beside[i]].mean() for i in range(30)])
    assert ((lines - roads) > 0).float().mean() > 0.8


def test_invalid_options_raise():
    for options, message in (
        ({"size": (64, 100)}, r"two multiples of 8, got \(64, 100\)"),
        ({"size": (64,)}, r"two multiples of 8, got \(64,\)"),
        ({"night": 1.5}, r"night must lie in \[0, 1\], got 1.5"),
        ({"val_size": 0}, "val_size must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            SyntheticLanes(**options)
