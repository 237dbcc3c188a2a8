"""Metrics of visual concepts, weight distances and their record: known answers and properties."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("lightning")
import lightning as L
from tiny_runs import Small, data_of, fit

from kdkernels.analysis import (
    KnowledgeRecord,
    KnowledgeRecorder,
    block_mask,
    bootstrap_interval,
    learning_speed,
    optimization_stability,
    suitable_images,
    visual_concepts,
    weight_distance,
)
from kdkernels.distill import Supervised
from kdkernels.distill.engine import checkpoints

# The example: blocks a, b, c of the foreground and d of the background; the concepts of three
# checkpoints are {a, d}, {a, b, d} and {b}.
MASK = torch.tensor([[[True, True], [True, False]]])
CONCEPTS = torch.tensor([[[[1, 0], [0, 1]]], [[[1, 1], [0, 1]]], [[[0, 1], [0, 0]]]], dtype=torch.bool)


def test_known_answers():
    foreground = (CONCEPTS & MASK).sum((-2, -1))
    assert foreground.flatten().tolist() == [1, 2, 1]
    weights = [torch.tensor([3.0, 4.0]), torch.tensor([4.0, 4.0]), torch.tensor([4.0, 6.5]), torch.tensor([4.0, 6.0])]
    distances = weight_distance(weights)
    assert distances.tolist() == pytest.approx([0.2, 0.7, 0.8], rel=1e-12, abs=0)
    speed = learning_speed(foreground, distances)
    assert (speed.mean, speed.std, speed.checkpoints.tolist()) == (pytest.approx(0.7), 0.0, [1])
    two = learning_speed(torch.tensor([[1, 5], [2, 3], [1, 5]]), distances)
    assert (two.mean, two.variance, two.std) == pytest.approx((0.45, 0.0625, 0.25), rel=1e-9, abs=0)
    rho = optimization_stability(CONCEPTS, MASK)
    assert (rho.foreground, rho.background, rho.all) == pytest.approx((0.5, 0.0, 1 / 3), rel=1e-12, abs=0)


def test_concepts_of_hand_made_entropies():
    """Two images, whose backgrounds have the means 1 and 3, so the average is 2."""
    entropy = torch.tensor([[[1.0, 1.0], [1.79, 1.81]], [[3.0, 2.0], [4.0, -7.0]]])
    mask = torch.tensor([[[0, 0], [1, 1]], [[0, 1], [0, 1]]])
    entropy[1, 0, 0], entropy[1, 1, 0] = 2.5, 3.5
    found = visual_concepts(entropy, mask)
    assert found.concepts.tolist() == [[[True, True], [True, False]], [[False, False], [False, True]]]
    assert (found.foreground.tolist(), found.background.tolist()) == ([1, 1], [2, 0])
    assert found.ratio.tolist() == pytest.approx([1 / 3, 1.0])
    whole = visual_concepts(entropy, mask, reference="image")
    average = (entropy[0].mean() + entropy[1].mean()) / 2
    assert torch.equal(whole.concepts, average - entropy > 0.2)
    none = visual_concepts(torch.zeros(1, 2, 2), MASK)
    assert (none.foreground.item(), none.background.item(), none.ratio.item()) == (0, 0, 0.0)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 5), st.integers(2, 5), st.floats(-1, 1))
def test_properties_of_concepts(seed, checkpoints_, images, grid, threshold):
    generator = torch.Generator().manual_seed(seed)
    entropy = torch.randn(checkpoints_, images, grid, grid, generator=generator, dtype=torch.float64)
    mask = torch.rand(images, grid, grid, generator=generator) < 0.5
    mask[:, 0, 0], mask[:, -1, -1] = True, False
    found = visual_concepts(entropy, mask, threshold=threshold)
    # A constant in all entropies of a checkpoint changes nothing, nor does the order of images.
    shifted = visual_concepts(entropy + torch.arange(checkpoints_).view(-1, 1, 1, 1) / 4, mask, threshold=threshold)
    assert (found.concepts != shifted.concepts).sum() <= 1  # a tie may break differently
    order = torch.randperm(images, generator=generator)
    assert torch.equal(visual_concepts(entropy[:, order], mask[order], threshold=threshold).concepts, found.concepts[:, order])
    assert torch.equal(found.foreground + found.background, found.concepts.sum((2, 3)))
    assert bool(((found.ratio >= 0) & (found.ratio <= 1)).all())
    more = visual_concepts(entropy, mask, threshold=threshold - 0.1)
    assert bool((more.concepts | ~found.concepts).all())
    # Each checkpoint on its own gives the same.
    assert torch.equal(visual_concepts(entropy[-1], mask, threshold=threshold).concepts, found.concepts[-1])
    rho = optimization_stability(found.concepts, mask)
    assert bool(((rho.by_image >= 0) & (rho.by_image <= 1)).all())
    repeated = optimization_stability(torch.cat([found.concepts, found.concepts[-1:]]), mask)
    assert torch.equal(repeated.by_image, rho.by_image)
    distances = torch.rand(checkpoints_, generator=generator).cumsum(0)
    speed = learning_speed(found.foreground, distances)
    assert speed.variance == pytest.approx(speed.std**2)
    for i in range(images):
        counts = found.foreground[:, i].tolist()
        assert speed.distances[i] == distances[counts.index(max(counts))].double()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 6))
def test_properties_of_weight_distances(seed, count):
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(3, 2, generator=generator) for _ in range(count + 1)]
    path = weight_distance(weights)
    assert len(path) == count
    assert bool((path.diff() >= 0).all())
    direct = float((weights[-1].double() - weights[0].double()).norm() / weights[0].double().norm())
    assert path[-1] >= direct - 1e-9  # a path is not shorter than the straight line
    torch.testing.assert_close(weight_distance([5 * w for w in weights]), path)
    coarse = weight_distance([weights[0], weights[-1]])
    assert coarse.item() == pytest.approx(direct)


def test_blocks_of_the_foreground_are_those_of_nearest_downsampling():
    mask = torch.zeros(1, 8, 8)
    mask[0, 2:4, 4:] = 1
    assert block_mask(mask, 4)[0].nonzero().tolist() == [[1, 2], [1, 3]]
    mask[0, 2, :] = 0  # the upper row of the block decides
    assert not block_mask(mask, 4).any()
    assert torch.equal(visual_concepts(torch.zeros(1, 4, 4), torch.ones(1, 8, 8).tril()).concepts, torch.zeros(1, 4, 4, dtype=torch.bool))


@pytest.mark.parametrize(("size", "grid"), [(33, 5), (8, 3), (17, 16), (16, 16), (227, 16)])
def test_blocks_are_those_of_the_noise(size, grid):
    """The pixels of a block of pixel_entropy are this block, whether or not the grid divides."""
    blocks = torch.arange(size) * grid // size  # of each pixel, by nearest-neighbour upsampling
    assert torch.equal(blocks, torch.nn.functional.interpolate(torch.arange(grid).float()[None, None], size)[0, 0].long())
    for block in range(grid):
        mask = torch.zeros(1, size, size)
        mask[:, blocks == block] = 1
        assert block_mask(mask, grid)[0].any(1).nonzero().flatten().tolist() == [block]
        assert block_mask(mask.mT, grid)[0].any(0).nonzero().flatten().tolist() == [block]


def test_suitable_images():
    """The background must have the larger mean entropy, at each checkpoint."""
    entropy = torch.zeros(2, 4, 2, 2)
    entropy[:, :, 1, 1] = torch.tensor([[1.0, 1.0, -1.0, 0.0], [2.0, -1.0, 1.0, 0.0]])
    entropy[0, 3, 0, 0] = torch.nan
    mask = MASK.expand(4, 2, 2)
    assert suitable_images(entropy, mask).tolist() == [True, False, False, False]
    assert suitable_images(entropy[1], mask).tolist() == [True, False, True, True]


def test_bootstrap_interval():
    """The interval of a normal mean has the known width, and covers about 95 % of the means."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(400, generator=generator)
    low, high = bootstrap_interval(values)
    assert (high - low) / 2 == pytest.approx(1.96 * float(values.std()) / 20, rel=0.05)
    covered = 0
    for _ in range(200):
        low, high = bootstrap_interval(torch.randn(40, generator=generator) + 3, samples=300)
        covered += low <= 3 <= high
    assert 175 <= covered <= 200
    assert bootstrap_interval(torch.tensor([2.0, 2.0])) == (2.0, 2.0)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: visual_concepts(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)), "mask: the images 0 have no block of the foreground"),
        (lambda: visual_concepts(torch.zeros(1, 2, 2), torch.ones(1, 2, 2)), "mask: the images 0 have no block of the background"),
        (lambda: visual_concepts(torch.zeros(2, 2, 2), MASK), r"mask must have the shape \[2, 2, 2\], or \[2, H, W\] of pixels"),
        (lambda: visual_concepts(torch.zeros(1, 2, 3), MASK), r"must have the shape \[N, g, g\] or \[M, N, g, g\], got \[1, 2, 3\]"),
        (lambda: visual_concepts(torch.zeros(1, 3, 3), MASK), "grid must be at most the height and the width of the masks"),
        (lambda: visual_concepts(torch.full((1, 2, 2), torch.nan), MASK), "entropy must be finite, but that of the images 0 is not"),
        (lambda: visual_concepts(torch.zeros(1, 2, 2), MASK, reference="all"), "reference must be one of"),
        (lambda: visual_concepts(torch.zeros(1, 2, 2), MASK, threshold="b"), "threshold must be a number"),
        (lambda: learning_speed(torch.zeros(3), [1.0, 2.0, 3.0]), r"foreground must have the shape \[M, N\]"),
        (lambda: learning_speed(torch.zeros(3, 1), [1.0, 2.0]), r"distances must have the shape \[3\]"),
        (lambda: optimization_stability(torch.zeros(2, 1, 2, 2), MASK), "concepts must be a tensor of bool"),
        (lambda: optimization_stability(CONCEPTS[0], MASK), r"concepts must have the shape \[M, N, g, g\]"),
        (lambda: weight_distance([torch.ones(2)]), "weights must be at least two tensors, got 1"),
        (lambda: weight_distance([torch.ones(2), torch.ones(3)]), "weights must have one shape"),
        (lambda: weight_distance([torch.zeros(2), torch.ones(2)]), "must not be zero"),
        (lambda: weight_distance([torch.ones(2), torch.full((2,), math.nan)]), "weights must be finite"),
        (lambda: weight_distance({"a": torch.ones(2)}), "weights must be a list of tensors, got dict"),
        (lambda: visual_concepts(torch.zeros(1, 2, 2), MASK, threshold=math.nan), "threshold must be finite"),
        (lambda: visual_concepts(torch.zeros(0, 1, 2, 2), MASK), "must have at least one checkpoint, image and block"),
        (lambda: suitable_images(torch.zeros(0, 1, 2, 2), MASK), "must have at least one checkpoint, image and block"),
        (lambda: learning_speed([1.0], [1.0]), "foreground must be a tensor, got list"),
        (lambda: learning_speed(torch.zeros(2, 0), [1.0, 2.0]), "with at least one image and checkpoint"),
        (lambda: learning_speed(torch.full((2, 1), math.nan), [1.0, 2.0]), "must be finite"),
        (lambda: learning_speed(torch.zeros(2, 1), [1.0, math.inf]), "must be finite"),
        (lambda: optimization_stability(visual_concepts(torch.eye(2)[None], MASK), MASK), "concepts must be a tensor of bool"),
        (lambda: bootstrap_interval([1.0]), "values must be a tensor, got list"),
        (lambda: bootstrap_interval(torch.tensor([1.0, math.inf])), "values must be finite"),
        (lambda: bootstrap_interval(torch.zeros(3), samples=1.5), "samples must be an int"),
        (lambda: bootstrap_interval(torch.zeros(3), seed=2**70), r"seed in \[0, 2\*\*63\)"),
        (lambda: block_mask(torch.zeros(1, 2, 2), 0), "grid must be at least 1, got 0"),
        (lambda: block_mask(torch.zeros(1, 2, 2), "2"), "grid must be an int"),
        (lambda: block_mask(torch.full((1, 2, 2), math.nan), 2), "mask must not have NaN"),
        (lambda: bootstrap_interval(torch.zeros(0)), "values must have the shape"),
        (lambda: bootstrap_interval(torch.zeros(3), confidence=1.0), "confidence must lie in"),
        (lambda: block_mask(torch.zeros(2, 2), 2), r"mask must have the shape \[N, H, W\]"),
    ],
)
def test_wrong_input_raises(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_numbers_of_unusual_types():
    complex_weights = [torch.ones(2, dtype=torch.cfloat), 1j * torch.ones(2, dtype=torch.cfloat)]
    assert weight_distance(complex_weights).item() == pytest.approx(math.sqrt(2), rel=1e-12, abs=0)
    found = learning_speed(torch.tensor([[False, True], [True, True]]), torch.tensor([0.5, 1.0], requires_grad=True))
    assert found.checkpoints.tolist() == [1, 0]
    assert not found.distances.requires_grad


# The recorder.


def _sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def _run(folder, epochs=3, recorder=None, ckpt=None, **options):
    torch.manual_seed(0)
    method = Supervised(Small(), optimizer=_sgd, scheduler=lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0))
    recorder = recorder or KnowledgeRecorder(folder / "record", "features.0")
    callbacks = [recorder, *checkpoints(folder, every=options.pop("every", None))]
    trainer = L.Trainer(max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=callbacks, **options)
    trainer.fit(method, data_of(), ckpt_path=ckpt)
    return method


def test_recorder_records_weights_and_distances(tmp_path):
    seen = []

    class Watch(KnowledgeRecorder):
        def on_train_batch_end(self, trainer, pl_module, *rest):
            seen.append(pl_module.student.features[0].weight.detach().clone())
            super().on_train_batch_end(trainer, pl_module, *rest)

    method = _run(tmp_path, recorder=Watch(tmp_path / "record", "features.0"))
    record = KnowledgeRecord.load(tmp_path / "record")
    assert (record.layer, record.epochs, record.checkpoints) == ("features.0", [0, 1, 2, 3], [0, 1, 2, 3])
    states = [record.weights(epoch) for epoch in range(4)]
    weights = [state["features.0.weight"] for state in states]
    assert record.by_epoch == pytest.approx([0.0, *weight_distance(weights).tolist()], rel=1e-9)
    by_step = weight_distance([weights[0], *seen])
    assert record.by_step == pytest.approx([0.0, *by_step[[2, 5, 8]].tolist()], rel=1e-9)
    assert record.distances(by="step") == record.by_step
    assert all(torch.equal(value, method.state_dict()[f"student.{name}"]) for name, value in states[-1].items())


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_record_of_a_resumed_run(stop, tmp_path):
    _run(tmp_path / "whole")
    _run(tmp_path / "parts", every=1, max_steps=stop)
    _run(tmp_path / "parts", ckpt=tmp_path / "parts" / "last.ckpt")
    whole, parts = (KnowledgeRecord.load(tmp_path / name / "record") for name in ("whole", "parts"))
    assert whole[1:] == parts[1:]
    for epoch in range(4):
        assert all(torch.equal(a, b) for a, b in zip(whole.weights(epoch).values(), parts.weights(epoch).values(), strict=True))


def test_recorder_with_accumulation_and_some_epochs(tmp_path):
    recorder = KnowledgeRecorder(tmp_path / "record", "features", [0, 2, 9])
    _run(tmp_path, recorder=recorder, accumulate_grad_batches=3)
    record = KnowledgeRecord.load(tmp_path / "record")
    assert record.checkpoints == [0, 2]
    assert record.by_step == pytest.approx(record.by_epoch)  # one step in each epoch
    assert record.distances() == [record.by_epoch[0], record.by_epoch[2]]


def test_recorders_of_two_layers(tmp_path):
    """Each has a state of its own in the checkpoint, also if the weights have the same size."""

    def trainer(epochs, layers):
        recorders = [KnowledgeRecorder(tmp_path / layer, layer) for layer in layers]
        return L.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[*recorders, *checkpoints(tmp_path)]
        )

    torch.manual_seed(0)
    trainer(2, ["features.0", "head"]).fit(Supervised(Small(), optimizer=_sgd), data_of())
    before = KnowledgeRecord.load(tmp_path / "head")
    with pytest.raises(ValueError, match=r"without a record of layer 'features\.1'"):
        trainer(3, ["features.1"]).fit(Supervised(Small(), optimizer=_sgd), data_of(), ckpt_path=tmp_path / "last.ckpt")
    trainer(3, ["features.0", "head"]).fit(Supervised(Small(), optimizer=_sgd), data_of(), ckpt_path=tmp_path / "last.ckpt")
    after = KnowledgeRecord.load(tmp_path / "head")
    assert after.by_epoch[:3] == before.by_epoch
    assert after.epochs == [0, 1, 2, 3]
    states = [after.weights(epoch)["head.weight"] for epoch in range(4)]
    assert after.by_epoch == pytest.approx([0.0, *weight_distance(states).tolist()], rel=1e-9)


def test_recorder_that_begins_in_the_middle_raises(tmp_path):
    torch.manual_seed(0)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    L.Trainer(max_epochs=1, callbacks=checkpoints(tmp_path), **options).fit(Supervised(Small(), optimizer=_sgd), data_of())
    resumed = L.Trainer(max_epochs=2, callbacks=[KnowledgeRecorder(tmp_path / "record", "head")], **options)
    with pytest.raises(ValueError, match=r"resumed after \d+ steps from a checkpoint without a record of layer 'head'"):
        resumed.fit(Supervised(Small(), optimizer=_sgd), data_of(), ckpt_path=tmp_path / "last.ckpt")
    assert not (tmp_path / "record").exists()


def test_fast_dev_run_records_nothing(tmp_path):
    fit(Supervised(Small()), callbacks=[KnowledgeRecorder(tmp_path / "record", "head")], fast_dev_run=True)
    assert not (tmp_path / "record").exists()


def test_weights_that_are_not_in_the_record(tmp_path):
    with pytest.warns(UserWarning, match="stores no weights: its first epoch is 5, and the training has 1"):
        fit(Supervised(Small()), callbacks=[KnowledgeRecorder(tmp_path / "none", "head", [5])], max_epochs=1)
    fit(Supervised(Small()), callbacks=[KnowledgeRecorder(tmp_path / "record", "head", [1])], max_epochs=1)
    record = KnowledgeRecord.load(tmp_path / "record")
    (tmp_path / "record" / "epoch_7.pt").write_bytes((tmp_path / "record" / "epoch_1.pt").read_bytes())
    for epoch in (0, 7):
        with pytest.raises(FileNotFoundError, match=rf"has the weights of the epochs \[1\], not of {epoch}"):
            record.weights(epoch)
    for epochs, kind in (([], ValueError), (3, TypeError)):
        with pytest.raises(kind, match="epochs must"):
            KnowledgeRecorder(tmp_path, "head", epochs)


def test_recorder_errors(tmp_path):
    _run(tmp_path, epochs=1)
    with pytest.raises(FileExistsError, match="has the record of another run"):
        _run(tmp_path, epochs=1)
    for layer, message in (("features.9", "Small has no layer 'features.9'"), ("features.2", "has no weights, and no weight distance")):
        with pytest.raises(ValueError, match=message):
            fit(Supervised(Small()), callbacks=[KnowledgeRecorder(tmp_path / "other", layer)])
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match="epochs must be integers >= 0"):
        KnowledgeRecorder(tmp_path, "head", [-1])
    with pytest.raises(FileNotFoundError, match=r"has no record 'knowledge\.json'"):
        KnowledgeRecord.load(tmp_path)
    (tmp_path / "record" / "epoch_1.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"names epoch 1, but there is no file 'epoch_1\.pt'"):
        KnowledgeRecord.load(tmp_path / "record")
    for text in ("{", json.dumps({"version": 1}), json.dumps({"version": 2})):
        (tmp_path / "record" / "knowledge.json").write_text(text)
        with pytest.raises(ValueError, match=r"is not a record of KnowledgeRecorder"):
            KnowledgeRecord.load(tmp_path / "record")


def test_recorder_of_a_plain_module(tmp_path):
    class Plain(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def training_step(self, batch, _):
            return self.layer(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(4, 2)), batch_size=2)
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.callbacks.append(KnowledgeRecorder(tmp_path, "layer"))
    trainer.fit(Plain(), loader)
    record = KnowledgeRecord.load(tmp_path)
    assert record.epochs == [0, 1]
    assert record.by_epoch[1] > 0
    assert math.isfinite(record.by_step[1])
