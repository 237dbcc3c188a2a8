"""Tests that need a GPU: CUDA graph capture, other streams and devices, no synchronization with the
host, and reproducible bits.
"""

import pytest
import torch
from conftest import make_svd

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
SHAPES = [(20, 12, 3), (64, 256, 4), (200, 130, 2)]


@pytest.fixture(params=["cuda", "triton"])
def svd(request):
    return make_svd("cuda", request.param)


def _forward_and_backward(svd, x, k):
    leaf = x.detach().requires_grad_()
    u, s, v = svd(leaf, k, return_u=True)
    student, teacher = svd.align(v, v.detach().flip(-1), s.detach())
    loss = (student * teacher.cos()).sum() + s.sum() + (u[..., 0] ** 3).sum()
    (grad,) = torch.autograd.grad(loss, leaf)
    return u, s, v, grad


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_results_are_reproducible_without_synchronization(m, n, k, svd):
    x = torch.randn(16, m, n, device="cuda").relu()
    x[3] *= torch.logspace(0, -6, n, device="cuda")  # ill-conditioned: takes several rounds
    first = _forward_and_backward(svd, x, k)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = _forward_and_backward(svd, x, k)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_cuda_graph_capture(m, n, k, svd):
    x = torch.randn(16, m, n, device="cuda").relu()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _forward_and_backward(svd, x, k)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _forward_and_backward(svd, x, k)
    for seed in (1, 2):
        x.copy_(torch.randn(x.shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").relu())
        graph.replay()
        for a, b in zip(captured, _forward_and_backward(svd, x, k), strict=True):
            assert torch.equal(a, b)


def test_cuda_graph_capture_of_a_group():
    svd = make_svd("cuda", "cuda")
    xs = [torch.randn(8, m, n, device="cuda", requires_grad=True) for m, n, _ in SHAPES]

    def step():
        results = svd.decompose_all(xs, 2)
        return torch.autograd.grad(sum((v[..., 0] ** 3).sum() + s.sum() for _, s, v in results), xs)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for a, b in zip(captured, expected, strict=True):
        assert torch.equal(a, b)


def test_other_stream(svd):
    x = torch.randn(16, 64, 256, device="cuda")
    expected = _forward_and_backward(svd, x, 4)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        y = x * 1.0  # written late, on this stream
        got = _forward_and_backward(svd, y, 4)
    torch.cuda.current_stream().wait_stream(stream)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_other_device(svd):
    x = torch.randn(16, 64, 256)
    results = [_forward_and_backward(svd, x.to(f"cuda:{i}"), 4) for i in range(2)]  # the current device stays 0
    for a, b in zip(*results, strict=True):
        assert b.device.index == 1
        assert torch.equal(a.cpu(), b.cpu())
