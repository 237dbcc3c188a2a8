"""Compiles every variant of every Triton kernel: python compile_kernels.py sm_90,gfx942 OUT. Needs no GPU.

Writes OUT/<target>/<variant>.cubin and prints "<target> <variant>" for each.
"""

import itertools
import multiprocessing
import os
import sys
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kdkernels.triton import align_singular_vectors as align
from kdkernels.triton import attention_pool as at
from kdkernels.triton import rbf_correlation as rbf
from kdkernels.triton import svd_backward, svd_sizes
from kdkernels.triton import temperature_kl as kl
from kdkernels.triton import truncated_svd as svd

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


def gpu_target(name: str) -> GPUTarget:
    if name.startswith("gfx"):
        return GPUTarget("hip", name, 64)
    return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)


def kl_variants():
    """(name, kernel, signature, constants, warps) of the launches that block_sizes can lead to."""
    plain = dict(direction=0, entropy=True, eps=0.0, loss=True, student=True, teacher=False, temperature=False)
    everything = plain | dict(loss=False, teacher=True, temperature=True)
    layouts = [
        ("c10", 10, 1),
        ("c100", 100, 1),
        ("c1000", 1000, 1),
        ("c4096", 4096, 1),
        ("c32000", 32000, 1),
        ("map21", 21, 256),
        ("map1000", 1000, 64),
    ]
    for layout, classes, stride in layouts:
        for dtype in (torch.float32, torch.bfloat16):
            yield kl_variant(f"forward_{layout}_{NAMES[dtype]}", classes, stride, dtype, **plain)
    for layout, classes, stride in layouts[3:]:
        yield kl_variant(f"backward_{layout}", classes, stride, torch.bfloat16, **everything)
        yield kl_variant(f"backward_eps_{layout}", classes, stride, torch.float32, **everything | dict(eps=1e-7))
        yield kl_variant(f"jsd_{layout}", classes, stride, torch.float32, **plain | dict(direction=2))
        yield kl_variant(f"jsd_backward_{layout}", classes, stride, torch.float16, **everything | dict(direction=2))
        yield kl_variant(f"forward_{layout}_fp16", classes, stride, torch.float16, **plain)
    yield kl_variant("reverse", 1000, 1, torch.float32, **plain | dict(direction=1))
    yield kl_variant("cross_entropy", 1000, 1, torch.float32, **everything | dict(entropy=False))
    yield kl_variant("double", 100, 1, torch.float64, **everything)


def kl_variant(name, classes, class_stride, dtype, *, direction, entropy, eps, loss, student, teacher, temperature):
    compute = "fp64" if dtype == torch.float64 else "fp32"
    pointer = {
        "student_ptr": NAMES[dtype],
        "teacher_ptr": NAMES[dtype],
        "to_student_ptr": NAMES[dtype],
        "to_teacher_ptr": NAMES[dtype],
        "mask_ptr": "u8",
        "row_scale_ptr": "fp32",
    }
    signature, constants = {}, {}
    sizes = kl.block_sizes(classes, class_stride, compute == "fp64")
    flags = dict(
        BETA=0.5, EPS=eps, DIRECTION=direction, T_SQUARED=True, ENTROPY=entropy, HAS_TEMPERATURE=True, HAS_MASK=True, HAS_WEIGHT=True, UPSTREAM=1,
        WANT_LOSS=loss, WANT_STUDENT=student, WANT_TEACHER=teacher, WANT_TEMPERATURE=temperature,
        SCALED=dtype == torch.float16 and not teacher, COMPUTE=triton.language.float64 if compute == "fp64" else triton.language.float32,
        ONE_BLOCK=sizes["ONE_BLOCK"], ROWS=sizes["ROWS"], BLOCK=sizes["BLOCK"],
    )  # fmt: skip
    for argument in kl._kl_kernel.arg_names:
        if argument in flags:
            signature[argument], constants[argument] = "constexpr", flags[argument]
        elif argument.endswith("_ptr"):
            signature[argument] = "*" + pointer.get(argument, compute)
        elif argument.endswith("_class") and class_stride == 1:
            signature[argument], constants[argument] = "constexpr", 1
        else:
            signature[argument] = (
                "fp32" if argument in ("temperature", "weight") else "i64" if argument.startswith(("s_", "t_", "gs_", "gt_")) else "i32"
            )
    return name, kl._kl_kernel, signature, constants, sizes["num_warps"]


def rescale_variant():
    signature = {"grad_ptr": "*bf16", "scale_ptr": "*fp32", "count": "i64", "BLOCK": "constexpr"}
    return "rescale", kl._rescale_kernel, signature, {"BLOCK": 4096}, 4


def rescale_rows_variant():
    signature = {a: "i64" if a.startswith(("g_", "o_")) else "i32" for a in kl._rescale_rows_kernel.arg_names}
    signature |= {"grad_ptr": "*fp16", "out_ptr": "*fp16", "row_scale_ptr": "*fp32", "upstream_ptr": "*fp32", "mask_ptr": "*u8"}
    constants = dict(HAS_SCALE=True, PER_ROW=True, HAS_MASK=True, IN_PLACE=True, COMPUTE=triton.language.float32, ROWS=1, BLOCK=1024)
    return "rescale_rows", kl._rescale_rows_kernel, signature | dict.fromkeys(constants, "constexpr"), constants, 4


def attention_variants():
    """Every kernel of attention_pool, over the layouts and tiles that its launchers choose."""
    # name, channels, places, stride of a place
    layouts = [
        ("map8", 256, 64, 1),
        ("map56", 256, 3136, 1),
        ("map2", 512, 4, 1),
        ("last8", 64, 64, 64),
        ("last56", 256, 3136, 256),
        ("last3", 3, 9, 3),
    ]
    forms = [(torch.float32, 2.0, False), (torch.bfloat16, 0.0, False), (torch.float16, 1.5, True), (torch.float64, 0.0, True)]
    for (i, (layout, channels, places, stride)), (j, (dtype, power, maximum)) in itertools.product(enumerate(layouts), enumerate(forms)):
        if j and i % 3 != j - 1:
            continue  # other forms on two layouts each, one of either kind
        sizes = at.block_sizes(channels, places, stride, dtype == torch.float64)
        flags = dict(MEAN=True, MAX=maximum, POWER=power, BLOCK_C=sizes["BLOCK_C"], BLOCK_S=sizes["BLOCK_S"])
        for kernel in (at._pool_kernel, at._scatter_kernel):
            name = f"{kernel.__name__}_{layout}_{NAMES[dtype]}"
            yield attention_variant(name, kernel, dtype, flags, sizes["num_warps"], "_place" if stride == 1 else "_channel")
    for places, dtype in ((64, torch.float32), (3136, torch.float32), (3136, torch.float64)):
        block, name = at._row_block(places), f"{places}_{NAMES[dtype]}"
        flags = dict(BLOCK=block["BLOCK"])
        both = flags | dict(HAS_UPSTREAM=True, WANT_STUDENT=True, WANT_TEACHER=True)
        for i in range(2):
            yield attention_variant(f"normalize{i}_{name}", at._normalize_kernel, dtype, flags | dict(SOFTMAX=bool(i)), block["num_warps"])
            yield attention_variant(f"transfer{i}_{name}", at._transfer_kernel, dtype, both | dict(PAPER=bool(i)), block["num_warps"])
        yield attention_variant(f"weight1_{name}", at._weight_kernel, dtype, flags | dict(KIND=1), block["num_warps"])
        yield attention_variant(f"weight2_{name}", at._weight_kernel, dtype, flags | dict(KIND=2), block["num_warps"])


def attention_variant(name, kernel, dtype, flags, num_warps, unit_stride=""):
    """Pointers to features have their dtype, most others that of the computation; strides that end in ``unit_stride`` are 1."""
    compute = "fp64" if dtype == torch.float64 else "fp32"
    flags = flags | dict(COMPUTE=getattr(triton.language, "float64" if compute == "fp64" else "float32"))
    pointer = {"x_ptr": NAMES[dtype], "grad_ptr": NAMES[dtype], "channel_ptr": "i32", "loss_ptr": "fp64", "norm_ptr": "fp64"}
    signature, constants = {}, {}
    for argument in kernel.arg_names:
        if argument in flags:
            signature[argument], constants[argument] = "constexpr", flags[argument]
        elif argument.endswith("_ptr"):
            signature[argument] = "*" + pointer.get(argument, compute)
        elif unit_stride and argument.endswith(unit_stride):
            signature[argument], constants[argument] = "constexpr", 1
        else:
            signature[argument] = "fp32" if argument.endswith(("_hi", "_lo")) else "i64" if argument.startswith(("x_", "g_")) else "i32"
    return name, kernel, signature, constants, num_warps


def svd_variants(target: GPUTarget):
    """Every kernel of truncated_svd, over sides up to the largest."""
    for p, q, k, dtype, unit in [
        (64, 256, 8, torch.bfloat16, "x_p"),
        (196, 256, 8, torch.float64, ""),
        (512, 784, 4, torch.float32, "x_q"),
    ]:
        double = dtype == torch.float64
        sizes, compute = svd_sizes.block_sizes(p, q, k, double), triton.language.float64 if double else triton.language.float32
        flags = sizes | svd_sizes.search_sizes(double) | dict(T=compute, FIX_SIGN=True, WRITE_S=True, SIGN=True, SIGN_ON_A=q > 512)
        flags |= dict(HAS_A=True, HAS_S=True, HAS_B=k > 1, HAS_STATE=True, PRECISION=precision(double, target))
        columns, name = svd_sizes.column_block(p, double), f"{p}x{q}_{k}_{NAMES[dtype]}"
        kernels = [
            (svd._gram_kernel, svd_sizes.gram_sizes(p, double)),
            (svd._decompose_kernel, {"num_warps": svd_sizes.warps_for(p)}),
            (svd._project_kernel, {"BQ": columns}),
            (svd._finish_kernel, {"BLOCK": 1024}),
            (svd_backward._product_kernel, {"BP": min(sizes["PB"], 32), "BQ": 64}),
            (svd_backward._solve_kernel, {"BLOCK": 512, "num_warps": svd_sizes.warps_for(p)}),
            (svd_backward._update_kernel, {"BQ": columns}),
        ]
        if p > 64:  # what does not depend on p much was compiled before
            kernels = [pair for pair in kernels if pair[0] not in (svd._project_kernel, svd._finish_kernel, svd_backward._product_kernel)]
        for kernel, special in kernels:
            own = flags | special
            yield svd_variant(f"{kernel.__name__}_{name}", kernel, dtype, own, own.get("num_warps", 4), unit)
    for dtype, compute in ((torch.float32, "fp32"), (torch.float64, "fp64")):
        flags = dict(HAS_WEIGHT=True, FLIP_TEACHER=True, BLOCK=512, HAS_UP_STUDENT=True, HAS_UP_TEACHER=True)
        flags |= dict(WANT_STUDENT=True, WANT_TEACHER=True, WANT_WEIGHT=True)
        for kernel in (align._align_kernel, align._align_backward_kernel):
            yield svd_variant(f"{kernel.__name__}_{compute}", kernel, dtype, flags, 4, "")


def precision(double: bool, target: GPUTarget) -> str:
    """What svd_sizes.precision gives on the target, which torch does not know here."""
    return "ieee" if double or target.backend == "hip" else "tf32x3"


def svd_variant(name, kernel, dtype, flags, num_warps, unit_stride):
    compute = "fp64" if dtype == torch.float64 else "fp32"
    of_x = ("x_ptr", "out_ptr")
    doubles = ("sigma_ptr", "scale_ptr", "rows_ptr", "coefficients_ptr", "mg_ptr")
    signature, constants = {}, {}
    for argument in kernel.arg_names:
        if argument in flags:
            signature[argument], constants[argument] = "constexpr", flags[argument]
        elif argument.endswith("_ptr"):
            kind = NAMES[dtype] if argument in of_x else "fp64" if argument in doubles else "i64" if argument == "match_ptr" else compute
            signature[argument] = "*" + kind
        elif unit_stride and argument in (unit_stride, unit_stride.replace("x_", "o_")):
            signature[argument], constants[argument] = "constexpr", 1
        else:
            signature[argument] = "fp32" if argument.startswith("gap_") else "i64" if argument.startswith(("x_", "o_")) else "i32"
    return name, kernel, signature, constants, num_warps


def rbf_variants():
    """Every kernel of rbf_correlation, for columns side by side as in SVD-KD and for many."""
    both = dict(WANT_SX=True, WANT_SY=True, WANT_TX=True, WANT_TY=True)
    student = both | dict(WANT_TX=False, WANT_TY=False)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        double = dtype == torch.float64
        compute = triton.language.float64 if double else triton.language.float32
        for wants in (student, both):
            suffix = f"{NAMES[dtype]}_{'all' if wants is both else 'student'}"
            yield rbf_variant(f"mark_{suffix}", rbf._mark_kernel, dtype, wants | dict(BLOCK=256), 4)
            for rank in (8, 16):
                sizes = rbf.term_sizes(rank)
                yield rbf_variant(f"terms{rank}_{suffix}", rbf._terms_kernel, dtype, wants | sizes, sizes["num_warps"])
            pair = rbf.pair_sizes()
            yield rbf_variant(f"pairs_{suffix}", rbf._pairs_kernel, dtype, wants | pair, pair["num_warps"])
        yield rbf_variant(f"correlation_{NAMES[dtype]}", rbf._correlation_kernel, dtype, dict(COMPUTE=compute, BLOCK=1024), 4)
        for columns in (1, 4, 50):
            sizes = rbf.dense_sizes(columns, double)
            name = f"correlation_backward{columns}_{NAMES[dtype]}"
            yield rbf_variant(name, rbf._correlation_backward_kernel, dtype, dict(COMPUTE=compute) | sizes, sizes["num_warps"])


def rbf_variant(name, kernel, dtype, flags, num_warps):
    compute = "fp64" if dtype == torch.float64 else "fp32"
    pointer = dict.fromkeys(("sx_ptr", "sy_ptr", "tx_ptr", "ty_ptr", "x_ptr", "y_ptr"), NAMES[dtype])
    doubles = ["loss_ptr", "center_ptr"] + ["part_ptr"] * (kernel is rbf._pairs_kernel)
    pointer |= dict.fromkeys(doubles, "fp64") | {"mark_ptr": "i32"}
    signature, constants = {}, {}
    for argument in kernel.arg_names:
        if argument in flags:
            signature[argument], constants[argument] = "constexpr", flags[argument]
        elif argument.endswith("_ptr"):
            signature[argument] = "*" + pointer.get(argument, compute)
        else:
            signature[argument] = "fp32" if argument.endswith(("_hi", "_lo")) else "i64" if argument.startswith("g_") else "i32"
    return name, kernel, signature, constants, num_warps


def compile_part(part: int, parts: int, targets: list[str], out: Path) -> None:
    for target in targets:
        gpu = gpu_target(target)
        for name, kernel, signature, constants, num_warps in variants(gpu)[part::parts]:
            attributes = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(signature) if a.endswith("_ptr")}
            options = kl.compile_options(num_warps, gpu.backend == "cuda")
            compiled = triton.compile(ASTSource(kernel, signature, constants, attributes), target=gpu, options=options)
            if "cubin" in compiled.asm:
                (out / target / f"{name}.cubin").write_bytes(compiled.asm["cubin"])


def variants(target: GPUTarget) -> list:
    return [*kl_variants(), rescale_variant(), rescale_rows_variant(), *attention_variants(), *rbf_variants(), *svd_variants(target)]


def main() -> None:
    targets, out = sys.argv[1].split(","), Path(sys.argv[2])
    for target in targets:
        (out / target).mkdir(parents=True, exist_ok=True)
    parts = min(4, os.cpu_count() or 1)
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=compile_part, args=(part, parts, targets, out)) for part in range(parts)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        sys.exit("a variant did not compile")
    for target in targets:
        print(*[f"{target} {name}" for name, *_ in variants(gpu_target(target))], sep="\n")


if __name__ == "__main__":
    main()
