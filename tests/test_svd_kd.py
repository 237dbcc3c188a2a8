"""SVD-KD: the loss against its definition and known values, the combination of the two gradients,
and training.
"""

import itertools
import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import kdkernels
from kdkernels import align_singular_vectors, feature_svd, rbf_correlation_loss, reference
from kdkernels.nn.svd_kd import svd_kd_loss, svd_kd_terms

L = pytest.importorskip("lightning")
from kdkernels.data import ClutterDigits  # noqa: E402
from kdkernels.distill import SVDKD, clip_transfer  # noqa: E402

SHAPES = [(3, 6, 5, 5), (3, 8, 4, 4), (3, 12, 2, 3)]


def _maps(shapes=SHAPES, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=torch.float64).relu().to(dtype) for s in shapes]


def _sine_features(shape, a, b):
    """Return features [B, C, H, W] made of sines of the index in the order [B, H, W, C]."""
    n = torch.arange(math.prod(shape), dtype=torch.float64)
    x = torch.clamp(torch.sin(a * n + b) + 0.3 * torch.cos(0.7 * a * n), min=0).view(shape[0], *shape[2:], shape[1])
    return x.movedim(-1, 1).contiguous()


def _known_inputs():
    layers = [((2, 3, 4, 4), 0.37, 0.1), ((2, 5, 2, 2), 0.53, 0.2), ((2, 6, 2, 2), 0.71, 0.3)]
    return [_sine_features(s, a, b).requires_grad_() for s, a, b in layers], [_sine_features(s, a, b + 1) for s, a, b in layers]


@pytest.mark.parametrize("align", ["teacher", "student"])
def test_known_values(align):
    """The values of docs/svd_kd.md, which were computed once in float64 from the definition."""
    student, teacher = _known_inputs()
    loss = svd_kd_loss(student, teacher, 1, align=align)
    assert loss.item() == pytest.approx(0.00712241968721437, rel=1e-12, abs=0)
    gradients = torch.autograd.grad(loss, student)
    assert [g.norm().item() for g in gradients] == pytest.approx([0.000103448975, 0.005778711687, 0.002371823111], rel=1e-8, abs=0)
    assert svd_kd_loss(student[:2], teacher[:2], 1).item() == pytest.approx(0.0018329981924634, rel=1e-12, abs=0)
    assert svd_kd_loss(student[1:], teacher[1:], 1).item() == pytest.approx(0.0052894214947510, rel=1e-12, abs=0)
    assert svd_kd_loss(student, teacher, 1, loss="mean").item() == pytest.approx(2 * 0.00712241968721437 / 2, rel=1e-12, abs=0)


def test_known_values_of_the_authors_code():
    """The authors' code takes the signs of singular vectors from its library.

    Its value and gradients are those of exactly one of all choices of signs.
    """
    student, teacher = _known_inputs()
    found = []
    for signs in itertools.product([1, -1], repeat=2):
        parts = [feature_svd(x.detach(), 1, return_u=True) for x in student]
        vectors = [sign * feature_svd(x, 1)[2] for sign, x in zip((1, *signs), student, strict=True)]
        sides = [align_singular_vectors(v, feature_svd(t, 1)[2]) for v, t in zip(vectors, teacher, strict=True)]
        pairs = [0.5 * rbf_correlation_loss(a[0], b[0], a[1], b[1]) for a, b in itertools.pairwise(sides)]
        if sum(pairs).item() == pytest.approx(0.0281186823, rel=1e-8, abs=0):
            found.append((parts, vectors, pairs))
    ((parts, vectors, pairs),) = found
    assert [p.item() for p in pairs] == pytest.approx([0.0228292608, 0.0052894215], rel=1e-8, abs=0)
    exact = torch.autograd.grad(sum(pairs), student, retain_graph=True)
    assert [g.norm().item() for g in exact] == pytest.approx([0.00392359, 0.04425679, 0.00237182], rel=1e-5, abs=0)
    # The authors' gradient of the two wide maps. Their code omits samples that have a zero singular
    # value, and multiplies by B / (B + 0.001).
    of_vectors = torch.autograd.grad(sum(pairs), vectors)
    for (u, s, v), g, x, norm in list(zip(parts, of_vectors, student, (None, 0.01450340, 0.00147426), strict=True))[1:]:
        values = torch.linalg.svdvals(x.detach().flatten(2))
        full_rank = values[:, -1] > 1e-6 * values[:, 0]
        assert full_rank.sum() == (1 if norm == 0.01450340 else 2)
        rank1 = u @ ((g - v * (v * g).sum(1, keepdim=True)) / s[:, None]).mT
        assert (rank1[full_rank].norm() * 2 / 2.001).item() == pytest.approx(norm, abs=5.1e-9)  # known to eight decimal places


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"align": "student"}, {"loss": "mean", "extra": 3}, {"extra": 0, "beta": 2.0}], ids=str)
def test_loss_and_gradient_match_the_definition(k, options):
    student, teacher = [x.requires_grad_() for x in _maps()], _maps(seed=1)
    loss, expected = svd_kd_loss(student, teacher, k, **options), reference.svd_kd_loss(student, teacher, k, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    for got, want in zip(torch.autograd.grad(loss, student), torch.autograd.grad(expected, student), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-12)


def test_gradcheck():
    student, teacher = [x.requires_grad_() for x in _maps()], _maps(seed=1)
    assert torch.autograd.gradcheck(lambda *maps: svd_kd_loss(maps, teacher, 2), student)


def test_rank1_and_authors_gradients():
    """Both gradients against the formula.

    That of the authors' code is 0 for maps with at least as many spatial positions as channels.
    """
    student, teacher = [x.requires_grad_() for x in _maps()], _maps(seed=1)
    loss = svd_kd_loss(student, teacher, 2, grad="rank1")
    torch.testing.assert_close(loss, svd_kd_loss(student, teacher, 2), rtol=1e-12, atol=0)
    rank1 = torch.autograd.grad(loss, student)
    authors = torch.autograd.grad(svd_kd_loss(student, teacher, 2, grad="authors"), student)

    parts = [feature_svd(x.detach(), 3, return_u=True) for x in student]
    vectors = [v.clone().requires_grad_() for _, _, v in parts]
    sides = []
    for v, t in zip(vectors, teacher, strict=True):
        _, s, w = feature_svd(t, 2)
        sides.append(align_singular_vectors(v, w, s / s.norm(dim=1, keepdim=True)))
    total = sum(2**0.5 / 2 * rbf_correlation_loss(a[0], b[0], a[1], b[1]) for a, b in itertools.pairwise(sides))
    for x, (u, s, v), g, got, other in zip(student, parts, torch.autograd.grad(total, vectors), rank1, authors, strict=True):
        orthogonal = g - v * (v * g).sum(1, keepdim=True)
        want = u @ (orthogonal / s[:, None]).mT  # [B, spatial positions, C]
        torch.testing.assert_close(got.flatten(2).mT, want, rtol=1e-8, atol=1e-14)
        tall = x[0, 0].numel() >= x.shape[1]
        assert torch.equal(other, torch.zeros_like(got) if tall else got)


def test_authors_gradients_are_zero_if_all_maps_are_tall():
    """The loss has a backward pass, and a NaN in an omitted map does not reach the gradient."""
    shapes = [(3, 4, 4, 4), (3, 6, 3, 3)]
    student, teacher = _maps(shapes), _maps(shapes, seed=1)
    student[0][1, 0, 0, 0] = float("nan")
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        given = [x.detach().to(dtype, copy=True).requires_grad_() for x in student]
        loss = svd_kd_loss(given, [x.to(dtype) for x in teacher], 2, grad="authors")
        assert loss.requires_grad
        torch.testing.assert_close(loss, svd_kd_loss(given, [x.to(dtype) for x in teacher], 2, grad="rank1"), rtol=0, atol=0)
        loss.backward()
        for x in given:
            assert torch.equal(x.grad, torch.zeros_like(x))


def _has_ties(maps, k):
    """Return whether entries of a vector with different signs tie for the largest magnitude: its
    sign then depends on the order of channels.
    """
    for x in maps:
        v = feature_svd(x, min(k + 1, *x.flatten(2).shape[1:]))[2]
        relative_magnitude = v.abs() / v.abs().amax(1, keepdim=True)
        if (((relative_magnitude > 1 - 2e-4) & (v < 0)).any(1) & ((relative_magnitude > 1 - 2e-4) & (v > 0)).any(1)).any():
            return True
    return False


@given(seed=st.integers(0, 10_000), k=st.integers(1, 3))
def test_invariances(seed, k):
    student, teacher = _maps(seed=seed), _maps(seed=seed + 1)
    loss = svd_kd_loss(student, teacher, k)
    close = dict(rtol=1e-6, atol=1e-10)
    assert svd_kd_loss(teacher, teacher, k).item() == pytest.approx(0, abs=1e-20)
    torch.manual_seed(seed)

    def permute_positions(x):
        return x.flatten(2)[:, :, torch.randperm(x[0, 0].numel())].view(x.shape)

    torch.testing.assert_close(svd_kd_loss([permute_positions(x) for x in student], [permute_positions(x) for x in teacher], k), loss, **close)
    scaled = [3.0 * student[0], 0.2 * student[1], student[2]]
    torch.testing.assert_close(svd_kd_loss(scaled, teacher, k), loss, **close)
    if k == 1:
        torch.testing.assert_close(svd_kd_loss(student, [0.1 * teacher[0], *teacher[1:]], k), loss, **close)
    orders = [torch.randperm(x.shape[1]) for x in student]
    both = [[x[:, o] for x, o in zip(maps, orders, strict=True)] for maps in (student, teacher)]
    if not _has_ties(student + teacher, k):
        torch.testing.assert_close(svd_kd_loss(*both, k), loss, **close)
    twice = [[torch.cat([x, x]) for x in maps] for maps in (student, teacher)]
    torch.testing.assert_close(svd_kd_loss(*twice, k), 2 * loss, **close)
    torch.testing.assert_close(svd_kd_loss(*twice, k, loss="mean"), svd_kd_loss(student, teacher, k, loss="mean"), **close)


def test_layer_with_few_positions_limits_the_number_of_vectors_of_its_pairs():
    shapes = [(2, 6, 4, 4), (2, 8, 1, 2), (2, 9, 3, 3)]
    student, teacher = _maps(shapes), _maps(shapes, seed=1)
    loss = svd_kd_loss(student, teacher, 3, weighting="none")
    sides = []
    for x, t, n in zip(student, teacher, (3, 2, 3), strict=True):
        sides.append(align_singular_vectors(feature_svd(x, min(n + 1, x[0, 0].numel()))[2], feature_svd(t, n)[2]))
    expected = sum(
        2**0.5 / 2 * rbf_correlation_loss(a[0][..., :2], b[0][..., :2], a[1][..., :2], b[1][..., :2]) for a, b in itertools.pairwise(sides)
    )
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("grad", ["exact", "rank1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 2])
def test_invalid_maps_are_omitted_and_do_not_affect_others(grad, dtype, k):
    shapes = [(6, *s[1:]) for s in SHAPES]
    good, teacher = _maps(shapes, dtype=dtype), _maps(shapes, seed=1, dtype=dtype)
    student, bad_teacher = [x.clone() for x in good], [x.clone() for x in teacher]
    student[0][0] = 0  # a map of zeros in the first layer has no singular vectors
    student[1][1, 0, 0, 0] = float("nan")  # a layer in the middle belongs to both pairs of layers
    bad_teacher[2][2] = 0
    bad_teacher[0][3, 0, 0, 1] = float("inf")
    student[1][4, 2:] = 0  # channels of zeros are valid
    good[1][4, 2:] = 0
    kept = svd_kd_terms(student, bad_teacher, k, grad=grad)[1]
    assert kept.tolist() == [[False, False, True, False, True, True], [True, False, False, True, True, True]]
    student, good = ([x.requires_grad_() for x in maps] for maps in (student, good))
    loss = svd_kd_loss(student, bad_teacher, k, grad=grad)
    gradients = torch.autograd.grad(loss, student)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in gradients)
    assert not gradients[0][[0, 1, 3]].any()
    assert not gradients[1][1].any()
    assert not gradients[2][[1, 2]].any()
    expected = torch.autograd.grad(svd_kd_loss(good, teacher, k, grad=grad), good)
    for got, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got[4:], want[4:], rtol=0, atol=0)


def test_half_precision_and_autocast():
    student, teacher = [x.requires_grad_() for x in _maps(dtype=torch.float32)], _maps(seed=1, dtype=torch.float32)
    half = [x.detach().to(torch.bfloat16).requires_grad_() for x in student]
    for grad in ("exact", "rank1"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, of_half = svd_kd_loss(student, teacher, 2, grad=grad), svd_kd_loss(half, teacher, 2, grad=grad)
        plain = svd_kd_loss(student, teacher, 2, grad=grad)
        torch.testing.assert_close(loss, plain, rtol=0, atol=0)
        for got, want in zip(torch.autograd.grad(loss, student), torch.autograd.grad(plain, student), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)
        widened = [x.detach().float() for x in half]
        torch.testing.assert_close(of_half, svd_kd_loss(widened, teacher, 2, grad=grad))
        assert all(g.dtype == torch.bfloat16 for g in torch.autograd.grad(of_half, half))


def test_compile():
    torch._dynamo.reset()
    student, teacher = [x.requires_grad_() for x in _maps(dtype=torch.float32)], _maps(seed=1, dtype=torch.float32)
    compiled = torch.compile(lambda s, t: svd_kd_loss(s, t, 2), fullgraph=True)
    got, want = compiled(student, teacher), svd_kd_loss(student, teacher, 2)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, student), torch.autograd.grad(want, student), strict=True):
        torch.testing.assert_close(a, b)


def test_module():
    student, teacher = _maps(), _maps(seed=1)
    module = kdkernels.nn.SVDKDLoss(2, align="student", loss="mean")
    torch.testing.assert_close(module(student, teacher), svd_kd_loss(student, teacher, 2, align="student", loss="mean"))
    assert repr(module) == "SVDKDLoss(k=2, align='student', loss='mean')"
    with pytest.raises(ValueError, match="grad must be one of"):
        kdkernels.nn.SVDKDLoss(grad="none")


X = [torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 2, 2)]
ERRORS = [
    (dict(student=X[:1], teacher=X[:1]), ValueError, "lists of the same number of features, at least two, got 1 and 1"),
    (dict(student=X[:1]), ValueError, "got 1 and 2"),
    (
        dict(student=[X[0], X[1][:, :4]]),
        ValueError,
        r"layer 1: student and teacher must have the same batch size and number of channels, got \(2, 4, 2, 2\)",
    ),
    (dict(student=[X[0], X[1][:1]], teacher=[X[0], X[1][:1]]), ValueError, "layer 1: student and teacher must have the same batch size"),
    (dict(student=[X[0], None]), TypeError, r"student\[1\] must be a tensor, got NoneType"),
    (dict(teacher=[X[0].long(), X[1]]), TypeError, r"teacher\[0\] must be float64, float32, bfloat16 or float16 features, got torch.int64"),
    (dict(student=[X[0], X[1][0, 0]]), ValueError, r"student\[1\] must have the shape \[B, C, \*spatial\]"),
    (dict(k=0), ValueError, "k must be an int >= 1, got 0"),
    (dict(k=True), TypeError, "k must be an int, got bool"),
    (dict(extra=-1), ValueError, "extra must be an int >= 0, got -1"),
    (dict(align="both"), ValueError, "flip must be one of|align must be one of"),
    (dict(grad="auto"), ValueError, "grad must be one of"),
    (dict(weighting="s"), ValueError, "weighting must be one of"),
    (dict(loss="sum"), ValueError, "loss must be one of"),
    (dict(beta=0.0), ValueError, "beta must be a finite number > 0"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS, ids=[m for *_, m in ERRORS])
def test_errors_name_the_argument(change, error, message):
    with pytest.raises(error, match=message):
        svd_kd_loss(**{"student": X, "teacher": X, **change})


# The combination of the two gradients.


def test_known_clips():
    main = [torch.tensor([3.0, 4.0], dtype=torch.float64)]

    def clipped(transfer, epoch, main=main, **options):
        return clip_transfer(main, [torch.tensor(transfer, dtype=torch.float64)], epoch, **options)[0].tolist()

    assert clipped([6.0, 8.0], 0) == pytest.approx([1.5, 2.0])  # clipped to half of the norm of the main gradient
    assert clipped([6.0, 8.0], 50) == pytest.approx([3.0, 4.0])
    assert clipped([0.3, 0.4], 0) == [0.3, 0.4]
    assert clipped([6.0, 8.0], 0, main=[torch.zeros(2, dtype=torch.float64)]) == [0, 0]
    assert clipped([0.0, 0.0], 0, main=[torch.zeros(2, dtype=torch.float64)]) == [0, 0]
    for epoch, factor in {0: 0.8808, 1: 0.7311, 2: 0.5, 5: 0.0474}.items():
        assert clipped([1.5, 2.0], epoch, rule="poster") == pytest.approx([1.5 * factor, 2.0 * factor], rel=1e-3, abs=0)
    assert clipped([6.0, 8.0], 0, rule="poster") == [6, 8]  # longer than the main gradient: unchanged
    assert clipped([0.0, 0.0], 3, rule="poster") == [0, 0]


@given(seed=st.integers(0, 1000), epoch=st.integers(0, 8), scale=st.sampled_from([1.0, 2.0**16]), rule=st.sampled_from(["authors", "poster"]))
def test_clipping_is_per_parameter_and_proportional_to_a_common_factor(seed, epoch, scale, rule):
    torch.manual_seed(seed)
    main, transfer = ([10 ** torch.randn(()) * torch.randn(n) for n in (4, 7, 1)] for _ in range(2))
    together = clip_transfer(main, transfer, epoch, rule=rule)
    for m, t, c in zip(main, transfer, together, strict=True):
        assert torch.equal(clip_transfer([m], [t], epoch, rule=rule)[0], c)
        if rule == "authors":
            assert c.norm() <= m.norm() / (1 + math.exp(-epoch)) * (1 + 1e-6)
    for c, s in zip(together, clip_transfer([scale * m for m in main], [scale * t for t in transfer], epoch, rule=rule), strict=True):
        torch.testing.assert_close(scale * c, s)


def test_clip_errors():
    with pytest.raises(ValueError, match="gradients of the same parameters, got 1 and 0"):
        clip_transfer([torch.ones(1)], [], 0)
    with pytest.raises(ValueError, match="rule must be 'authors' or 'poster', got 'paper'"):
        clip_transfer([], [], 0, rule="paper")


# Training.


def _network(width=6):
    network = nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10)
    )
    network(torch.zeros(1, 3, 32, 32))
    return network


def _data(**options):
    return ClutterDigits(train_size=48, val_size=10, test_size=2, batch_size=16, **options)


def _method(seed=0, lr=0.5, decay=0.01, **options):
    torch.manual_seed(seed)
    student, teacher = _network(), _network()
    options = {
        "optimizer": lambda p: torch.optim.SGD(p, lr=lr, weight_decay=decay),
        "scheduler": lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0),
        **options,
    }
    return SVDKD(student, teacher, ["1", "3"], ["1", "3"], **options)


def _fit(method, data, **options):
    warnings.filterwarnings("ignore")
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0)
    trainer = L.Trainer(**{"accelerator": "cpu", "max_steps": 1, "max_epochs": 3, "precision": "64-true", **quiet, **options})
    trainer.fit(method, data)
    return trainer


@pytest.mark.parametrize("rule", ["authors", "poster"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_step_uses_both_gradients_of_the_whole_batch(rule, accumulate):
    """Compare with a step by hand: compute the gradients of both losses over all samples, include
    weight decay in the norm, clip, add, and update the parameters.
    """
    method, data = _method(rule=rule, k=2), _data()
    before = {n: p.detach().clone() for n, p in method.student.named_parameters()}
    _fit(method, data, accumulate_grad_batches=accumulate)
    after = dict(method.student.named_parameters())

    twin = _method(rule=rule, k=2).double()
    data.setup("fit")
    batches = [data.finish(b) for b in data.train_dataloader()][:accumulate]
    image, label = (torch.cat([b[name] for b in batches]) for name in ("image", "label"))
    (logits, features), (_, targets) = twin.student_taps(image.double()), twin.teacher_taps(image.double())
    parameters = dict(twin.student.named_parameters())
    main = torch.autograd.grad(nn.functional.cross_entropy(logits, label), list(parameters.values()), retain_graph=True)
    transfer = torch.autograd.grad(svd_kd_loss(list(features.values()), list(targets.values()), 2), list(parameters.values()), allow_unused=True)
    for (name, p), m, t in zip(parameters.items(), main, transfer, strict=True):
        m = m + 0.01 * p.detach()
        if t is not None:
            m = m + clip_transfer([m], [t], 0, rule=rule)[0]
        torch.testing.assert_close(after[name].double(), before[name].double() - 0.5 * m, rtol=1e-7, atol=1e-9)


def test_clipping_threshold_grows_with_the_epochs():
    """With a very large beta the transfer gradient is always clipped.

    Its norm is then sigmoid(epoch) times that of the main gradient.
    """
    lengths = []

    class RecordEpochs(L.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            lengths.append((trainer.current_epoch, module.student[0].weight.grad.clone()))

    for beta in (0.0, 1e6):
        method = _method(lr=0.0, decay=0.0, beta=beta)
        _fit(method, _data(), callbacks=[RecordEpochs()], max_steps=9)
    plain, clipped = lengths[:9], lengths[9:]
    assert [epoch for epoch, _ in clipped] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for (epoch, main), (_, both) in zip(plain, clipped, strict=True):
        assert (both - main).norm().item() == pytest.approx(main.norm().item() / (1 + math.exp(-epoch)), rel=1e-6, abs=0)


def test_training_in_two_stages():
    """The first stage trains with the transfer loss only, up to the last tap; the second with the
    labels only.
    """
    method = _method(first_stage_epochs=1, loss="mean")
    before = {n: p.detach().clone() for n, p in method.student.named_parameters()}
    logged = []

    class RecordEpochs(L.Callback):
        def on_train_epoch_end(self, trainer, module):
            logged.append({k: float(v) for k, v in trainer.callback_metrics.items()})
            if trainer.current_epoch == 0:
                self.first = {n: p.detach().clone() for n, p in module.student.named_parameters()}

    recorder = RecordEpochs()
    _fit(method, _data(), callbacks=[recorder], max_steps=6)
    for name, p in recorder.first.items():
        assert torch.equal(p, before[name].double()) == name.startswith("5.")  # only the classifier is unchanged
    assert logged[0]["train/loss_svd"] > 0
    assert logged[0]["train/loss_cross_entropy"] == 0
    assert logged[1]["train/loss_cross_entropy"] > 0


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision(precision):
    """A step in half precision is close to the step in float32.

    A loss scaler's factor does not change it, also with weight decay in the norm.
    """
    from lightning.pytorch.plugins import MixedPrecision

    steps = []
    for name in ("32-true", precision):
        method = _method(lr=0.1)
        before = [p.detach().clone() for p in method.student.parameters()]
        if name == "16-mixed":
            plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))
            _fit(method, _data(), plugins=[plugin], precision=None)
        else:
            _fit(method, _data(), precision=name)
        steps.append([p.detach().float() - b for p, b in zip(method.student.parameters(), before, strict=True)])
    for exact, half in zip(*steps, strict=True):
        assert (exact - half).norm() <= 0.1 * exact.norm()


def test_overflow_of_the_transfer_gradient_skips_the_step():
    """The scaler detects the overflow, no parameter changes, and the scaler's factor decreases."""
    from lightning.pytorch.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    method = _method(beta=1e38)
    before = [p.detach().clone() for p in method.student.parameters()]
    _fit(method, _data(), plugins=[MixedPrecision("16-mixed", "cpu", scaler)], precision=None)
    assert all(torch.equal(p, b) for p, b in zip(method.student.parameters(), before, strict=True))
    assert scaler.get_scale() < 2.0**10


def test_training_omits_invalid_maps_and_logs_their_number():
    """The teacher's maps are NaN for some images and all zeros for others."""

    class ZeroOrNaN(nn.Module):
        def forward(self, x):
            brightness = x.flatten(1).mean(1)
            x = torch.where((brightness > brightness.median())[:, None, None, None], x, 0)
            return torch.where((brightness == brightness.max())[:, None, None, None], float("nan"), x)

    method = _method()
    teacher = method.teacher
    teacher[3] = nn.Sequential(nn.ReLU(), ZeroOrNaN())
    method.teacher_taps.module = teacher
    trainer = _fit(method, _data(), max_steps=3)
    assert float(trainer.callback_metrics["train/left_out"]) == 3 * 9  # in each batch of 16: the darker half, and the brightest image
    assert all(p.isfinite().all() for p in method.student.parameters())


def test_error_of_differing_channels_names_the_tap():
    torch.manual_seed(0)
    student, teacher = _network(6), _network(8)
    method = SVDKD(student, teacher, ["1", "3"], ["1", "3"])
    with pytest.raises(
        ValueError,
        match=r"student tap '1' \[2, 6, 15, 15\] and teacher tap '1' \[2, 8, 15, 15\] do not match: they must have the same number of channels",
    ):
        _fit(method, _data(), precision="32-true")


def test_authors_gradient_that_trains_no_layer_raises():
    torch.manual_seed(0)
    nets = [_network(), _network()]
    method = SVDKD(*nets, ["1", "2"], ["1", "2"], grad="authors")
    nets[0][2].stride = (1, 1)
    nets[0][5] = nn.LazyLinear(10)
    nets[0](torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="grad='authors' trains no tapped layer"):
        _fit(method, _data(), precision="32-true")


def test_invalid_options_raise():
    nets = [_network(), _network()]
    for change, message in [
        (dict(student_taps=["1"]), "at least two layers each"),
        (dict(k=0), "k must be an int >= 1"),
        (dict(rule="paper"), "rule must be 'authors' or 'poster'"),
        (dict(first_stage_epochs=-1), "first_stage_epochs must be >= 0, got -1"),
        (dict(loss="sum"), "loss must be one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            SVDKD(*nets, **{"student_taps": ["1", "3"], "teacher_taps": ["1", "3"], **change})
