"""truncated_svd against torch's full decompositions, its randomised one, and power iteration; the errors of all beside the times."""

import pytest
import torch
from conftest import DEVICE, SMOKE
from feature_maps import relu_maps, trained_maps

from kdkernels import feature_svd, truncated_svd
from kdkernels.config import HAS_CUDA_KERNELS
from kdkernels.timing import forward_backward, time_interleaved

# side of the map, channels: matrices [side^2, channels], as the layers of usual networks give
SHAPES = [(32, 16), (32, 64), (16, 32), (16, 128), (8, 64), (8, 256), (7, 512), (14, 256), (28, 128), (56, 64), (7, 2048)]
CELLS = [(side, c, 128, k, way, "relu") for k in (4, 1, 2, 8) for side, c in SHAPES for way in ("forward", "forward + backward")]
CELLS += [(28, 512, 16, k, way, "relu") for k in (1, 4) for way in ("forward", "forward + backward")]
# The spectra of other maps: noise behind a ReLU, whose gaps are small; noise; a trained network.
CELLS += [(side, c, 128, 4, "forward", kind) for kind in ("relu of noise", "noise") for side, c in ((32, 64), (14, 256), (7, 512))]
CELLS += [
    (side, c, 128, 4, "forward + backward", f"trained {block}") for block, side, c in (("block1", 16, 64), ("block2", 8, 128), ("block3", 4, 256))
]


def features_of(kind: str, batch: int, channels: int, side: int) -> torch.Tensor:
    if kind == "relu":
        return relu_maps(batch, channels, side)
    if kind.startswith("trained"):
        return trained_maps(batch, kind.split()[1])
    noise = torch.randn(batch, channels, side, side)
    return noise.relu() if kind == "relu of noise" else noise


def svd(x, k, driver=None):
    _, s, vh = torch.linalg.svd(x, full_matrices=False, driver=driver)
    return s[..., :k], vh[..., :k, :].mT


def eigh(x, k):
    """The eigenvectors of the smaller Gram matrix."""
    tall = x.shape[-2] >= x.shape[-1]
    values, vectors = torch.linalg.eigh(x.mT @ x if tall else x @ x.mT)
    s, vectors = values[..., -k:].flip(-1).clamp_min(0).sqrt(), vectors[..., -k:].flip(-1)
    return s, vectors if tall else x.mT @ vectors / s[..., None, :]


def svd_lowrank(x, k):
    _, s, v = torch.svd_lowrank(x, q=min(k + 6, *x.shape[-2:]), niter=2)
    return s[..., :k], v[..., :k]


def power_iteration(x, k, rounds=8):
    """For k = 1: the best that plain torch has."""
    tall = x.shape[-2] >= x.shape[-1]
    gram = torch.bmm(x.mT, x) if tall else torch.bmm(x, x.mT)
    v = gram.sum(-1, keepdim=True)
    for _ in range(rounds):
        v = torch.nn.functional.normalize(gram @ v, dim=-2)
    if tall:
        return (x @ v).norm(dim=-2), v
    w = x.mT @ v
    return w.norm(dim=-2), torch.nn.functional.normalize(w, dim=-2)


@pytest.mark.parametrize(("side", "channels", "batch", "k", "way", "kind"), CELLS)
def bench_truncated_svd(side, channels, batch, k, way, kind, report):
    if SMOKE:
        batch, side, channels = 2, min(side, 4), min(channels, 16)
        kind = kind if kind == "relu" else "noise"
    features = features_of(kind, batch, channels, side).to(DEVICE)
    k = min(k, side * side, channels)
    x = features.flatten(2).mT
    name = f"{side * side} x {channels}, k = {k}, {way}" + (f", batch {batch}" if batch != 128 else "") + (f", {kind}" if kind != "relu" else "")
    peers = {"linalg.svd": svd, "eigh": eigh}
    if way == "forward":
        peers["svd_lowrank"] = svd_lowrank
    if k == 1:
        peers["power iteration"] = power_iteration
    errors = gate(features, x, k, peers)

    if way == "forward":
        with torch.no_grad():
            calls = {"fused": lambda: feature_svd(features, k)} | {p: (lambda f=f: f(x, k)) for p, f in peers.items()}
            times = time_interleaved(calls, seconds=0.01 if SMOKE else 2 if k == 4 else 1, warmup=1)
    else:
        features.requires_grad_()
        target = torch.randn(batch, channels, k, device=DEVICE)

        def loss_of(function):
            def loss(features):
                s, v = function(features.flatten(2).mT, k)
                return (v * target).sum() + s.sum()

            return loss

        calls = {"fused": forward_backward(loss_of(lambda x, k: truncated_svd(x, k)[1:]), features)}
        calls |= {p: forward_backward(loss_of(f), features) for p, f in peers.items()}
        times = time_interleaved(calls, seconds=0.01 if SMOKE else 2 if k == 4 else 1, warmup=1)
    report(name, calls["fused"], times, **errors)


@pytest.mark.skipif(DEVICE == "cpu" and not SMOKE, reason="the implementations for GPUs are timed on GPUs")
@pytest.mark.parametrize(("side", "channels"), SHAPES)
@pytest.mark.parametrize("way", ["forward", "forward + backward"])
@pytest.mark.parametrize("k", [1, 4])
def bench_drivers(side, channels, way, k, report):
    """On a GPU: every implementation of ours, the calls replayed from a CUDA graph, and every driver that torch has."""
    batch = 128
    if SMOKE:
        batch, side, channels = 2, min(side, 4), min(channels, 16)
    features = relu_maps(batch, channels, side).to(DEVICE)
    x = features.flatten(2).mT
    ours = ["cuda"] if DEVICE == "cpu" or HAS_CUDA_KERNELS else []
    ours += ["triton"] if DEVICE == "cuda" else []
    functions = {"fused": lambda x, k: truncated_svd(x, k)[1:]}
    functions |= {name: lambda x, k, d=name: truncated_svd(x, k, driver=d)[1:] for name in [*ours, "torch"]}
    peers = {"linalg.svd": svd, "eigh": eigh}
    if DEVICE == "cuda":
        peers |= {name: lambda x, k, d=name: svd(x, k, d) for name in ("gesvda", "gesvdj", "gesvd")}
    errors = gate(features, x, k, functions | peers)
    if way == "forward":
        calls = {name: (lambda f=f: f(x, k)) for name, f in (functions | peers).items()}
    else:
        features.requires_grad_()
        target = torch.randn(batch, channels, k, device=DEVICE)

        def loss_of(function):
            def loss(features):
                s, v = function(features.flatten(2).mT, k)
                return (v * target).sum() + s.sum()

            return loss

        calls = {name: forward_backward(loss_of(f), features) for name, f in (functions | peers).items()}
    if DEVICE == "cuda":
        calls["replayed"] = captured(calls["fused"])
    times = time_interleaved(calls, seconds=0.01 if SMOKE else 1, warmup=1)
    report(f"drivers: {side * side} x {channels}, k = {k}, {way}", calls["fused"], times, **errors)


def captured(call):
    """The call in a CUDA graph: what it costs without its launches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def gate(features, x, k, peers) -> dict[str, float]:
    """Errors against float64: of s relative to the largest, and the sine of the angle of the worst v. Ours must be small."""
    x = x[:16]
    all_s = torch.linalg.svdvals(x.double())
    true_s, true_v = svd(x.double(), k)
    squares = (all_s / all_s[..., :1]) ** 2
    gaps = (squares[..., None, :] - squares[..., :k, None]).abs()
    gaps[..., torch.arange(k), torch.arange(k)] = 1
    gaps = torch.minimum(gaps.amin(-1), squares[..., :k])

    def errors(s, v):
        v = v.double()
        off = (v - true_v * (v * true_v).sum(-2, keepdim=True)).norm(dim=-2)
        return ((s.double() - true_s).abs() / true_s[..., :1]).max().item(), off

    s_error, off = errors(*feature_svd(features[:16].detach(), k)[1:])
    assert s_error <= 1e-6, s_error
    assert (off <= 2e-6 / gaps.clamp_min(1e-12) + 2e-6).all(), (off * gaps).max()
    result = {"error of s": s_error, "sine": off.max().item()}
    for peer, function in peers.items():
        result[f"sine of {peer}"] = errors(*function(x.detach(), k))[1].max().item()
    return result
