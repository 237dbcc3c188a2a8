"""The model of the GPU kernels: small known answers, and the page that is made from it.

No compiler and no GPU is needed: the facts of the compiled kernels are in benches/gpu_kernels.json.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from benches import gpu_compile, gpu_device, gpu_page, gpu_predictions, gpu_profile, gpu_sass  # noqa: E402
from benches.gpu_device import DEVICES, START, Device, Kernel, PartFacts, Work, predict  # noqa: E402
from benches.gpu_inputs import CASES, Part  # noqa: E402

# Round numbers: 1 TB/s, 1 GHz, 100 multiprocessors.
SIMPLE = Device("simple", "sm_90", 100, 1e9, 1e12 / gpu_device.SHARE_OF_BANDWIDTH, 1 << 20, 128, 64, 1000, 100, 100 << 10, 96 << 10)


def test_occupancy():
    """Registers, threads and shared memory limit the blocks of a multiprocessor."""

    def blocks(threads, registers, shared=0, dynamic=0):
        return Kernel("k", threads, registers, 0, shared, {}).resident_blocks(SIMPLE, dynamic)

    assert blocks(32, 16) == 32  # the largest number of blocks
    assert blocks(256, 16) == 8  # 64 warps
    assert blocks(256, 128) == 2  # 128 registers x 256 threads x 2 = 65,536
    assert blocks(256, 129) == 1  # registers are allocated in steps of 8 for a thread
    assert blocks(32, 80) == 25
    assert blocks(128, 32, shared=19 << 10) == 5  # (19 + 1) KiB of 100
    assert blocks(128, 32, dynamic=97 << 10) == 0  # a block may have 96 KiB


def test_little_law():
    """1 TB/s x 700 ns = 700,000 bytes, 7,000 of them on each of 100 multiprocessors."""
    assert SIMPLE.bytes_in_flight_needed == pytest.approx(7000)
    kernel = Kernel("k", 128, 32, 0, 0, {})
    work = Work(blocks=200, memory_bytes=2e6, load_bytes=1e6, bytes_in_flight=1750)
    prediction = predict(kernel, work, SIMPLE)
    assert prediction.bytes_in_flight == 3500  # two blocks
    assert not prediction.fills_memory
    assert prediction.limits["bytes"] == pytest.approx(2e-6)
    assert prediction.limits["bytes in flight"] == pytest.approx(2e-6)  # 1 MB at half of the bandwidth


@pytest.mark.parametrize(
    ("work", "limit", "seconds"),
    [
        (dict(memory_bytes=1e9), "bytes", 1e-3),
        (dict(instructions={"other": 4e8}), "issue", 1e-3),  # 4 x 100 x 1e9 a second
        (dict(instructions={"alu": 4e8}), "ALU", 2e-3),  # 64 lanes
        (dict(instructions={"mufu": 1e8}), "MUFU", 2e-3),  # 16 lanes
        (dict(instructions={"fp64": 4e8}), "FP64", 2e-3),
        (dict(tf32_products=1e12), "tensor cores", 1e-2),
        (dict(block_cycles=1e6), "chain", 2e-3),  # 6,400 blocks, 32 at a time on each of 100 multiprocessors
        (dict(block_cycles=10), "launch", 20e-9),
        (dict(idle=True, memory_bytes=1e9), "launch", 0.0),
    ],
)
def test_longest_limit_decides(work, limit, seconds):
    prediction = predict(Kernel("k", 32, 16, 0, 0, {}), Work(blocks=6400, **work), SIMPLE)
    assert prediction.binds == limit
    assert prediction.seconds == pytest.approx(START + seconds)


SASS = """
	.section	.text._Z6kernelv,"ax",@progbits
_Z6kernelv:
	//## File "/x/kernel.cu", line 3
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   IMAD.WIDE R2, R0, 0x4, R4 ;
.L_x_1:
	//## File "/x/kernel.cu", line 5
        /*0020*/                   LDG.E.128 R8, desc[UR4][R2.64] ;
        /*0030*/                   LDG.E.64 R12, desc[UR4][R2.64+0x10] ;
        /*0040*/               @P1 BRA `(.L_x_2) ;
        /*0050*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div) ;
.L_x_2:
        /*0060*/                   FFMA R16, R8, R12, R16 ;
        /*0070*/                   LDG.E R17, desc[UR4][R2.64+0x20] ;
        /*0080*/                   MUFU.EX2 R18, R16 ;
        /*0090*/                   STG.E.64 desc[UR4][R2.64], R18 ;
        /*00a0*/                   ISETP.GE.AND P0, PT, R0, R20, PT ;
        /*00b0*/              @!P0 BRA `(.L_x_1) ;
        /*00c0*/                   EXIT ;
"""


def test_machine_code():
    """Loops, units, widths of loads, and bytes in flight before the first use."""
    (function,) = gpu_sass.parse(SASS)["_Z6kernelv"]
    outside, loop = gpu_sass.segments_of(function)
    assert outside.instructions == {"fma": 1, "other": 2}
    assert (loop.depth, loop.innermost, loop.line) == (1, True, "/x/kernel.cu:5")
    assert loop.instructions == {"alu": 1, "fma": 1, "global load": 3, "global store": 1, "mufu": 1, "other": 2}  # without the call
    assert loop.loads == {4: 1, 8: 1, 16: 1}
    assert (loop.load_bytes, loop.store_bytes, loop.exponentials) == (28, 8, 1)
    # The load of 4 bytes is not used, and still in flight with the two of the next iteration.
    assert loop.bytes_in_flight == 28
    assert loop.load_rounds == 1
    # From load to load: 36 cycles for FFMA to wait, 4 for MUFU, 20 for the store, and the rest.
    assert loop.chain_cycles == 36 + 4 + 20 + 5 + 3


def test_registers_of_an_instruction():
    def registers(text):
        instruction = gpu_sass.parse_instruction(f"        /*0000*/ {text} ;")
        return sorted(instruction.writes), sorted(instruction.reads)

    assert registers("FFMA R1, R2, -R3, R4") == (["R1"], ["R2", "R3", "R4"])
    assert registers("DFMA R2, R4, R6, R8") == (["R2", "R3"], ["R4", "R5", "R6", "R7", "R8", "R9"])
    assert registers("@!P2 LDS.128 R4, [R9+0x10]") == (["R4", "R5", "R6", "R7"], ["P2", "R9"])
    assert registers("STG.E.64 desc[UR4][R2.64], R6") == ([], ["R2", "R3", "R6", "R7", "UR4"])
    assert registers("ISETP.GE.AND P0, PT, R0, UR5, P3") == (["P0"], ["P3", "R0", "UR5"])
    assert registers("LOP3.LUT P1, R3, R4, 0x1, RZ, 0xc0, !PT") == (["P1", "R3"], ["R4"])
    assert gpu_sass.parse_instruction("// no instruction") is None


def test_part_of_a_kernel():
    """A part is divided by its number of repetitions, and a part that is missing is an error."""
    (function,) = gpu_sass.parse(SASS)["_Z6kernelv"]
    segments = [("stage", segment) for segment in gpu_sass.segments_of(function)]
    part = gpu_compile._select(Part("loop", "stage", "load_bytes", "global load"), segments, "k<float>")
    assert part.instructions["global load"] == 1
    assert part.exponentials == pytest.approx(1 / 3)
    with pytest.raises(SystemExit, match="has no loop for the part 'loop' in other"):
        gpu_compile._select(Part("loop", "other", "load_bytes"), segments, "k<float>")
    assert PartFacts(loads={"16": 2, "4": 1}, instructions={"fma": 1}).load_bytes == 36


def test_kernels_agree_with_the_budget_of_registers():
    """After a change to the CUDA kernels, both files are written again; see CONTRIBUTING.md."""
    budget = json.loads((ROOT / "tests" / "cuda_budget.json").read_text())
    for target, kernels in budget.items():
        found = {key: kernel["registers"] for key, kernel in gpu_predictions.facts()["targets"][target]["kernels"].items() if not key.startswith("_")}
        assert found == {key: kernel["registers"] for key, kernel in kernels.items()}


@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda device: device.name)
def test_every_case_has_a_prediction(device):
    for case in CASES:
        found = gpu_predictions.launches(case, device)
        assert found
        for launch in found:
            assert launch.prediction.resident_blocks > 0, launch.kernel.name
            assert START <= launch.prediction.seconds < 0.01, (case.name, launch.kernel.name)
        assert gpu_predictions.total(case, device) >= gpu_predictions.total(case, device, "forward") > 0


def test_faster_gpu_is_not_slower():
    """An H200 is an H100 with a faster memory."""
    for case in CASES:
        assert gpu_predictions.total(case, DEVICES["H200"]) <= gpu_predictions.total(case, DEVICES["H100 SXM"]) * 1.0001


def test_page_is_up_to_date():
    run = subprocess.run([sys.executable, "-m", "benches.gpu_model", "--check"], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr


def test_measured_columns_have_only_measured_numbers():
    """Each measured number of the page is in profile.json."""
    text = (ROOT / "benches" / "results" / "nvidia-h100-80gb-hbm3" / "profile.json").read_text()
    numbers = {time for row in json.loads(text)["rows"] for time in row["kernels"].values()}
    compared = gpu_predictions.measured_kernels()
    assert len(compared) > 60
    assert {c.measured for c in compared} <= numbers


@pytest.mark.parametrize("case", [c for c in CASES if c.implementation == "cuda" or c.kind not in ("svd", "align")], ids=lambda c: c.name)
def test_calls_that_are_profiled(case):
    """On small tensors on the CPU; the calls themselves are those of a training step."""
    import testing_ops  # noqa: F401  registers the CUDA kernels for CPU tensors

    sizes = {"svd": (3, 20, 18, 2), "align": (3, 20, 8, 4)}.get(case.kind) or tuple(min(size, 6) for size in case.shape)
    gradients = gpu_profile.call_of(replace(case, shape=sizes), "cpu")()
    assert gradients
    for gradient in gradients:
        assert gradient.isfinite().all()
        assert gradient.any()


def test_names_of_profiled_kernels():
    long = "void kdkernels::truncated_svd::gpu::(anonymous namespace)::forward_kernel<float, 256>(kdkernels::truncated_svd::gpu::Group<int>, long)"
    assert gpu_profile._short(long) == "forward_kernel<float, 256>"
    name = "void kdkernels::temperature_kl::gpu::(anonymous namespace)::long_rows_kernel<kdkernels::temperature_kl::gpu::BFloat16, 512>(int)"
    assert gpu_profile._short(name) == "long_rows_kernel<BFloat16, 512>"
    assert gpu_profile._short("_pool_kernel") == "_pool_kernel"


def _bench_row(op, cell, direction, seconds, **others):
    return {"extra_info": {"op": op, "cell": cell, "direction": direction, "seconds": {"fused": seconds}, "ratios": {}, **others}}


def test_measured_times_beside_predicted_ones(tmp_path):
    rows = [
        _bench_row("temperature_kl", "65536 x 1000", "forward + backward", 300e-6, gpu="NVIDIA H200", replayed={"fused": 280e-6}),
        _bench_row("temperature_kl", "65536 x 1000", "forward", 200e-6),  # without a gradient: not predicted
        _bench_row("truncated_svd", "1024 x 64, k = 4", "forward", 400e-6, replayed={"fused": "failed"}),
        _bench_row("temperature_kl", "3 x 5", "forward + backward", 1e-6),
        _bench_row("attention_pool", "128 x 64 x 32 x 32", "forward + backward", 1e-6, sweep="batch"),
    ]
    file = tmp_path / "bench.json"
    file.write_text(json.dumps({"machine_info": {}, "datetime": "", "benchmarks": rows}))
    run = subprocess.run([sys.executable, "-m", "benches.gpu_model", "--measured", str(file)], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert "on the H200" in lines[0]
    (kl,) = [line for line in lines if line.startswith("temperature_kl")]
    (svd,) = [line for line in lines if line.startswith("truncated_svd")]
    predicted = gpu_predictions.total(gpu_predictions._case("temperature_kl", "65536 x 1000"), DEVICES["H200"])
    assert f"300.0     280.0     {predicted * 1e6:.1f}" in kl
    assert f"{280e-6 / predicted:.2f}" in kl
    assert "400.0     -" in svd
    assert "forward_kernel<float, 256>  chain" in svd
    file.write_text(json.dumps({"machine_info": {}, "datetime": "", "benchmarks": rows[3:4]}))
    result = json.loads(file.read_text())
    assert gpu_predictions.measured_beside_predicted(result).splitlines()[-1] == "No row of this result has a prediction."
    assert "This result has no GPU." in gpu_predictions.measured_beside_predicted(result)
    missing = subprocess.run([sys.executable, "-m", "benches.gpu_model", "--measured", "none.json"], capture_output=True, text=True, cwd=ROOT)
    assert missing.returncode == 1
    assert "none.json cannot be read" in missing.stderr


def test_devices_by_name():
    assert gpu_predictions.device_named("NVIDIA H100 80GB HBM3") is DEVICES["H100 SXM"]
    assert gpu_predictions.device_named("NVIDIA A100-SXM4-80GB") is DEVICES["A100 80GB"]
    assert gpu_predictions.device_named("NVIDIA L4") is None


def test_page_lists_every_kernel_that_cannot_fill_the_memory_system():
    text = gpu_page.page()
    for case, kernel, shares in gpu_page.unfilled():
        assert min(shares.values()) < 1
        assert f"| {case} | `{kernel}` |" in text
