"""What only a GPU can show: capture in a CUDA graph, other streams and devices, no wait for the host, the same bits every time."""

import pytest
import torch
from conftest import svd_backend

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
SHAPES = [(20, 12, 3), (64, 256, 4), (200, 130, 2)]


@pytest.fixture(params=["cuda", "triton"])
def svd(request):
    return svd_backend("cuda", request.param)


def _step(svd, x, k):
    given = x.detach().requires_grad_()
    u, s, v = svd(given, k, return_u=True)
    student, teacher = svd.align(v, v.detach().flip(-1), s.detach())
    loss = (student * teacher.cos()).sum() + s.sum() + (u[..., 0] ** 3).sum()
    (grad,) = torch.autograd.grad(loss, given)
    return u, s, v, grad


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_the_same_bits_and_no_wait(m, n, k, svd):
    x = torch.randn(16, m, n, device="cuda").relu()
    x[3] *= torch.logspace(0, -6, n, device="cuda")  # takes several rounds
    first = _step(svd, x, k)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = _step(svd, x, k)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_capture(m, n, k, svd):
    x = torch.randn(16, m, n, device="cuda").relu()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _step(svd, x, k)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _step(svd, x, k)
    for seed in (1, 2):
        x.copy_(torch.randn(x.shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").relu())
        graph.replay()
        for a, b in zip(captured, _step(svd, x, k), strict=True):
            assert torch.equal(a, b)


def test_capture_of_a_group():
    svd = svd_backend("cuda", "cuda")
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


def test_another_stream(svd):
    x = torch.randn(16, 64, 256, device="cuda")
    expected = _step(svd, x, 4)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        y = x * 1.0  # written late, on this stream
        got = _step(svd, y, 4)
    torch.cuda.current_stream().wait_stream(stream)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_another_device(svd):
    x = torch.randn(16, 64, 256)
    results = [_step(svd, x.to(f"cuda:{i}"), 4) for i in range(2)]  # the current device stays 0
    for a, b in zip(*results, strict=True):
        assert b.device.index == 1
        assert torch.equal(a.cpu(), b.cpu())
