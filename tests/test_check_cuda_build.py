"""The checks of tests/check_cuda_build.py, on output of cuobjdump that is written here.

`make cuda-check` runs them on a real build.
"""

import json

import check_cuda_build as check
from cuda_sources import BUDGET

MANGLED = "_ZN9kdkernels13truncated_svd3gpu12_GLOBAL__N__1{}EvNS1_5GroupINS1_14ForwardProblemEEEl"
FORWARD, UPDATE = (MANGLED.format(name) for name in ("14forward_kernelIfLi256EE", "13update_kernelIdE"))
UPDATE = "_ZN9kdkernels13truncated_svd3gpu12_GLOBAL__N__113update_kernelIdEEvNS1_5GroupINS1_15BackwardProblemEEE"


def _symbols(architecture: str, *kernels: str) -> str:
    lines = [f"STT_FUNC         STB_LOCAL  STO_ENTRY      {kernel}" for kernel in kernels]
    helper = "STT_FUNC         STB_WEAK   STV_DEFAULT    $__internal_0_$__cuda_sm20_div_s64"
    return "\n".join(
        ["Fatbin elf code:", "================", f"arch = {architecture}", "identifier = kernels.cu", "", "symbols:", *lines, helper, ""]
    )


def test_kernels_in_the_output_of_cuobjdump():
    """The images of several source files for one architecture count together."""
    dump = _symbols("sm_80", FORWARD) + _symbols("sm_90", FORWARD) + _symbols("sm_80", UPDATE)
    assert check.kernels_by_architecture(dump) == {
        "sm_80": {"forward_kernel<float, 256>", "update_kernel<double>"},
        "sm_90": {"forward_kernel<float, 256>"},
    }
    ptx = f"Fatbin ptx code:\n================\narch = sm_100\n\n.visible .entry {UPDATE}(\n.entry {FORWARD}(\n"
    assert check.kernels_by_architecture(ptx) == {"sm_100": {"forward_kernel<float, 256>", "update_kernel<double>"}}


def test_missing_images_are_problems():
    both = {"forward_kernel<float, 256>", "update_kernel<double>"}
    complete = {"sm_90": both, "sm_100": both}
    assert check.image_problems(["9.0", "10.0+PTX"], complete, {"sm_100": both}, both) == []
    assert check.image_problems(["9.0", "10.0+PTX"], complete, {}, both) == ["there is no PTX for sm_100; there is some for no architecture"]
    assert check.image_problems(["8.0"], complete, {}, both) == ["there is no machine code for sm_80; there is some for sm_100, sm_90"]
    found = {"sm_90": both - {"update_kernel<double>"}}
    assert check.image_problems(["9.0"], found, {}, both) == ["the machine code for sm_90 lacks the kernels update_kernel<double>"]


def test_ops_and_kernels_of_the_sources():
    assert check.registered_ops() == sorted(check.registered_ops())
    assert {"truncated_svd_cuda", "align_singular_vectors_backward_cuda"} <= set(check.registered_ops())
    assert check.kernel_templates() == {"forward_kernel", "solve_kernel", "update_kernel", "align_kernel", "long_rows_kernel"}
    for kernels in json.loads(BUDGET.read_text()).values():
        assert {name.partition("<")[0] for name in kernels} == check.kernel_templates()
