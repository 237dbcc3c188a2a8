"""The inputs for which gpu_model.py predicts times, and the parts of kernels that it counts."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any


@dataclass(frozen=True)
class Case:
    """A call of an op. `op` and `input` are those of the benchmark suite's rows."""

    op: str
    input: str
    kind: str  # how it is called, see _call in gpu_compile.py
    shape: tuple[int, ...]
    dtype: str = "float32"
    implementation: str = "triton"  # or "cuda"
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        return f"{self.op}, {self.implementation}: {self.input}"

    @property
    def number_size(self) -> int:
        return {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}[self.dtype]

    @property
    def numbers(self) -> int:
        return prod(self.shape)

    def option(self, name: str, default: Any = None) -> Any:
        return dict(self.options).get(name, default)


def _sizes(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _kl(*shape: int, dtype: str = "float32", direction: str = "forward", implementation: str = "triton") -> Case:
    suffix = (", dim=1" if len(shape) > 2 else "") + (f", {direction}" if direction != "forward" else "")
    suffix += f", {dtype}" if dtype != "float32" else ""
    return Case("temperature_kl", _sizes(shape) + suffix, "kl", shape, dtype, implementation, (("direction", direction),))


def _transfer(*shape: int, dtype: str = "float32", channels_last: bool = False, p: float = 2.0) -> Case:
    suffix = (", channels_last" if channels_last else "") + (f", p = {p}" if p != 2.0 else "") + (f", {dtype}" if dtype != "float32" else "")
    return Case("attention_pool", _sizes(shape) + suffix, "transfer", shape, dtype, options=(("channels_last", channels_last), ("p", p)))


# Rows and columns of a feature map as a matrix; the measured rows of truncated_svd.
MATRICES = (
    (1024, 16), (1024, 64), (256, 32), (256, 128), (64, 64), (64, 256), (49, 512), (196, 256), (784, 128), (3136, 64), (49, 2048),
)  # fmt: skip

CASES = (
    _kl(1024, 1000),
    _kl(1024, 1000, direction="jsd"),
    _kl(2048, 32000),
    _kl(4096, 128256, dtype="bfloat16"),
    _kl(8192, 32000, dtype="bfloat16"),
    _kl(65536, 1000),
    _kl(65536, 1000, dtype="bfloat16"),
    _kl(16384, 4096, dtype="bfloat16"),
    _kl(32, 21, 128, 128),
    _kl(2048, 32000, implementation="cuda"),
    _kl(4096, 128256, dtype="bfloat16", implementation="cuda"),
    _kl(8192, 32000, dtype="bfloat16", implementation="cuda"),
    _transfer(128, 64, 32, 32),
    _transfer(128, 64, 32, 32, p=2.7),
    _transfer(64, 256, 56, 56),
    _transfer(128, 512, 56, 56),
    _transfer(128, 512, 56, 56, channels_last=True),
    _transfer(128, 512, 56, 56, dtype="bfloat16"),
    Case("attention_pool", "pool 128 x 64 x 32 x 32, l2", "pool", (128, 64, 32, 32)),
    Case("rbf_correlation", "128 x 512 x 512 x 2", "rbf loss", (128, 512, 512, 2)),
    Case("rbf_correlation", "8 x 2048 x 2048 x 4", "rbf loss", (8, 2048, 2048, 4)),
    Case("rbf_correlation", "correlation 32 x 512 x 512 x 2", "correlation", (32, 512, 512, 2)),
    *(Case("truncated_svd", f"{m} x {n}, k = 4", "svd", (128, m, n, 4), implementation="cuda") for m, n in MATRICES),
    *(Case("truncated_svd", f"{m} x {n}, k = 4", "svd", (128, m, n, 4)) for m, n in ((1024, 64), (64, 256), (784, 128))),
    Case("align_singular_vectors", "128 x 512, 8 and 4 vectors", "align", (128, 512, 8, 4), implementation="cuda"),
    Case("align_singular_vectors", "128 x 512, 8 and 4 vectors", "align", (128, 512, 8, 4)),
)


def cuda_shapes() -> set[tuple[int, int]]:
    """Return the smaller side and k of the matrices of the CUDA kernels."""
    return {(min(case.shape[1:3]), case.shape[3]) for case in CASES if case.kind == "svd" and case.implementation == "cuda"}


def long_row_shapes() -> set[tuple[int, int]]:
    """Return the classes and the bytes of a logit of the CUDA kernel of temperature_kl."""
    return {(case.shape[-1], case.number_size) for case in CASES if case.kind == "kl" and case.implementation == "cuda"}


@dataclass(frozen=True)
class Part:
    """A loop in the compiled code of a kernel: the one in `function` with the most of `most`.

    The counts of the loop are divided by the number of times that it contains `per_unit` of `unit`,
    because compilers unroll loops. Units are those of gpu_sass.py, or "load_bytes", "store_bytes".
    """

    name: str
    function: str  # "" for any
    most: str
    unit: str = ""
    per_unit: float = 1
    without: tuple[str, ...] = ()
    has: tuple[str, ...] = ()
    exactly: tuple[tuple[str, int], ...] = ()
    innermost: bool = True  # whether the loop contains no other loop
    depth: int = 1  # the smallest depth of the loop
    rank: int = 0  # 1: the loop with the second most


_SERIAL = ("barrier", "shuffle")  # loops that contain them are not simple loops over numbers
_TRITON_FORM = (
    Part("tridiagonal step", "tridiagonalize", "total", innermost=False),
    Part("tridiagonal block", "tridiagonalize", "store_bytes"),
)  # fmt: skip

PARTS = {
    "_long_rows_kernel": (
        Part("statistics", "", "shuffle", has=("load_bytes",)),
        Part("gradient", "", "store_bytes", has=("load_bytes",), without=("shuffle",)),
    ),
    "_mark_kernel": (Part("range", "", "load_bytes", without=("store_bytes",)),),
    "_terms_kernel": (
        Part("products", "", "tensor", has=("load_bytes",), without=("store_bytes",), innermost=False),
        Part("differentiate", "", "store_bytes", has=("tensor", "load_bytes"), innermost=False),
        Part("term", "_terms", "fp64"),
    ),
    "_gram_kernel": (Part("products", "", "tensor"),),
    "_decompose_kernel": (
        *_TRITON_FORM,
        Part("sturm", "largest_eigenvalues", "mufu", "mufu"),
        Part("factor", "", "store_bytes", has=("mufu", "fp64"), without=_SERIAL),
        Part("forward substitution", "eigenvectors", "alu", "global store", has=("fp64",), without=("mufu", "shuffle")),
        Part("back substitution", "eigenvectors", "fp64", "global store", without=("mufu", "shuffle")),
        Part("orthonormalization", "orthonormalize", "shuffle", innermost=False, depth=2),
        Part("projection", "_subtract_projections", "shuffle"),
        Part("reflection", "apply_q", "shuffle"),
    ),
    "_solve_kernel": (
        *_TRITON_FORM,
        Part("elimination", "resolvent", "store_bytes", has=("mufu",)),
        Part("substitution", "resolvent", "fp64", "global store", without=("mufu",)),
        Part("reflection", "apply_q", "shuffle"),
        Part("projection", "_subtract_projections", "shuffle"),
    ),
    "long_rows_kernel": (
        Part("row", "", "convert", innermost=False),
        Part("sums", "", "mufu", has=("convert", "shared"), without=("global store", "barrier")),
        Part("terms", "", "fma", has=("mufu",)),
        Part("gradient", "", "store_bytes", has=("shared",), without=("async copy",)),
        Part("request", "", "wide copy", "wide copy", 2),
    ),
    "forward_kernel": (
        Part("copy", "gram", "async copy", "async copy"),
        Part("gram", "gram", "fma", "shared", 4, without=("async copy", "mufu")),  # a column for 8 x 8 products
        Part("gram store", "gram", "generic store", has=("generic load",)),
        Part("sweep of 1 row", "tridiagonalize", "fma", has=("generic load",), exactly=(("generic store", 1), ("shared", 1)), without=_SERIAL),
        Part("sweep of 4 rows", "tridiagonalize", "fma", has=("generic load",), exactly=(("generic store", 4), ("shared", 1)), without=("mufu",)),
        Part("sturm", "largest_eigenvalues", "mufu", "mufu", without=_SERIAL),
        Part("factor", "eigenvectors", "generic store", "generic store", 5, has=("mufu",)),
        Part("forward substitution", "eigenvectors", "fp64", "generic store", without=("mufu", "convert"), has=("generic load",), rank=1),
        Part("back substitution", "eigenvectors", "fp64", "generic store", without=("mufu", "convert"), has=("generic load",)),
        Part("scaling", "eigenvectors", "mufu", "mufu", without=("convert",)),
    ),
    "solve_kernel": (
        Part("copy", "compute_right_sides", "async copy", "async copy"),
        Part("elimination", "resolvent", "generic store", "generic store", 7, has=("mufu",)),
        Part("substitution", "resolvent", "fp64", "generic store", without=("mufu",)),
    ),
    "update_kernel": (
        Part("copy", "", "async copy", "async copy", without=("wide copy",)),
        Part("wide copy", "", "wide copy", "wide copy"),
        Part("projections", "", "fma", "shared", 9, has=("shared",), without=("async copy", "store_bytes", "convert", "load_bytes", "mufu")),
        Part("write", "", "store_bytes", "global store", without=("fp64",)),
    ),
}  # fmt: skip
