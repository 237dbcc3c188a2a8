"""Pixel entropies: closed forms, the published procedure image by image, files and wrong input."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("lightning")
from kdkernels.analysis import PixelEntropy, pixel_entropy
from kdkernels.analysis.frozen_network import FrozenNetwork
from kdkernels.analysis.pixel_entropy import _checked_options, _Search
from kdkernels.models import TinyCNN, resnet8

CPU = torch.device("cpu")
OPTIONS = {"grid": 4, "copies": 4, "steps": 21, "progress": False}


def entropy_of(sigma):
    return torch.log(torch.as_tensor(sigma, dtype=torch.float64)) + 0.5 * math.log(2 * math.pi * math.e)


def test_entropy_of_known_deviations():
    for sigma, entropy in ((0.01, -3.1862316528), (0.001, -5.4888167457), (1.0, 1.4189385332), (0.0147142549, -2.8)):
        assert entropy_of(sigma).item() == pytest.approx(entropy, rel=1e-8, abs=0)


class Linear(nn.Module):
    """Output k is the sum of block k, times its influence; blocks of one pixel."""

    def __init__(self, influence):
        super().__init__()
        self.layer = nn.Conv2d(1, len(influence), 2, bias=False)
        self.layer.weight.data.zero_()
        for k, w in enumerate(influence):
            self.layer.weight.data[k, 0, k // 2, k % 2] = w

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize(("weight", "entropy"), [(7.0, -2.5598501685), (6.0, -2.6369255085)])
def test_closed_form_of_a_linear_map(weight, entropy, monkeypatch):
    """Without a ReLU the optimum is sigma_i = sigma_0 sqrt(lambda sum_j w_j^2 / (2 n w_i^2)).

    The noise is replaced by four vectors whose second moments are those of the normal distribution,
    so that the mean over them is the expectation. The target is out of reach, so that the last
    iterate is returned, for which lambda was multiplied by 1.5.
    """
    signs = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=torch.float64)
    monkeypatch.setattr(_Search, "noise", lambda *_: signs.view(4, 1, 2, 2))
    options = {"grid": 2, "target": 5.0, "steps": 60, "copies": 4, "relu": False, "progress": False, "lr": 5e-5}
    image = torch.randn(2, 1, 2, 2, dtype=torch.float64)
    equal = pixel_entropy(Linear([1.0] * 4).double(), "layer", image, weight=weight / 1.5, **options)
    torch.testing.assert_close(equal.entropy, torch.full((2, 2, 2), entropy), atol=1e-5, rtol=0)
    influence = torch.tensor([1.0, 1.2, 0.8, 1.1])
    unequal = pixel_entropy(Linear(influence.tolist()).double(), "layer", image[:1], weight=weight / 1.5, **options)
    want = entropy_of(0.01 * (weight * influence.double().square().sum() / (8 * influence.double().square())).sqrt())
    torch.testing.assert_close(unequal.entropy.flatten().double(), want, atol=5e-4, rtol=0)  # the last 20 steps converge to this
    assert equal.step.min() > 40


def published_procedure(feature, image, noise, grid, weight, steps, target, relu=True):
    """Return entropy and number of the iterate of one image, as Cheng et al. describe."""
    activation = torch.relu if relu else lambda x: x
    clean = activation(feature(image)).detach()

    def noisy(sigma, numbers):
        return image + F.interpolate(sigma[None, None], size=image.shape[2:], mode="nearest") * numbers

    sigma = torch.full((grid, grid), 0.01, dtype=image.dtype)
    scale = (activation(feature(noisy(sigma, noise(-1)))) - clean).square().mean().detach()
    means, iterates = [], []
    for step in range(steps):
        sigma = sigma.clamp(0.001, 1).requires_grad_()
        entropy = sigma.log() + 0.5 * math.log(2 * math.pi) + 0.5
        iterates.append(entropy.detach())
        means.append(entropy.mean().item())
        loss = (activation(feature(noisy(sigma, noise(step)))) - clean).square().mean() / scale - weight * entropy.mean()
        (gradient,) = torch.autograd.grad(loss, sigma)
        sigma = sigma.detach() - 1e-4 * gradient
        if step == steps - 21:
            if max(means) > target:
                break
            weight *= 1.5
    best = min(range(len(means)), key=lambda i: abs(means[i] - target))
    return iterates[best], best


def _published(model, layer, images, grid, weight=7.0, steps=80, target=-2.8, copies=96, relu=True):
    search = _Search(FrozenNetwork(model, layer, CPU), CPU, copies, _checked_options(grid, weight, target, 0.01, 1e-4, steps, copies, relu, None, 0))
    plain = FrozenNetwork(model, layer, CPU)
    plain.network = plain.original
    return [
        published_procedure(plain, image[None], lambda step: search.noise(step, images.shape[1:]), grid, weight, steps, target, relu)
        for image in images
    ]


CASES = {
    "reaches the target in the first steps": {"grid": 4, "layer": "block2", "weight": 7.0},
    "reaches it in the last steps": {"grid": 4, "layer": "block2", "weight": 0.9},
    "does not reach it": {"grid": 4, "layer": "block1", "weight": 0.2},
    "a grid that does not divide the image": {"grid": 3, "layer": "block3", "weight": 5.0},
    "the logits, without ReLU": {"grid": 4, "layer": "fc", "weight": 7.0, "relu": False},
}


@pytest.mark.parametrize("margin", [4.0, None])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_published_procedure_image_by_image(case, margin):
    torch.manual_seed(0)
    model = TinyCNN(4).double()
    for _ in range(3):
        model(torch.randn(8, 3, 8, 8, dtype=torch.float64))  # batch norm gets statistics
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    options = {"steps": 40, "copies": 6} | {name: value for name, value in case.items() if name != "layer"}
    found = pixel_entropy(model, case["layer"], images, batch_size=2, margin=margin, progress=False, **options)
    for i, (entropy, step) in enumerate(_published(model.eval(), case["layer"], images, **options)):
        torch.testing.assert_close(found.entropy[i], entropy.float(), rtol=1e-5, atol=1e-6)
        assert found.step[i] == step
    assert found.valid.all()


def test_result_does_not_depend_on_the_batch():
    torch.manual_seed(0)
    model, images = TinyCNN(4), torch.randn(5, 3, 8, 8)
    options = {"grid": 4, "copies": 40, "steps": 30, "progress": False}
    one = pixel_entropy(model, "block2", images, batch_size=1, **options)
    for batch_size in (2, 5):
        other = pixel_entropy(model, "block2", images, batch_size=batch_size, **options)
        torch.testing.assert_close(one.entropy, other.entropy, rtol=1e-5, atol=1e-5)
        assert torch.equal(one.step, other.step)
    as_dataset = pixel_entropy(model, "block2", [(image, 0) for image in images], batch_size=5, **options)
    assert torch.equal(as_dataset.entropy, other.entropy)
    other_seed = pixel_entropy(model, "block2", images, seed=1, **options)
    assert not torch.equal(other_seed.entropy, other.entropy)


class Chain(nn.Module):
    """A forward pass that its weights do not determine."""

    def __init__(self, between):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.between, self.last = nn.Conv2d(3, 4, 3, padding=1), between, nn.Conv2d(4, 4, 3)

    def forward(self, x):
        return self.last(self.between(self.first(x) * 3))


def test_files_of_another_forward_pass_raise(tmp_path):
    images, path = torch.randn(3, 3, 8, 8), tmp_path / "e.npz"
    found = pixel_entropy(Chain(nn.ReLU()), "last", images, path=path, **OPTIONS)
    assert torch.equal(pixel_entropy(Chain(nn.ReLU()), "last", images, path=path, **OPTIONS).entropy, found.entropy)
    strided = Chain(nn.ReLU())
    strided.last.stride = (2, 2)
    hooked = Chain(nn.ReLU())
    hooked.first.register_forward_hook(lambda _module, _inputs, output: 2 * output)
    for other in (Chain(nn.Tanh()), strided, hooked):
        with pytest.raises(ValueError, match="was made with another forward pass"):
            pixel_entropy(other, "last", images, path=path, **OPTIONS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32(dtype):
    torch.manual_seed(0)
    model, images = TinyCNN(4).eval().to(dtype), torch.randn(2, 3, 8, 8)
    found = pixel_entropy(model, "block2", images, **OPTIONS)
    assert torch.equal(found.entropy, pixel_entropy(copy.deepcopy(model).float(), "block2", images, **OPTIONS).entropy)
    assert next(model.parameters()).dtype == dtype


def _with_norm(convolution):
    torch.manual_seed(1)
    return nn.Sequential(convolution(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))


class ReadsNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)

    def forward(self, x):
        return self.last(self.norm(self.conv(x)) * self.norm.weight.view(1, -1, 1, 1))


class ChangesInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.relu, self.last = nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.last(self.relu(x))


UNUSUAL = {
    "weight_norm": lambda: _with_norm(nn.utils.parametrizations.weight_norm),
    "spectral_norm": lambda: _with_norm(nn.utils.parametrizations.spectral_norm),
    "orthogonal": lambda: _with_norm(nn.utils.parametrizations.orthogonal),
    "old spectral_norm": lambda: _with_norm(nn.utils.spectral_norm),
    "reads the batch norm": ReadsNorm,
    "changes its input": ChangesInput,
}


@pytest.mark.parametrize("make", UNUSUAL.values(), ids=UNUSUAL)
def test_unusual_networks(make):
    """The network is run as it is if its batch norms cannot be folded; images are not changed."""
    model = make().eval()
    layer = [name for name, _ in model.named_modules()][-1]
    images = torch.randn(2, 3, 8, 8)
    before = images.clone()
    found = pixel_entropy(model, layer, images, grid=4, copies=4, steps=40, margin=None, progress=False)
    assert torch.equal(images, before)

    class Plain(nn.Module):  # the same function, in which nothing can be folded
        def __init__(self):
            super().__init__()
            self.all = nn.ModuleList([model])
            self.out = nn.Identity()

        def forward(self, x):
            return self.out(model(x.clone()))

    torch.testing.assert_close(found.entropy, pixel_entropy(Plain(), "out", images, grid=4, copies=4, steps=40, margin=None, progress=False).entropy)


class Output(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.layer, self.function = nn.Conv2d(3, 4, 3), function
        self.out = nn.Identity()

    def forward(self, x):
        return self.out(self.function(self.layer(x)))


WRONG_MODELS = {
    "no module": (lambda: lambda x: x, TypeError, "model must be a torch.nn.Module, got function"),
    "scripted": (lambda: torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3))), TypeError, "before torch.jit.script"),
    "lazy": (lambda: Output(nn.LazyConv2d(4, 3)), ValueError, "the parameter 'function.weight' has no values yet"),
    "meta": (lambda: Output(nn.Identity()).to("meta"), ValueError, "has no values yet"),
    "integers": (lambda: Output(lambda x: x.int()), ValueError, "must be real floating-point numbers, got torch.int32"),
    "complex": (lambda: Output(lambda x: x + 1j), ValueError, "must be real floating-point numbers, got torch.complex64"),
    "detached": (lambda: Output(torch.Tensor.detach), ValueError, "does not depend differentiably on the images"),
    "pruned": (lambda: Output(nn.utils.prune.l1_unstructured(nn.Conv2d(4, 4, 1), "weight", 0.5)), ValueError, "model: this Output cannot be copied"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("case", WRONG_MODELS.values(), ids=WRONG_MODELS)
def test_models_that_cannot_be_analysed(case):
    make, kind, message = case
    with pytest.raises(kind, match=message):
        pixel_entropy(make(), "out", torch.randn(2, 3, 8, 8), grid=4, copies=4, steps=21, progress=False)


class Recording(nn.Module):
    """Its forward pass reads what it has just stored, as networks with recorded activations do."""

    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.Conv2d(3, 4, 3), None

    def forward(self, x):
        self.last = self.layer(x)
        torch.mm(torch.ones(200, 200), torch.ones(200, 200))  # another thread gets time to store its own
        return self.last.tanh()


MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "autocast": lambda: torch.autocast("cpu", torch.bfloat16)}


@pytest.mark.parametrize("around", MODES.values(), ids=MODES)
def test_bits_do_not_depend_on_threads_and_modes_of_the_caller(around):
    torch.manual_seed(0)
    images, options = torch.randn(3, 3, 8, 8), {"grid": 4, "copies": 50, "steps": 25, "progress": False}
    model = nn.Sequential(Recording(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
    for layer in ("0", "2"):
        results, threads = [], torch.get_num_threads()
        try:
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                results.append(pixel_entropy(model, layer, images, **options))
                assert torch.get_num_threads() == n
                with around():
                    results.append(pixel_entropy(model, layer, images, **options))
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(results[0].entropy, other.entropy) for other in results[1:])


def test_errors_of_a_layer_restore_the_threads():
    class Fails(nn.Module):
        def forward(self, x):
            if len(x) > 3:
                raise OverflowError("too many images")
            return x

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(OverflowError, match="too many images"):
            pixel_entropy(nn.Sequential(Fails()), "0", torch.randn(2, 3, 8, 8), grid=2, progress=False)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_insensitive_images_are_rejected():
    class Dead(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(3, 2, 1)
            self.layer.bias.data.fill_(-100)

        def forward(self, x):
            return self.layer(x)

    images = torch.randn(2, 3, 4, 4)
    images[1] += 1e4
    model = Dead()
    model.layer.weight.data.fill_(0.1)
    found = pixel_entropy(model, "layer", images, grid=2, copies=4, progress=False)
    assert found.valid.tolist() == [False, True]
    assert found.entropy[0].isnan().all()
    assert found.entropy[1].isfinite().all()
    assert found.feature_scale[0] == 0


def test_network_is_not_changed():
    torch.manual_seed(0)
    model = TinyCNN(4)
    model.block1.eval()
    model.block2[0].weight.requires_grad_(False)
    before = copy.deepcopy(model)
    pixel_entropy(model, "block2", torch.randn(2, 3, 8, 8), grid=4, copies=4, steps=21, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.state_dict().values(), strict=True))
    for (_, a), (_, b) in zip(model.named_modules(), before.named_modules(), strict=True):
        assert a.training == b.training
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("make", "last"), [(lambda: TinyCNN(4), "block3"), (resnet8, "layer3")], ids=["TinyCNN", "resnet8"])
def test_folded_batch_norm(make, last):
    torch.manual_seed(0)
    model = make()
    for _ in range(5):
        model(torch.randn(8, 3, 16, 16))
    image = torch.randn(2, 3, 16, 16)
    for layer, module in model.eval().named_modules():
        if layer and not isinstance(module, (nn.Sequential, nn.Linear)):
            network = FrozenNetwork(model, layer, CPU)
            torch.testing.assert_close(network(image), network._output(network.original, image), rtol=1e-4, atol=1e-4)
    network = FrozenNetwork(model, last, CPU)
    network(image)
    assert sum(isinstance(m, nn.Identity) for m in network.network.modules()) == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_batch_norm_that_cannot_be_folded():
    """The output of the convolution is also used elsewhere."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.out = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            x = self.conv(x)
            return self.out(self.norm(x) + x)

    torch.manual_seed(0)
    model = Shared()
    for _ in range(5):
        model(3 * torch.randn(8, 3, 8, 8) + 1)
    network = FrozenNetwork(model.eval(), "out", CPU)
    image = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(network(image), model(image))


# Files.


class Stop(Exception):
    pass


class Stopping:
    """Images, of which one cannot be read."""

    def __init__(self, images, last):
        self.images, self.last, self.reads = images, last, []

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        self.reads.append(i)
        if i == self.last:
            raise Stop
        return self.images[i]


def test_interrupted_run_is_continued(tmp_path):
    torch.manual_seed(0)
    model, images = TinyCNN(4), torch.randn(7, 3, 8, 8)
    path = tmp_path / "sub" / "e.npz"
    with pytest.raises(Stop):
        pixel_entropy(model, "block2", Stopping(images, 4), batch_size=2, save_every=1, path=path, **OPTIONS)
    assert {p.name for p in path.parent.iterdir()} == {"e.npz.part"}
    watched = Stopping(images, None)
    found = pixel_entropy(model, "block2", watched, batch_size=2, path=path, **OPTIONS)
    assert watched.reads[:2] == [0, 3]  # the first and the last image of the stored state are checked
    assert min(watched.reads[2:]) == 4
    assert {p.name for p in path.parent.iterdir()} == {"e.npz"}
    whole = pixel_entropy(model, "block2", images, batch_size=2, **OPTIONS)
    loaded = PixelEntropy.load(path)
    for a, b, c in zip(found[:5], whole[:5], loaded[:5], strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert loaded.provenance == found.provenance
    again = pixel_entropy(model, "block2", images, batch_size=7, path=path, **OPTIONS)
    assert torch.equal(again.entropy, found.entropy)


def test_files_of_another_run_raise(tmp_path):
    torch.manual_seed(0)
    model, images = TinyCNN(4), torch.randn(3, 3, 8, 8)
    path = tmp_path / "e.npz"
    pixel_entropy(model, "block2", images, path=path, **OPTIONS)
    for arguments, message in (
        ((TinyCNN(4), "block2", images), "was made with another model"),
        ((model, "block1", images), r"another layer \(layer block2, now block1\)"),
        ((model, "block2", images[:2]), r"another number of images \(count 3, now 2\)"),
        ((model, "block2", images + 1), "was made from other images"),
    ):
        with pytest.raises(ValueError, match=message):
            pixel_entropy(*arguments, path=path, **OPTIONS)
    with pytest.raises(ValueError, match=r"another copies \(copies 4, now 5\)"):
        pixel_entropy(model, "block2", images, path=path, **OPTIONS | {"copies": 5})
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"e\.npz' is not a file of pixel_entropy"):
        PixelEntropy.load(path)
    with pytest.raises(FileNotFoundError):
        PixelEntropy.load(tmp_path / "none.npz")
    part = tmp_path / "f.npz.part"
    with pytest.raises(Stop):
        pixel_entropy(model, "block2", Stopping(images, 2), batch_size=1, save_every=1, path=tmp_path / "f.npz", **OPTIONS)
    with pytest.raises(ValueError, match=r"f\.npz\.part' is of other images"):
        pixel_entropy(model, "block2", images + 1, path=tmp_path / "f.npz", **OPTIONS)
    part.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"f\.npz\.part' cannot be read: remove it"):
        pixel_entropy(model, "block2", images, path=tmp_path / "f.npz", **OPTIONS)


class Skips(TinyCNN):
    def forward(self, x):
        return self.block1(x).mean((2, 3))


WRONG = [
    ({"layer": "block9"}, "TinyCNN has no layer 'block9'"),
    ({"model": Skips(4), "layer": "block2"}, "the layer 'block2' of Skips did not run"),
    ({"grid": 9}, "grid must be at most the height and the width of the images, 8 and 8, got 9"),
    ({"grid": 0}, "grid must be an integer >= 1"),
    ({"grid": 2.0}, "grid must be an integer >= 1"),
    ({"steps": 20}, "steps must be an integer >= 21"),
    ({"copies": 0}, "copies must be an integer >= 1"),
    ({"weight": 0.0}, "weight must be"),
    ({"lr": -1.0}, "lr must be"),
    ({"target": math.nan}, "target must be a finite number"),
    ({"initial_sigma": 2.0}, r"initial_sigma must lie in \[0\.001, 1\], got 2\.0"),
    ({"margin": -0.1}, "margin must be"),
    ({"relu": 1}, "relu must be True or False"),
    ({"seed": 0.5}, "seed must be an int"),
    ({"batch_size": 0}, "batch_size must be at least 1"),
    ({"images": torch.randn(3, 8, 8)}, r"images must have the shape \[N, C, H, W\], got \[3, 8, 8\]"),
    ({"images": torch.randn(0, 3, 8, 8)}, "images must not be empty"),
    ({"images": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, r"images must be floats, normalised .* got torch\.uint8"),
    ({"images": iter([])}, "images must be a tensor or a map-style dataset"),
    ({"images": torch.randn(2, 3, 8, 8).numpy()}, "got ndarray: torch.from_numpy makes a tensor of an array"),
    ({"images": {"image": torch.randn(2, 3, 8, 8)}}, "images must be a tensor or a map-style dataset, got dict"),
    ({"images": [{"picture": torch.randn(3, 8, 8)}]}, r"image 0 of images is a dict without 'image', it has \['picture'\]"),
    ({"images": [torch.randn(3, 8, 8), torch.randn(3, 9, 9)]}, "the images of images must have one shape, got"),
    ({"batch_size": 1.5}, "batch_size must be an int"),
    ({"save_every": 0}, "save_every must be at least 1"),
    ({"seed": 2**64}, r"seed must lie in \[0, 2\*\*63\)"),
    ({"path": "a.pt"}, r"path must end in \.npz, got 'a\.pt'"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_input_raises(change, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = {"model": TinyCNN(4), "layer": "block2", "images": torch.randn(2, 3, 8, 8), "path": "a.npz"} | OPTIONS | change
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        pixel_entropy(arguments.pop("model"), arguments.pop("layer"), arguments.pop("images"), **arguments)
    assert not list(tmp_path.iterdir())
