"""On devices without kernels the reference runs instead, and autograd differentiates it.

The device is torch's PrivateUse1 with a backend in Python: tensors of the device "toy" wrap CPU
tensors, and every op of torch unwraps them. It runs in a separate process, because a backend cannot
be unregistered. A view on this device is a copy, so nothing may be written through a view.
"""

import functools
import subprocess
import sys

import pytest
import testing_ops  # noqa: F401  registers the implementation "cuda" on CPU tensors
import torch

import kdkernels as kd
from kdkernels import reference
from kdkernels.testing import implementation

OPS = torch.ops.kdkernels


def make_toy_backend():
    """Register the device, and return the registrations and functions that move a tensor to it and
    back.
    """
    from torch.utils._pytree import tree_map
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend("toy")
    torch.get_device_module("toy").get_amp_supported_dtype = lambda: [torch.bfloat16]  # torch.autocast calls this even if it is disabled

    wrapped = {}  # by storage, because tensors saved by autograd share the storage of the tensors in Python

    def wrap(t):
        if not isinstance(t, torch.Tensor):
            return t
        toy = torch._C._acc.create_empty_tensor(t.shape, t.dtype)
        storage = toy.untyped_storage()
        wrapped[storage._cdata] = (storage, t.contiguous())  # contiguous, like the outer tensor
        return toy

    def unwrap(t):
        if isinstance(t, torch.device):
            return torch.device("cpu")
        return wrapped[t.untyped_storage()._cdata][1] if isinstance(t, torch.Tensor) and t.device.type == "toy" else t

    def run(op, *args, **kwargs):
        if op is torch.ops.aten._copy_from.default:  # copy between the CPU and the device
            source, target = args[:2]
            unwrap(target).copy_(unwrap(source))
            return target
        result = op(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
        return tree_map(wrap, result)

    libraries = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    libraries[0].fallback(run, "PrivateUse1")
    for name in torch._C._dispatch_get_all_op_names():  # general kernels, for example of views, have precedence over the fallback
        base, _, overload = name.removeprefix("aten::").partition(".")
        general = name.startswith("aten::") and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeExplicitAutograd")
        if general and "out" not in overload:
            op = getattr(getattr(torch.ops.aten, base), overload or "default")
            libraries[1].impl(name.removeprefix("aten::"), functools.partial(run, op), "PrivateUse1")
    return libraries, wrap, unwrap


CALLS = {
    "temperature_kl": (lambda m, x, y: m.temperature_kl(x, y, 2.0, direction="jsd", normalizer=3.0), (3, 7)),
    "attention_pool": (lambda m, x, y: (m.attention_pool(x, normalize="l2") * m.attention_pool(y, reduce="max")).sum(), (2, 3, 4)),
    "attention_transfer_loss": (lambda m, x, y: m.attention_transfer_loss(x, y, variant="paper"), (2, 3, 4)),
    "rbf_correlation": (lambda m, x, y: m.rbf_correlation(x, y).cos().sum(), (2, 3, 2)),
    "rbf_correlation_loss": (lambda m, x, y: m.rbf_correlation_loss(x, y, y * 2, x * 3, reduction="batchmean"), (2, 3, 2)),
    "truncated_svd": (lambda m, x, y: m.truncated_svd(x, 2)[2].sin().sum() + y.sum(), (2, 5, 4)),
    "align_singular_vectors": (lambda m, x, y: m.align_singular_vectors(x, y)[0].square().sum(), (2, 5, 3)),
}


def check_on_the_toy_device():
    _libraries, to_toy, from_toy = make_toy_backend()
    for name, (function, shape) in CALLS.items():
        generator = torch.Generator().manual_seed(0)
        x, y = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        results = []
        for module, move in ((reference, lambda t: t.clone()), (kd, to_toy)):
            student, teacher = move(x).requires_grad_(), move(y)
            value = function(module, student, teacher)
            assert value.device == student.device
            (gradient,) = torch.autograd.grad(value, student)
            with torch.no_grad():
                without_grad = function(module, student, teacher)
            results.append([from_toy(t).detach() for t in (value, gradient, without_grad)])
        for got, want in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
    (_, s, v), _ = kd.truncated_svds([to_toy(torch.eye(3)), to_toy(torch.ones(4, 2))], 1)
    assert s.device.type == v.device.type == "toy"


def test_reference_runs_on_a_device_without_kernels():
    code = f"import sys; sys.path.insert(0, {__file__.rsplit('/', 1)[0]!r}); import test_other_devices as t; t.check_on_the_toy_device()"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]


def test_reference_in_place_of_a_kernel_saves_no_gradients():
    """The reference saves no gradients. save_grad=True raises, because the caller would use an
    empty tensor as the gradient.
    """
    x = torch.randn(3, 4)
    kernel = torch._C.DispatchKey.AutogradPrivateUse1
    arguments = (x, x, 1.0, None, None, None, -1, 0, 0.5, 3, True, True, 0.0)
    loss, grad, scale = OPS.temperature_kl.default._op_dk(kernel, *arguments, False)
    assert torch.equal(loss, reference.temperature_kl(x, x))
    assert grad.numel() == scale.numel() == 0
    with pytest.raises(NotImplementedError, match="computes no gradients in the forward pass on this device, got save_grad=True"):
        OPS.temperature_kl.default._op_dk(kernel, *arguments, True)


def test_reference_is_not_used_on_cpu_and_cuda():
    """On the CPU and on CUDA a missing kernel is an error: the slower reference is not used."""
    for name in ("temperature_kl", "attention_pool", "attention_transfer_loss", "rbf_correlation", "rbf_correlation_loss"):
        for key in ("CompositeImplicitAutograd", "CompositeExplicitAutograd", "AutogradCPU", "AutogradCUDA"):
            assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"kdkernels::{name}", key)


def test_error_names_missing_triton(monkeypatch):
    from kdkernels.ops import registration

    def raise_import_error(name):
        raise ImportError(name)

    registration._triton_module.cache_clear()
    monkeypatch.setattr(registration.importlib, "import_module", raise_import_error)
    with pytest.raises(RuntimeError, match="attention_pool on a GPU runs in Triton, which is not installed: pip install triton"):
        registration._launcher("attention_pool", "attention_pool")(torch.rand(1, 1, 1), 2.0, 0, 0, 1e-12)


def test_show_config_names_the_reference_for_other_devices(capsys):
    kd.show_config()
    printed = capsys.readouterr().out
    assert "temperature_kl: cpu -> C++" in printed
    assert "other devices -> reference in plain PyTorch" in printed


def test_choice_of_implementation_ends_with_its_block(monkeypatch):
    from kdkernels.ops.truncated_svd_implementations import chosen
    from kdkernels.options import Implementation

    with implementation("cuda"):
        with implementation("torch"):
            assert chosen.implementation == Implementation.TORCH
        assert chosen.implementation == Implementation.CUDA
        with pytest.raises(RuntimeError, match="inside"), implementation("fastest"):
            raise RuntimeError("inside")
        assert chosen.implementation == Implementation.CUDA
    assert chosen.implementation == Implementation.FASTEST
    for bad in ("cublas", None, 1, ["cuda"]):
        with pytest.raises((ValueError, TypeError), match="implementation must be one of"), implementation(bad):
            pass
    monkeypatch.setattr("kdkernels.ops.truncated_svd_implementations.importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="needs Triton, which is not installed: pip install triton"), implementation("triton"):
        pass


def test_choice_of_implementation_applies_to_compiled_code_and_backward():
    """torch.compile guards the choice.

    A later backward pass uses the kernels of its forward pass.
    """
    x = torch.randn(2, 5, 4, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: kd.truncated_svd(x, 2)[2], fullgraph=True, backend="aot_eager")
    for name in ("fastest", "cuda"):
        with implementation(name):
            got, want = compiled(x), kd.truncated_svd(x, 2)[2]
        assert torch.equal(got, want)
        assert torch.equal(torch.autograd.grad(got.sum(), x)[0], torch.autograd.grad(want.sum(), x)[0])
