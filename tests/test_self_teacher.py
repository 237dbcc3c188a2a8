"""The self-teacher of FRSKD: known answers, and a comparison with the published formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdkernels.models import SelfTeacher, TinyBiFPN
from kdkernels.models.bifpn import fusion_weights, max_pool_to

RESNET18 = {"layer1": (64, 32, 32), "layer2": (128, 16, 16), "layer3": (256, 8, 8), "layer4": (512, 4, 4)}
HALVING = {"a": (3, 16, 8), "b": (4, 8, 4), "c": (6, 4, 2)}


def _inputs(shapes, dtype=torch.float32):
    return [torch.randn(2, *shape, dtype=dtype) for shape in shapes.values()]


def test_known_fusion_weights_and_pooling():
    assert fusion_weights(torch.ones(2, dtype=torch.float64)).tolist() == pytest.approx([0.49999975] * 2, rel=1e-9, abs=0)
    assert fusion_weights(torch.ones(3, dtype=torch.float64)).tolist() == pytest.approx([0.3333332222] * 3, rel=1e-9, abs=0)
    assert fusion_weights(torch.tensor([-1.0, 1.0])).tolist() == pytest.approx([0.0, 1.0], rel=2e-6, abs=0)
    square = torch.arange(1.0, 17.0).reshape(1, 1, 4, 4)
    assert max_pool_to(square, (2, 2)).tolist() == [[[[11.0, 12.0], [15.0, 16.0]]]]  # rows 1 to 3, and 3 to the zero at the end
    assert max_pool_to(square[..., :3, :3], (2, 2)).tolist() == [[[[6.0, 7.0], [10.0, 11.0]]]]  # a zero on both sides
    assert max_pool_to(square, (1, 2)).tolist() == [[[[14.0, 16.0]]]]


def test_size_for_resnet18():
    """6.38 million parameters, 0.568 of the 11.22 million of ResNet18 for 100 classes; 0.177 with
    width 1.
    """
    teacher = SelfTeacher(RESNET18, 100)
    count = sum(p.numel() for p in teacher.parameters())
    assert round(count / 1e6, 2) == 6.38
    assert round(count / 11_220_132, 3) == 0.568
    assert round(sum(p.numel() for p in SelfTeacher(RESNET18, 100, width=1).parameters()) / 11_220_132, 3) == 0.177
    logits, features, margins = teacher(_inputs(RESNET18), (32, 32))
    assert logits.shape == (2, 100)
    assert [tuple(x.shape[1:]) for x in features] == [(128, 32, 32), (256, 16, 16), (512, 8, 8), (1024, 4, 4)]
    assert margins == []


def _batch_norm(layer, x):
    return F.batch_norm(x, None, None, layer.weight, layer.bias, training=True)


def _projected(layers, x):
    return _batch_norm(layers[1], F.conv2d(x, layers[0].weight))


def _node(node, *maps):
    """The weighted mean of maps, and depthwise separable convolutions."""
    x = sum(node.weight[i] * maps[i] for i in range(len(maps))) / (node.weight.sum() + 1e-6)
    layers = [layer for layer in node.convs if not isinstance(layer, nn.ReLU)]
    for i in range(0, len(layers), 3):
        x = F.conv2d(F.relu(x), layers[i].weight, padding=1, groups=x.shape[1])
        x = _batch_norm(layers[i + 2], F.conv2d(x, layers[i + 1].weight))
    return x


def test_self_teacher_computes_the_published_formula():
    """Compared with the formulas for three layers, in the order of operations of the authors: maps
    are enlarged before the projection.
    """
    torch.manual_seed(0)
    teacher = SelfTeacher(HALVING, 5).double()
    layer = teacher.layers[0]
    for parameter in teacher.parameters():
        parameter.data = torch.rand_like(parameter) - 0.3 if parameter.dim() > 1 else torch.rand_like(parameter) + 0.1
    inputs = _inputs(HALVING, torch.float64)
    f1, f2, f3 = (x.clamp(min=0) for x in inputs)

    def enlarged(i, x):
        return F.relu(_projected(layer.enlarging[i], F.relu(x).repeat_interleave(2, 2).repeat_interleave(2, 3)))

    def reduced(i, x):
        return F.relu(_projected(layer.reducing[i], F.max_pool2d(F.pad(F.relu(x), (0, 1, 0, 1)), 3, 2)))

    l1, l2, l3 = (F.relu(_projected(layer.laterals[i], x)) for i, x in enumerate((f1, f2, f3)))
    m2, m3 = (F.relu(_projected(layer.bottom_up_laterals[i], x)) for i, x in enumerate((f2, f3)))
    p2 = _node(layer.top_down[1], l2, enlarged(1, l3))
    t1 = _node(layer.top_down[0], l1, enlarged(0, p2))
    t2 = _node(layer.bottom_up[0], m2, F.relu(p2), reduced(0, t1))
    t3 = _node(layer.bottom_up[1], m3, reduced(1, t2))
    logits, features, _ = teacher(inputs, (32, 16))
    for got, want in zip(features, (t1, t2, t3), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(logits, F.linear(F.relu(t3).mean((2, 3)), teacher.classifier.weight, teacher.classifier.bias))


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("label_maps", [False, True])
def test_layers_for_label_maps_and_every_parameter_is_used(layers, label_maps):
    teacher = SelfTeacher(HALVING, 5, label_maps, layers=layers, margins=True)
    logits, features, margins = teacher(_inputs(HALVING), (32, 16))
    assert logits.shape == ((2, 5, 32, 16) if label_maps else (2, 5))
    assert [tuple(x.shape[1:]) for x in features] == [(6, 16, 8), (8, 8, 4), (12, 4, 2)]
    assert [tuple(m.shape) for m in margins] == [(6,), (8,), (12,)]
    # At initialisation, the weights of batch norm are 1 and the biases 0.
    torch.testing.assert_close(torch.cat(margins), torch.full((26,), -math.sqrt(2 / math.pi)))
    assert all(abs(float(x.detach().mean())) < 1e-5 for x in features)  # maps before their ReLU
    logits.sum().backward()
    assert all(p.grad is not None for p in teacher.parameters())
    assert (len(teacher.layers[-1].bottom_up) == 0) == label_maps


@pytest.mark.parametrize("layers", [1, 2])
def test_self_teacher_that_continues_a_bifpn(layers):
    """Without laterals, the tapped maps are the inputs of the nodes. The finest map comes from the
    top-down path alone.
    """
    torch.manual_seed(0)
    teacher = SelfTeacher(HALVING, 5, label_maps=True, width=1, layers=layers, laterals=False).double()
    inputs = [x.requires_grad_() for x in _inputs(HALVING, torch.float64)]

    def enlarged(layer, i, x):
        return F.relu(_projected(layer.enlarging[i], F.relu(x).repeat_interleave(2, 2).repeat_interleave(2, 3)))

    def reduced(layer, i, x):
        return F.relu(_projected(layer.reducing[i], F.max_pool2d(F.pad(F.relu(x), (0, 1, 0, 1)), 3, 2)))

    f1, f2, f3 = inputs
    for layer in teacher.layers:
        p2 = _node(layer.top_down[1], F.relu(f2), enlarged(layer, 1, f3))
        t1 = _node(layer.top_down[0], F.relu(f1), enlarged(layer, 0, p2))
        if len(layer.bottom_up):
            t2 = _node(layer.bottom_up[0], F.relu(f2), F.relu(p2), reduced(layer, 0, t1))
            f3 = _node(layer.bottom_up[1], F.relu(f3), reduced(layer, 1, t2))
            f1, f2 = t1, t2
        else:
            f1, f2 = t1, p2
    logits, features, _ = teacher(inputs, (16, 8))
    for got, want in zip(features, (f1, f2, f3), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(logits, F.conv2d(F.relu(f1), teacher.classifier.weight, teacher.classifier.bias))
    logits.sum().backward()
    assert all(p.grad is not None for p in [*teacher.parameters(), *inputs])


def test_margins_of_a_self_teacher_that_continues_a_bifpn():
    teacher = SelfTeacher(HALVING, 5, label_maps=True, width=1, layers=2, laterals=False, margins=True)
    assert [tuple(m.shape) for m in teacher(_inputs(HALVING), (16, 8)).margins] == [(3,), (4,), (6,)]


@pytest.mark.parametrize("layers", [1, 3])
def test_tiny_bifpn(layers):
    network = TinyBiFPN(4, num_classes=5, channels=6, layers=layers)
    shapes = {}
    for i in range(1, 4):
        network.get_submodule(f"refined{i}").register_forward_hook(lambda _m, _x, y, i=i: shapes.update({i: tuple(y.shape[1:])}))
    logits = network(torch.randn(2, 3, 20, 12))
    assert logits.shape == (2, 5, 20, 12)
    assert shapes == {1: (6, 10, 6), 2: (6, 5, 3), 3: (6, 2, 1)}
    logits.sum().backward()
    assert all(p.grad is not None for p in network.parameters())  # DDP waits for all gradients
    with pytest.raises(ValueError, match="layers must be at least 1, got 16, 1, 11, 32 and 0"):
        TinyBiFPN(layers=0)


@pytest.mark.parametrize("sizes", [[(8, 8), (8, 8), (4, 4)], [(9, 7), (5, 4), (2, 2)], [(16, 16), (4, 4), (1, 1)]])
def test_other_sizes_than_halves(sizes):
    shapes = {str(i): (3, *size) for i, size in enumerate(sizes)}
    _, features, _ = SelfTeacher(shapes, 5, layers=2)(_inputs(shapes), (16, 16))
    assert [tuple(x.shape[2:]) for x in features] == sizes


def test_invalid_pyramids_raise():
    with pytest.raises(ValueError, match="'layer2' has 16x16, and 'layer1' behind it has 32x32"):
        SelfTeacher({name: RESNET18[name] for name in ("layer2", "layer1")}, 5)
    with pytest.raises(ValueError, match="at least two tapped layers"):
        SelfTeacher({"layer1": (64, 32, 32)}, 5)
    with pytest.raises(ValueError, match=r"width must be 1 with laterals=False, .* got width=2"):
        SelfTeacher(RESNET18, 5, laterals=False)
    with pytest.raises(ValueError, match="layers must be at least 2: without laterals"):
        SelfTeacher(RESNET18, 5, label_maps=True, width=1, layers=1, margins=True, laterals=False)
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        SelfTeacher(RESNET18, 0)
    with pytest.raises(TypeError, match="label_maps must be True or False"):
        SelfTeacher(RESNET18, 5, label_maps="x")
    with pytest.raises(ValueError, match="features must be one map for each of the 3 layers, got 2"):
        SelfTeacher(HALVING, 5)(_inputs(HALVING)[:2], (32, 16))
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        SelfTeacher(RESNET18, 5, depth=0)
