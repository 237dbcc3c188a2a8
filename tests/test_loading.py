"""Random numbers computed from keys, the order of samples, and augmentation."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("lightning")
from kdkernels.data import Augment, Digits
from kdkernels.data.keyed_random import bits, normal, permuted, seeded, uniform
from kdkernels.data.loading import Batches, Loader

# Random numbers computed from keys.


def test_random_numbers_have_the_documented_distributions():
    index = torch.arange(200_000)
    u, n = uniform(3, index), normal(3, index)
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 5 * (1 / 12 / len(u)) ** 0.5  # five standard errors
    counts = torch.histc(u, 100, 0, 1)
    assert ((counts - 2000) ** 2 / 2000).sum() < 99 + 5 * (2 * 99) ** 0.5  # chi square
    assert abs(n.mean()) < 5 * len(n) ** -0.5
    assert abs(n.var() - 1) < 5 * (2 / len(n)) ** 0.5
    assert n.isfinite().all()
    flips = sum(bin(int(a ^ b) & (2**64 - 1)).count("1") for a, b in zip(bits(3, index[:2000]), bits(3, index[:2000] ^ 1), strict=True))
    assert abs(flips / 2000 - 32) < 5 * (16 / 2000) ** 0.5  # changing one bit of the key flips half of the output bits
    neighbours = torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1]
    assert abs(neighbours) < 5 * len(u) ** -0.5


def test_random_numbers_depend_on_the_whole_key():
    index = torch.arange(64)
    assert torch.equal(uniform(1, 2, index)[10:20], uniform(1, 2, index[10:20]))
    for other in (uniform(2, 2, index), uniform(1, 3, index), uniform(2, 1, index)):
        assert not torch.equal(uniform(1, 2, index), other)


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**31), epoch=st.integers(0, 1000))
def test_permuted_is_a_permutation(size, seed, epoch):
    assert sorted(permuted(torch.arange(size), size, seed, epoch).tolist()) == list(range(size))


def test_permuted_values_are_uniform_at_every_position():
    positions = permuted(torch.arange(5).expand(4000, 5), 5, torch.arange(4000)[:, None])
    for position in range(5):
        counts = positions[:, position].bincount(minlength=5)
        assert ((counts - 800.0) ** 2 / 800).sum() < 4 + 5 * 8**0.5


def test_seeded_restores_the_global_generators():
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    expected = torch.rand(3), np.random.rand(3)  # noqa: NPY002
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    with seeded(1, 2):
        inside = torch.rand(3)
    with seeded(1, 2):
        assert torch.equal(torch.rand(3), inside)
    assert torch.equal(torch.rand(3), expected[0])
    assert (np.random.rand(3) == expected[1]).all()  # noqa: NPY002


# Batches.


@given(
    size=st.integers(4, 400),
    batch=st.integers(1, 40),
    world=st.integers(1, 4),
    accumulate=st.integers(1, 4),
    shuffle=st.booleans(),
)
def test_batches_contain_each_sample_once_with_equal_weight(size, batch, world, accumulate, shuffle):
    ranks = [list(Batches(size, batch, shuffle, seed=1, accumulate=accumulate, rank=r, world=world)) for r in range(world)]
    assert len({len(draws) for draws in ranks}) == 1
    assert sorted(i for draws in ranks for draw in draws for i in draw.index) == list(range(size))
    assert all(draw.index for draws in ranks for draw in draws)
    for start in range(0, len(ranks[0]), accumulate):
        window = [draw for draws in ranks for draw in draws[start : start + accumulate]]
        samples = sum(len(draw.index) for draw in window)
        for draw in window:  # Lightning divides by accumulate, and DDP by world
            assert draw.share / accumulate / world / len(draw.index) == pytest.approx(1 / samples)


def test_joint_batches_do_not_depend_on_the_number_of_processes():
    single_process = [draw.index for draw in Batches(100, 12, True, seed=3)]
    ranks = [list(Batches(100, 4, True, seed=3, rank=r, world=3)) for r in range(3)]
    assert single_process == [[sample for draws in ranks for sample in draws[i].index] for i in range(len(single_process))]


def test_order_changes_with_the_epoch_and_the_seed():
    def order(seed, epoch):
        batches = Batches(50, 8, True, seed=seed)
        batches.set_epoch(epoch)
        return [i for draw in batches for i in draw.index]

    assert order(0, 1) == order(0, 1)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_more_processes_than_samples_raise():
    with pytest.raises(ValueError, match="got 3 samples for 4 processes"):
        Batches(3, 8, False, world=4)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_resumes_in_the_middle_of_an_epoch(workers):
    data = Digits(batch_size=100, augment=Augment(crop=1))
    data.setup()

    def loader():
        new_loader = Loader(data.splits["train"], Batches(len(data.splits["train"]), 100, True, views=None), workers)
        new_loader.sampler.set_epoch(4)
        return new_loader

    complete = [batch["index"] for batch in loader()]
    first = loader()
    part = [batch["index"] for batch in itertools.islice(first, 3)]
    second = loader()
    second.load_state_dict(first.state_dict())
    part += [batch["index"] for batch in second]
    assert all(torch.equal(a, b) for a, b in zip(complete, part, strict=True))
    assert [len(list(second)), len(complete)] == [11, 11]  # the next epoch starts at its first batch
    other_epoch = loader()
    other_epoch.load_state_dict({"epoch": 3, "given": 11})
    assert len(list(other_epoch)) == 11


# Augmentation.


def _batch(count=64, size=8, channels=3, view=0):
    image = torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8)
    return {"image": image, "label": torch.arange(count) % 10, "index": torch.arange(count), "view": view}


def _to_float(image):
    return image.float() / 255


def test_crop_and_flip_transform_image_and_mask_alike():
    batch = _batch(400)
    batch["mask"] = batch["image"][:, 0] > 127
    out = Augment(crop=2, flip=True)(batch, _to_float)
    padded = torch.nn.functional.pad(batch["image"], [2] * 4)
    seen = set()
    for i, image in enumerate(out["image"]):
        matches = [
            (y, x, flip)
            for y in range(5)
            for x in range(5)
            for flip in (False, True)
            if torch.equal(_to_float(padded[i, :, y : y + 8, x : x + 8].flip(-1) if flip else padded[i, :, y : y + 8, x : x + 8]), image)
        ]
        assert len(matches) == 1
        seen.add(matches[0])
        assert torch.equal(out["mask"][i], (image[0] * 255 > 127.5))
    assert len(seen) == 50  # every offset, with and without flip


def test_rotation_of_image_and_mask(monkeypatch):
    """A rotation by 90 degrees equals torch.rot90, and one by less than half a pixel changes
    nothing. Pixels from outside are black, and a mask rotates with its image.
    """
    batch = _batch(50)
    batch["mask"] = batch["image"][:, 0] > 127
    assert torch.equal(Augment(rotate=1.0)(batch, _to_float)["image"], _to_float(batch["image"]))
    rotated = Augment(rotate=45.0)(batch, _to_float)
    assert torch.equal(rotated["mask"], rotated["image"][:, 0] * 255 > 127.5)
    assert (
        len(
            {
                tuple(image[0].flatten().tolist())
                for image in Augment(rotate=45.0)({**batch, "image": batch["image"][:1].expand(50, -1, -1, -1)}, _to_float)["image"]
            }
        )
        > 10
    )
    middle = slice(3, 5)
    ones = {**batch, "image": torch.full_like(batch["image"], 255)}
    rotated = Augment(rotate=45.0)(ones, _to_float)["image"]
    assert (rotated[:, :, middle, middle] == 1).all()
    assert 0 < (rotated == 0).float().mean() < 0.3
    monkeypatch.setattr(Augment, "_random", lambda self, purpose, view, index, count: torch.ones(len(index), count))
    assert torch.equal(Augment(rotate=90.0)(batch, _to_float)["image"], _to_float(batch["image"].rot90(1, (2, 3))))
    with pytest.raises(ValueError, match="rotate must be >= 0, got -1"):
        Augment(rotate=-1)


def test_augmentation_depends_only_on_seed_view_and_sample():
    augment, batch = Augment(crop=2, flip=True, cutout=4, seed=7, rotate=20.0), _batch()
    complete = augment(batch, _to_float)["image"]
    subset = torch.tensor([40, 3, 17])
    part = {name: value[subset] if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    assert torch.equal(augment(part, _to_float)["image"], complete[subset])
    assert not torch.equal(augment({**batch, "view": 1}, _to_float)["image"], complete)
    assert not torch.equal(Augment(crop=2, flip=True, cutout=4, seed=8)(batch, _to_float)["image"], complete)


def test_cutout_sets_a_square_to_zero():
    batch = _batch(300, size=16)
    batch["image"].fill_(255)
    out = Augment(cutout=6)(batch, _to_float)["image"]
    areas = (out == 0)[:, 0].flatten(1).sum(1)
    assert areas.max() == 36
    assert areas.min() >= 9 - 6  # a square centred at a corner covers at least a quarter of its area, up to half a pixel of rounding
    inner_squares = [(image[0] == 0).nonzero() for image in out if int((image[0] == 0).sum()) == 36]
    assert all((hole.max(0).values - hole.min(0).values).tolist() == [5, 5] for hole in inner_squares)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0), (0.2, 1.0)])
def test_mixing_weights_match_the_mixed_images(mixup, cutmix):
    count = 2000
    batch = _batch(count, size=16)
    batch["image"] = batch["label"][:, None, None, None].expand(count, 3, 16, 16).to(torch.uint8).contiguous()  # pixel values equal the label
    out = Augment(mixup=mixup, cutmix=cutmix)(batch, lambda image: image.float())
    mean = out["image"].mean((1, 2, 3))
    expected = out["mix"] * out["label"] + (1 - out["mix"]) * out["mixed_label"]
    torch.testing.assert_close(mean, expected, rtol=0, atol=1e-4)
    assert out["mix"].min() >= 0
    assert out["mix"].max() <= 1
    if not cutmix:  # Beta(a, a): mean 1/2, variance 1 / (4 (2 a + 1))
        assert abs(out["mix"].mean() - 0.5) < 5 * (0.25 / count) ** 0.5
        assert abs(out["mix"].var() - 1 / (4 * (2 * mixup + 1))) < 0.02
    else:
        cutmix_fraction = (out["image"] == out["image"].round()).flatten(1).all(1).float().mean()
        assert cutmix_fraction > 0.4 if mixup else cutmix_fraction == 1


def test_augment_raises_for_invalid_options():
    with pytest.raises(ValueError, match="crop must be >= 0, got -1"):
        Augment(crop=-1)
    with pytest.raises(ValueError, match="views must be at least 1, got 0"):
        Augment(views=0)
