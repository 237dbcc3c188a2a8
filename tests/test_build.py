"""The modules that setup.py builds, with shell scripts in place of CUDA toolkits and compilers.

Also the status that show_config prints.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from cuda_sources import BUDGET, TARGETS

import cuda_toolkit
from kdkernels import config
from kdkernels.ops import truncated_svd_implementations as implementations

ROOT = Path(__file__).parent.parent
NVCC_12_6 = (50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86, 87, 89, 90)
NVCC_13_0 = (75, 80, 86, 87, 88, 89, 90, 100, 110, 103, 120, 121)
TORCH = ("2.14.1+cu130", "13.0")


def make_toolkit(home: Path, version="13.0", targets=NVCC_13_0, headers=True, top: Path | None = None) -> Path:
    """Create a toolkit folder with a script that imitates nvcc."""
    (home / "bin").mkdir(parents=True)
    if headers:
        (home / "include").mkdir()
        (home / "include" / "cuda_runtime.h").touch()
    script = home / "bin" / "nvcc"
    script.write_text(
        f"""#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release {version}, V{version}.88" ;;
  --list-gpu-arch) printf '%s\\n' {" ".join(f"compute_{t}" for t in targets)} ;;
  --dryrun) echo '#$ _HERE_={top or home}/bin' >&2; echo '#$ TOP={top or home}/bin/..' >&2 ;;
  *) exit 1 ;;
esac
"""
    )
    script.chmod(0o755)
    return home


def make_plan(tmp_path, torch_versions=TORCH, gpus=(), path="/nowhere", **environment):
    return cuda_toolkit.plan(
        *torch_versions, {"PATH": f"{path}", **{k: str(v) for k, v in environment.items()}}, lambda: list(gpus), str(tmp_path / "local")
    )


@pytest.mark.parametrize("name", ["CUDA_HOME", "CUDA_PATH"])
def test_toolkit_from_environment_variable(tmp_path, name):
    home = make_toolkit(tmp_path / "toolkit")
    plan = make_plan(tmp_path, **{name: home})
    assert (plan.home, plan.architectures, plan.reason) == (str(home), ("8.0", "9.0", "10.0+PTX"), "")


def test_nvcc_outside_its_toolkit(tmp_path):
    """nvcc may be a wrapper or a link on PATH: the toolkit is the folder that nvcc --dryrun prints,
    not the parent folder of the script.
    """
    home = make_toolkit(tmp_path / "toolkit")
    wrapper = make_toolkit(tmp_path / "usr", headers=False, top=home)
    assert make_plan(tmp_path, path=wrapper / "bin").home == str(home)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "nvcc").symlink_to(home / "bin" / "nvcc")
    assert make_plan(tmp_path, path=tmp_path / "links").home == str(home)


def test_headers_next_to_nvcc_instead_of_in_top(tmp_path):
    """The layout of Linux distributions: /usr/bin/nvcc, /usr/include/cuda_runtime.h, and TOP is
    another folder.
    """
    library = make_toolkit(tmp_path / "usr" / "lib" / "cuda", headers=False)
    home = make_toolkit(tmp_path / "usr2", top=library)
    assert make_plan(tmp_path, path=home / "bin").home == str(home)


def test_toolkits_in_default_folders(tmp_path):
    make_toolkit(tmp_path / "local" / "cuda", version="12.6", targets=NVCC_12_6)
    plan = make_plan(tmp_path)
    assert not plan.architectures
    assert "is CUDA 12.6, not CUDA 13" in plan.reason
    home = make_toolkit(tmp_path / "local" / "cuda-13.0")
    plan = make_plan(tmp_path)
    assert plan.home == str(home)
    assert any("is CUDA 12.6, not CUDA 13" in note for note in plan.notes)


def test_toolkit_of_another_major_version_is_not_used(tmp_path):
    old = make_toolkit(tmp_path / "old", version="12.6", targets=NVCC_12_6)
    plan = make_plan(tmp_path, CUDA_HOME=old)
    assert (plan.architectures, plan.home) == ((), "")
    assert plan.reason == (
        f"torch 2.14.1+cu130 needs a CUDA 13 toolkit with bin/nvcc and include/cuda_runtime.h, but {old} (found through CUDA_HOME) is CUDA 12.6, "
        "not CUDA 13: install one or set CUDA_HOME to it, then build kdkernels again"
    )
    # The same major version is enough, and a matching toolkit later in the search is used.
    assert make_plan(tmp_path, ("2.10.0+cu128", "12.8"), CUDA_HOME=old).home == str(old)
    home = make_toolkit(tmp_path / "new")
    assert make_plan(tmp_path, CUDA_HOME=old, path=home / "bin").home == str(home)


def test_cuda_home_without_compiler(tmp_path):
    """CUDA_HOME names a folder without a compiler, as in runtime images."""
    (tmp_path / "runtime" / "lib64").mkdir(parents=True)
    plan = make_plan(tmp_path, CUDA_HOME=tmp_path / "runtime")
    assert not plan.architectures
    assert f"{tmp_path}/runtime/bin/nvcc does not exist (found through CUDA_HOME)" in plan.reason


def test_toolkit_without_headers(tmp_path):
    home = make_toolkit(tmp_path / "toolkit", headers=False)
    plan = make_plan(tmp_path, path=home / "bin")
    assert not plan.architectures
    assert f"{home} has no include/cuda_runtime.h (found through PATH)" in plan.reason


def test_no_nvcc(tmp_path):
    assert "no nvcc was found through CUDA_HOME, CUDA_PATH, PATH" in make_plan(tmp_path).reason


@pytest.mark.parametrize("content", ["#!/bin/sh\nexit 3\n", "#!/no/such/interpreter\n", "not a program"])
def test_nvcc_that_cannot_be_run(tmp_path, content):
    home = make_toolkit(tmp_path / "toolkit")
    (home / "bin" / "nvcc").write_text(content)
    plan = make_plan(tmp_path, CUDA_HOME=home)
    assert not plan.architectures
    assert f"{home}/bin/nvcc" in plan.reason


def test_torch_without_cuda(tmp_path):
    home = make_toolkit(tmp_path / "toolkit")
    plan = make_plan(tmp_path, ("2.13.0+cpu", None), CUDA_HOME=home)
    assert plan.reason == "torch 2.13.0+cpu has no CUDA: install a CUDA build of torch, then build kdkernels again"
    assert "every op runs in Triton" in make_plan(tmp_path, ("2.13.0+rocm7.0", None), CUDA_HOME=home).reason


def test_kdkernels_cuda_variable(tmp_path):
    home = make_toolkit(tmp_path / "toolkit")
    assert "KDKERNELS_CUDA=0 was set" in make_plan(tmp_path, CUDA_HOME=home, KDKERNELS_CUDA="0").reason
    assert make_plan(tmp_path, CUDA_HOME=home, KDKERNELS_CUDA="1").architectures
    with pytest.raises(ValueError, match=r"KDKERNELS_CUDA must be 0 .*, 1 .* or unset, got 'yes'"):
        make_plan(tmp_path, CUDA_HOME=home, KDKERNELS_CUDA="yes")


@pytest.mark.parametrize(
    ("asked", "targets", "version", "built", "left_out"),
    [
        ("", NVCC_13_0, "13.0", "8.0;9.0;10.0+PTX", []),
        ("", NVCC_12_6, "12.6", "8.0;9.0+PTX", []),
        (" ", (90, 100, 120), "14.0", "9.0;10.0+PTX", []),
        ("7.5;8.0", NVCC_13_0, "13.0", "8.0", ["7.5 is left out"]),
        ("7.0 7.5+PTX 8.6+PTX", NVCC_13_0, "13.0", "8.6+PTX", ["7.0 is left out", "7.5 is left out"]),
        ("8.0;12.0+PTX", NVCC_12_6, "12.6", "8.0", ["12.0 is left out, because nvcc 12.6"]),
        ("9.0a", NVCC_13_0, "13.0", "9.0a", []),
        ("9.0a", (*NVCC_12_6, "90a"), "12.6", "9.0a", []),
        ("8.0a;10.0f;12.0a+PTX", NVCC_13_0, "13.0", "10.0f;12.0a+PTX", ["8.0a is left out"]),
        ("10.0f;10.0a", (90, 100), "12.8", "10.0a", ["10.0f is left out"]),
        ("Ampere", NVCC_13_0, "13.0", "8.0;8.6+PTX", []),
        ("Turing;Ampere+Tegra,Hopper", NVCC_13_0, "13.0", "8.7;9.0+PTX", ["7.5 is left out"]),
        ("Blackwell", (90, 100, 120), "12.8", "10.0;12.0", ["10.3 is left out", "12.1 is left out"]),
        ("8.6;8.6+PTX;8.6;", NVCC_13_0, "13.0", "8.6+PTX", []),
        ("native", NVCC_13_0, "13.0", "8.9;12.0", []),
    ],
)
def test_requested_architectures(tmp_path, asked, targets, version, built, left_out):
    home = make_toolkit(tmp_path / "toolkit", version, targets)
    plan = make_plan(tmp_path, ("2.14.1", version), gpus=[(12, 0), (8, 9), (12, 0)], CUDA_HOME=home, TORCH_CUDA_ARCH_LIST=asked)
    assert (";".join(plan.architectures), plan.reason) == (built, "")
    lines = [note for note in plan.notes if "is left out" in note]
    assert len(lines) == len(left_out)
    assert all(line.startswith(start) for line, start in zip(lines, left_out, strict=True))


def test_no_supported_architecture(tmp_path):
    home = make_toolkit(tmp_path / "toolkit")
    plan = make_plan(tmp_path, CUDA_HOME=home, TORCH_CUDA_ARCH_LIST="7.0;Turing")
    assert not plan.architectures
    assert "7.0 is left out" in plan.reason
    assert plan.reason.endswith("build kdkernels again with TORCH_CUDA_ARCH_LIST='8.0;9.0;10.0+PTX'")


@pytest.mark.parametrize("asked", ["8,6", "sm_80", "8.6+ptx", "Amper", "all"])
def test_invalid_architecture_raises(tmp_path, asked):
    home = make_toolkit(tmp_path / "toolkit")
    with pytest.raises(ValueError, match=r"TORCH_CUDA_ARCH_LIST has .* expected entries such as 8.6, 9.0a, 10.0\+PTX or Ampere"):
        make_plan(tmp_path, CUDA_HOME=home, TORCH_CUDA_ARCH_LIST=asked)


def test_native_without_a_gpu(tmp_path):
    plan = make_plan(tmp_path, CUDA_HOME=make_toolkit(tmp_path / "toolkit"), TORCH_CUDA_ARCH_LIST="native")
    assert plan.architectures == ("8.0", "9.0", "10.0+PTX")
    assert any("no GPU is visible" in note for note in plan.notes)


def test_flags_of_nvcc():
    assert cuda_toolkit.Plan(("8.0", "9.0a", "10.0+PTX")).nvcc_flags() == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]


def test_budget_has_the_default_architectures():
    assert list(json.loads(BUDGET.read_text())) == list(TARGETS) == [f"sm_{a.replace('.', '')}" for a in cuda_toolkit.ARCHITECTURES]


def test_names_of_gpu_generations_match_torch():
    """Compare with torch's table, read from its source.

    It may have fewer names, but must map each to the same architectures.
    """
    import ast
    import inspect

    from torch.utils import cpp_extension

    tree = ast.parse(inspect.getsource(cpp_extension._get_cuda_arch_flags))
    table = next(n.value.args[0] for n in ast.walk(tree) if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "named_arches")
    torch_generations = dict(ast.literal_eval(table))
    assert len(torch_generations) >= 14
    assert {name: cuda_toolkit.GENERATIONS.get(name) for name in torch_generations} == torch_generations


# Runs setup.py once for each toolkit and environment, all in one process, with a torch that
# pretends to be a CUDA build.
SETUP = """
import json, os, runpy, sys, torch, cuda_toolkit
torch.version.cuda = "13.0"
sys.argv = ["setup.py", "--version"]
find, results = cuda_toolkit.find_toolkit, []
for environment, fault, text in json.loads(sys.stdin.read()):
    os.environ.update(environment)
    cuda_toolkit.find_toolkit = (lambda *_, fault=fault: (None, [fault])) if fault else find
    try:
        names = runpy.run_path("setup.py")
        modules = {m.name: m for m in names["extensions"]()}
        first = next(iter(modules.values()))
        results.append({"modules": list(modules), "home": os.environ.get("CUDA_HOME"), "literal": names["c_string"](text),
            "defines": dict(modules["kdkernels._C"].define_macros), "flags": first.extra_compile_args})
    except SystemExit as error:
        results.append({"error": str(error)})
    for name in (*environment, "CUDA_HOME"):
        os.environ.pop(name, None)
print(json.dumps(results))
"""
SETTINGS = ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "KDKERNELS_CUDA", "KDKERNELS_ISAS", "KDKERNELS_TESTING", "KDKERNELS_PIN_TORCH")
SPECIAL_CHARACTERS = "C:\\x 'a' \"b\" $HOME; $(echo) `c`"


def without_settings() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in SETTINGS}


@pytest.fixture(scope="module")
def setups(tmp_path_factory):
    folder = tmp_path_factory.mktemp("setup")
    home = make_toolkit(folder / "toolkit")
    wrapper = make_toolkit(folder / "usr", headers=False, top=home)
    fault = "/opt/cuda is CUDA 11.8, not CUDA 13"
    runs = [
        ({"TORCH_CUDA_ARCH_LIST": "7.5;8.6+PTX"}, "", SPECIAL_CHARACTERS),
        ({"KDKERNELS_CUDA": ""}, fault, ""),
        ({"KDKERNELS_CUDA": "1"}, fault, ""),
        ({"KDKERNELS_CUDA": "yes"}, fault, ""),
        ({"KDKERNELS_TESTING": "1", "KDKERNELS_ISAS": "baseline"}, "", ""),
    ]
    environment = without_settings() | {"PATH": f"{wrapper}/bin:{os.environ['PATH']}"}
    run = subprocess.run([sys.executable, "-c", SETUP], input=json.dumps(runs), capture_output=True, text=True, cwd=ROOT, env=environment)
    assert run.returncode == 0, run.stderr
    *printed, results = run.stdout.splitlines()
    return str(home), printed, json.loads(results)


def test_setup_builds_the_cuda_module_first(setups):
    home, printed, (built, *_) = setups
    assert built["modules"][0] == "kdkernels._cuda"
    assert "kdkernels._C" in built["modules"]
    assert built["home"] == home
    flags = [flag for flag in built["flags"]["nvcc"] if "arch" in flag]
    assert flags == ["-gencode=arch=compute_86,code=sm_86", "-gencode=arch=compute_86,code=compute_86"]
    assert built["defines"]["KDKERNELS_CUDA_ARCHS"] == '"8.6+PTX"'
    assert built["defines"]["KDKERNELS_WITHOUT_CUDA"] == '""'
    assert "kdkernels: 7.5 is left out, because the CUDA kernels need compute capability 8.0 or later" in printed


def test_setup_without_a_toolkit(setups):
    """Without KDKERNELS_CUDA the other modules are built and the reason is recorded.

    With KDKERNELS_CUDA=1 setup.py stops with a one-line error.
    """
    _, printed, (_, without, required, wrong, _) = setups
    assert "kdkernels._C" in without["modules"]
    assert "kdkernels._cuda" not in without["modules"]
    assert "/opt/cuda is CUDA 11.8, not CUDA 13" in without["defines"]["KDKERNELS_WITHOUT_CUDA"]
    assert any(line.startswith("kdkernels: the CUDA kernels are not built: torch") for line in printed)
    assert required["error"].startswith("KDKERNELS_CUDA=1 needs a CUDA build of torch and nvcc: torch")
    assert wrong["error"].startswith("KDKERNELS_CUDA must be 0")


def test_only_test_builds_have_testing_modules(setups):
    *_, testing = setups[2]
    assert {"kdkernels._testing", "kdkernels._testing_baseline"} <= set(testing["modules"])
    assert not [name for result in setups[2][:2] for name in result["modules"] if "_testing" in name]


# Replaces the compiler and the linker: writes empty output files.
FAKE_COMPILER = """#!/bin/sh
while [ $# -gt 0 ]; do
  case "$1" in
    -o | -MF) : > "$2"; shift ;;
  esac
  shift
done
"""


@pytest.mark.skipif(shutil.which("ninja") is None, reason="ninja is not on PATH")
def test_files_of_a_wheel(tmp_path):
    """Build a wheel with a compiler that writes empty files.

    It contains every module that kdkernels loads, and no module that only tests use. With
    KDKERNELS_PIN_TORCH=1 it requires the minor release of torch that it was built against.
    """
    source = tmp_path / "source"
    for folder in ("csrc", "kdkernels", "python_ref", "benches"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__", "results", "reference", "benches"))
    for name in ("setup.py", "cuda_toolkit.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    compiler = tmp_path / "compiler"
    compiler.write_text(FAKE_COMPILER)
    compiler.chmod(0o755)
    tools = {name: str(compiler) for name in ("CC", "CXX", "LDSHARED", "LDCXXSHARED")}
    settings = {"KDKERNELS_CUDA": "0", "KDKERNELS_PIN_TORCH": "1", "TORCH_DONT_CHECK_COMPILER_ABI": "1"}
    environment = without_settings() | tools | settings
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", str(tmp_path)]
    run = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    (wheel,) = tmp_path.glob("*.whl")
    files = zipfile.ZipFile(wheel).namelist()
    (metadata,) = (zipfile.ZipFile(wheel).read(name).decode().splitlines() for name in files if name.endswith("/METADATA"))
    pinned = f"torch=={'.'.join(torch.__version__.split('.')[:2])}.*"
    assert [line for line in metadata if line.startswith("Requires-Dist: ") and "extra" not in line] == [
        f"Requires-Dist: {pinned}",
        "Requires-Dist: numpy",
    ]
    modules = {Path(name).name.partition(".")[0] for name in files if name.endswith(".so")}
    assert {"_C", "_cpu_baseline"} <= modules
    assert all(module == "_C" or module.startswith("_cpu_") for module in modules)
    assert "kdkernels/reference/__init__.py" in files
    assert not [name for name in files if "_testing" in name or name.startswith(("csrc", "tests"))]


@pytest.mark.skipif(shutil.which("ninja") is None, reason="ninja is not on PATH")
def test_compiler_receives_the_reason_unchanged(setups, tmp_path):
    """Quotes, semicolons, dollar signs and spaces in the reason pass through ninja and the shell
    unchanged.
    """
    define = shlex.quote(f"-DTEXT={setups[2][0]['literal']}")
    (tmp_path / "main.cpp").write_text("#include <cstdio>\nint main() { std::fputs(TEXT, stdout); }\n")
    (tmp_path / "build.ninja").write_text(f"rule c\n  command = g++ $flags main.cpp -o main\nbuild main: c main.cpp\n  flags = {define}\n")
    subprocess.run(["ninja", "-C", str(tmp_path)], check=True, capture_output=True)
    assert subprocess.run([tmp_path / "main"], capture_output=True, text=True).stdout == SPECIAL_CHARACTERS


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((8, 0), "8.0;9.0;10.0+PTX", True),
        ((8, 6), "8.0;9.0;10.0+PTX", True),
        ((8, 9), "8.0;9.0;10.0+PTX", True),
        ((9, 0), "8.0;9.0;10.0+PTX", True),
        ((10, 3), "8.0;9.0;10.0+PTX", True),
        ((12, 0), "8.0;9.0;10.0+PTX", True),
        ((7, 5), "8.0;9.0;10.0+PTX", False),
        ((12, 0), "8.0;9.0;10.0", False),
        ((8, 0), "8.6+PTX", False),
        ((8, 9), "8.6", True),
        ((9, 0), "8.6", False),
        ((9, 0), "8.6+PTX", True),
        ((9, 0), "9.0a", True),
        ((10, 0), "9.0a+PTX", False),
        ((10, 3), "10.0a", False),
        ((10, 3), "10.0f", True),
        ((12, 0), "10.0f+PTX", False),
        ((12, 1), "8.0;12.0", True),
        ((9, 0), "", False),
    ],
)
def test_gpus_that_can_run_an_image(capability, architectures, runs):
    assert config.has_image(capability, architectures) is runs


def test_status_of_the_cuda_kernels():
    def status(architectures="8.0;9.0", gpus=(), torch_cuda="13.0", reason=""):
        return config.cuda_kernels_status(architectures, reason, list(gpus), torch_cuda)

    assert status("", reason="torch has no CUDA: install it") == "not built: torch has no CUDA: install it"
    assert status(torch_cuda=None).endswith("install a CUDA build of torch, then build kdkernels again")
    assert status() == "built for 8.0;9.0; torch sees no GPU: if there is one, check its driver with nvidia-smi"
    h100, rtx, t4 = ("H100", (9, 0)), ("RTX 5090", (12, 0)), ("T4", (7, 5))
    assert status(gpus=[h100, h100]) == "built for 8.0;9.0, used on H100 (9.0)"
    assert status(gpus=[h100, rtx]) == (
        "built for 8.0;9.0, which does not run on RTX 5090 (12.0), where Triton is used instead: build kdkernels again with "
        "TORCH_CUDA_ARCH_LIST='8.0;9.0;12.0'"
    )
    assert status(gpus=[t4]).endswith("(7.5), where Triton is used instead: the CUDA kernels need a GPU of compute capability 8.0 or later")


@pytest.fixture
def gpu(monkeypatch):
    """Return a function that simulates a GPU of a compute capability, and CUDA kernels built for
    some architectures.
    """

    def set_up(capability, architectures):
        info = config._C.build_info() | {"cuda_archs": architectures}
        monkeypatch.setattr(config, "_C", type("Built", (), {"build_info": staticmethod(lambda: info)}))
        monkeypatch.setattr(config, "HAS_CUDA_KERNELS", bool(architectures))
        monkeypatch.setattr(implementations, "HAS_CUDA_KERNELS", bool(architectures))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(implementations, "_fits_cuda", lambda x, k: True)
        monkeypatch.setattr(implementations.importlib.util, "find_spec", lambda name: object())
        config.cuda_kernels_run_on.cache_clear()

    yield set_up
    config.cuda_kernels_run_on.cache_clear()


def test_gpu_without_an_image_uses_triton(gpu):
    x, eps = torch.ones(2, 5, 4), 1e-6
    forward, backward = (x, 2, "max_abs", False, eps, True), (None, None, x, x, x, torch.ones(2, 4), x, x, eps)
    for capability, architectures, name in [
        ((8, 9), "8.0;9.0", "cuda"),
        ((12, 0), "8.0;9.0", "triton"),
        ((12, 0), "9.0+PTX", "cuda"),
        ((9, 0), "", "triton"),
    ]:
        gpu(capability, architectures)
        assert implementations.fastest("truncated_svd", forward) == name
        assert implementations.fastest("truncated_svd_backward", backward) == name
        assert implementations.fastest("align_singular_vectors", (x, x, None, True)) == name
        assert implementations._cuda_runs([x, x]) == (name == "cuda")


def test_python_versions_agree():
    """Wheels are built for the same versions in pyproject.toml and in the workflow, from the oldest
    one that requires-python allows. The classifiers are the versions that were tested.
    """
    project = (ROOT / "pyproject.toml").read_text()
    built = re.findall(r'"cp3(\d+)-\*"', project)
    assert f'requires-python = ">=3.{built[0]}"' in project
    assert f"python: [{', '.join(f'cp3{minor}' for minor in built)}]\n" in (ROOT / ".github" / "workflows" / "wheels.yml").read_text()
    classifiers = re.findall(r"Programming Language :: Python :: 3\.(\d+)", project)
    assert classifiers
    assert set(classifiers) <= set(built)


def test_old_setuptools_is_a_one_line_error(tmp_path):
    (tmp_path / "setuptools.py").write_text("__version__ = '65.5.0'\ndef setup(**_):\n    raise AssertionError('was called')\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run([sys.executable, "setup.py", "--version"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert run.stderr.strip() == "kdkernels is built with setuptools 77 or later, found 65.5.0: pip install 'setuptools>=77'"
