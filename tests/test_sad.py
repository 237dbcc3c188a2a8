"""Self attention distillation: known answers, gradients, and training."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdkernels import reference
from kdkernels.nn import SADLoss, sad_attention, sad_loss

MAP = torch.tensor([[[[0.0, 1.0], [1.0, 2.0]]]], dtype=torch.float64)
ATTENTION = [0.0163841188, 0.0445366524, 0.0445366524, 0.8945425764]


def _random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_known_attention_and_distance():
    assert sad_attention(MAP).flatten().tolist() == pytest.approx(ATTENTION, rel=1e-8, abs=0)
    uniform = torch.ones_like(MAP)
    assert sad_loss([MAP, uniform]).item() == pytest.approx(0.5544418871, rel=1e-9, abs=0)
    assert sad_loss([MAP, uniform], reduction="mean").item() == pytest.approx(0.1386104718, rel=1e-9, abs=0)
    assert sad_loss([MAP, MAP]).item() == 0
    assert sad_attention(torch.ones(2, 3, 4, 5)).flatten().tolist() == pytest.approx([1 / 20] * 40)


def test_interpolation_precedes_the_softmax():
    """Energies [1, 3] enlarged to four positions, computed by hand."""
    x = torch.tensor([[[[1.0, 3.0**0.5]]]], dtype=torch.float64)
    for align_corners, energies in ((False, [1, 1.5, 2.5, 3]), (True, [1, 5 / 3, 7 / 3, 3])):
        want = torch.tensor(energies, dtype=torch.float64).softmax(0)
        torch.testing.assert_close(sad_attention(x, (1, 4), align_corners=align_corners).flatten(), want)


def _is_zero(gradient):
    """Return whether there is no gradient, or one of rounding errors, as of a single position."""
    return gradient is None or bool((gradient.abs() < 1e-25).all())


@given(
    seed=st.integers(0, 1000),
    sizes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)), min_size=3, max_size=3),
    paths=st.sampled_from([None, [(0, 1)], [(0, 2)], [(2, 0), (1, 2)]]),
    detach=st.booleans(),
    reduction=st.sampled_from(["sum", "mean"]),
    align_corners=st.booleans(),
    normalize=st.booleans(),
)
def test_loss_and_gradients_equal_the_definition(seed, sizes, paths, detach, reduction, align_corners, normalize):
    features = [_random(2, *size, seed=seed + i).requires_grad_() for i, size in enumerate(sizes)]
    options = {"detach_target": detach, "reduction": reduction, "align_corners": align_corners, "normalize": normalize}
    got, want = sad_loss(features, paths, **options), reference.sad_loss(features, paths, **options)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-14)
    grads = [torch.autograd.grad(loss, features, allow_unused=True, retain_graph=True) if loss.requires_grad else [None] * 3 for loss in (got, want)]
    for a, b in zip(*grads, strict=True):
        assert _is_zero(a) == _is_zero(b)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


@given(seed=st.integers(0, 1000))
def test_properties(seed):
    x = _random(3, 4, 3, 5, seed=seed)
    attention = sad_attention(x)
    torch.testing.assert_close(attention.sum((1, 2)), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(sad_attention(-x[:, [2, 0, 3, 1]]), attention)
    torch.testing.assert_close(sad_attention(x, (6, 10)).sum((1, 2)), torch.ones(3, dtype=torch.float64))


def test_normalized_maps_do_not_depend_on_the_scale():
    """Energies [0, 1, 1, 4] with the mean 1.5."""
    want = torch.tensor([0, 1 / 1.5, 1 / 1.5, 4 / 1.5], dtype=torch.float64).softmax(0)
    for scale in (1.0, 1e3, 1e-3):
        torch.testing.assert_close(sad_attention(scale * MAP, normalize=True).flatten(), want)
    zero = torch.zeros(1, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    loss = sad_loss([zero, MAP], normalize=True)
    loss.backward()
    assert not zero.grad.any()
    torch.testing.assert_close(loss, (want - 0.25).square().sum())


def test_targets_receive_no_gradient():
    features = [_random(2, 3, 4, 4, seed=i).requires_grad_() for i in range(3)]
    for detach in (True, False):
        gradients = torch.autograd.grad(sad_loss(features, detach_target=detach), features, allow_unused=True)
        assert [g is not None and bool(g.any()) for g in gradients] == [True, True, not detach]


def test_saturated_maps_and_half_precision():
    large = 300 * torch.ones(1, 2, 2, 2, dtype=torch.float16)  # its energy 180,000 exceeds float16
    assert sad_attention(large).flatten().tolist() == [0.25] * 4
    energies = torch.tensor([50.0, 20.0, 10.0, 0.0], dtype=torch.float64)
    attention = sad_attention(energies.sqrt().reshape(1, 1, 2, 2)).flatten()
    assert attention[0].item() == pytest.approx(1 - 1e-13, abs=1e-13)
    assert sad_loss([large, large.float()]).dtype == torch.float32


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        ([MAP], {}, "features must be those of at least two layers, got 1"),
        ([], {}, "features must be those of at least two layers, got 0"),
        ([MAP, MAP], {"paths": (0, 1)}, r"paths must be pairs of different positions in \[0, 1\], got 0"),
        ([MAP, MAP], {"paths": [(0, 1), (0, 1)]}, "paths must not contain a pair twice"),
        ([MAP, MAP], {"paths": 3}, "paths must be a list of pairs of positions, got 3"),
        ([MAP, MAP[0]], {}, r"features\[1\] must have the shape \[B, C, H, W\]"),
        ([MAP, torch.ones(2, 1, 2, 2)], {}, "features must have the same batch size"),
        ([MAP, MAP], {"paths": []}, "paths must have at least one pair"),
        ([MAP, MAP], {"paths": [(0, 2)]}, r"paths must be pairs of different positions in \[0, 1\], got \(0, 2\)"),
        ([MAP, MAP], {"paths": [(1, 1)]}, "paths must be pairs of different positions"),
        ([MAP, MAP], {"reduction": "max"}, "reduction must be one of"),
    ],
)
def test_invalid_arguments_raise(features, options, message):
    with pytest.raises(ValueError, match=message):
        sad_loss(features, **options)


@pytest.mark.parametrize("size", [4, (0, 3), (-4, 4), (4.0, 4), (4, 4, 4), (True, 4)])
def test_invalid_sizes_raise(size):
    with pytest.raises(ValueError, match="size must be the height and the width of the map, two integers >= 1"):
        sad_attention(MAP, size)


def test_module():
    features = [_random(2, 3, 4, 4, seed=i) for i in range(3)]
    assert torch.equal(SADLoss([(2, 0)], reduction="mean")(features), sad_loss(features, [(2, 0)], reduction="mean"))
    assert torch.equal(SADLoss()(features), sad_loss(features))
    with pytest.raises(ValueError, match="reduction must be one of"):
        SADLoss(reduction="none")
    with pytest.raises(ValueError, match=r"paths must be a list of pairs of positions, got \[0, 1\]"):
        SADLoss([0, 1])
    with pytest.raises(TypeError, match="features must be a list"):
        sad_loss(features[0])


# The trainer.

pytest.importorskip("lightning")
from tiny_runs import IMAGES, Small, data_of, fit  # noqa: E402

from kdkernels.data import SegmentedClutterDigits  # noqa: E402
from kdkernels.distill import SAD  # noqa: E402
from kdkernels.models import TinyCNN, TinyFCN  # noqa: E402
from kdkernels.tasks import Segmentation  # noqa: E402

BLOCKS = ["block1", "block2", "block3"]


def test_trainer_adds_the_loss_from_its_start_step():
    method = SAD(TinyCNN(4, num_classes=3), BLOCKS, paths=[["block1", "block3"]], gamma=0.5, start_step=4)
    seen = []
    losses = method.losses
    method.losses = lambda batch: (seen.append((method.global_step, losses(batch)[1])), losses(batch))[1]
    fit(method, data_of(), max_epochs=2)
    assert [step for step, terms in seen if "attention" in terms] == [4, 5]
    assert [step for step, _ in seen] == list(range(6))
    batch = {"image": torch.rand(2, 3, 8, 8), "label": torch.tensor([0, 1])}
    features = list(method.student_outputs(batch)[1].values())
    torch.testing.assert_close(losses(batch)[1]["attention"], 0.5 * sad_loss(features, [(0, 2)]))


def test_which_parameter_receives_which_gradient():
    method = SAD(TinyCNN(4, num_classes=3), BLOCKS, paths=[["block1", "block2"]])
    for detach in (True, False):
        method.loss_options["detach_target"] = detach
        method.zero_grad()
        method.attention_loss(method.student_outputs({"image": torch.rand(2, 3, 8, 8)})[1]).backward()
        student = method.student
        assert all(p.grad is not None for p in student.block1.parameters())
        assert all((p.grad is None) == detach for p in student.block2.parameters())
        assert all(p.grad is None for p in [*student.block3.parameters(), *student.fc.parameters()])


def test_segmentation():
    data = SegmentedClutterDigits(train_size=8, val_size=4, test_size=2, batch_size=4)
    assert "train/loss_attention" in fit(SAD(TinyFCN(4), BLOCKS, task=Segmentation()), data).callback_metrics


def test_invalid_options_raise_before_training():
    make = lambda **options: SAD(TinyCNN(4, num_classes=3), BLOCKS, **options)  # noqa: E731
    for options, message in (
        ({"paths": [["block1", "block4"]]}, r"paths must be pairs of the layers in student_taps \(block1, block2, block3\)"),
        ({"paths": [["block1", "block1"]]}, "paths must be pairs of different positions"),
        ({"paths": []}, "paths must have at least one pair"),
        ({"gamma": -1.0}, "gamma, the weight of a term"),
        ({"start_step": -1}, "start_step must be an integer >= 0"),
        ({"reduction": "none"}, "reduction must be 'sum' or 'mean'"),
        ({"teacher": Small()}, "the network is its own teacher"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**options)
    with pytest.raises(ValueError, match="student_taps must name at least two layers"):
        SAD(Small(), ["features"])
    with pytest.raises(ValueError, match=r"the output of layer 'head' must be a feature map \[B, C, H, W\], got \[2, 3\]"):
        fit(SAD(Small(), ["features", "head"]))
    method = make(start_step=3)
    with pytest.raises(ValueError, match="start_step must be below the number of steps of the run, 3, got 3"):
        fit(method)
    assert method.global_step == 0
    fit(method, fast_dev_run=True)
    unlabelled = torch.utils.data.DataLoader([{"image": image} for image, _ in IMAGES], batch_size=4)
    with pytest.raises(ValueError, match="SAD trains the last layer on labels alone"):
        fit(make(), unlabelled)
