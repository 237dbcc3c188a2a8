"""kdkernels.patch, on packages that the tests write. `make test-peers` patches the real ones."""

import importlib
import sys

import pytest
import torch

import kdkernels
from kdkernels import compat

FILES = {
    "torchdistill/__init__.py": "",
    "torchdistill/registry.py": "LOSSES = {}\n",
    "torchdistill/losses/__init__.py": "from .mid_level import KDLoss\n",
    "torchdistill/losses/mid_level.py": """
from ..registry import LOSSES
class KDLoss: pass
class ATLoss: pass
class FSPLoss: pass
LOSSES |= {x.__name__: x for x in (KDLoss, ATLoss, FSPLoss)}
""",
    "trl/__init__.py": "",
    "trl/experimental/__init__.py": "",
    "trl/experimental/gkd/__init__.py": "",
    "trl/experimental/gkd/gkd_trainer.py": """
class GKDTrainer:
    @staticmethod
    def generalized_jsd_loss(student_logits, teacher_logits):
        return "their own"
    def loss(self, x):
        return self.generalized_jsd_loss(x, x)
""",
}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return a function that makes a distribution of a version importable."""
    before = set(sys.modules)

    def install(distribution, version, files=FILES):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        metadata = tmp_path / f"{distribution.replace('-', '_')}-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()

    yield install
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("torchdistill", "trl"):
            del sys.modules[name]


def test_patch_and_undo(install):
    install("torchdistill", "1.1.5")
    losses, registry = (importlib.import_module(f"torchdistill.{name}") for name in ("losses", "registry"))
    mid_level = importlib.import_module("torchdistill.losses.mid_level")
    own = dict(registry.LOSSES)
    applied = kdkernels.patch("torchdistill")
    assert mid_level.KDLoss is losses.KDLoss is registry.LOSSES["KDLoss"] is compat.torchdistill.KDLoss
    assert {name: getattr(compat.torchdistill, name) for name in own} == registry.LOSSES
    with pytest.raises(RuntimeError, match="torchdistill is patched already: undo the first patch"):
        kdkernels.patch("torchdistill")
    applied.undo()
    applied.undo()
    assert own == registry.LOSSES
    assert mid_level.KDLoss is losses.KDLoss is own["KDLoss"]
    with kdkernels.patch("torchdistill"):
        assert mid_level.ATLoss is compat.torchdistill.ATLoss
    assert mid_level.ATLoss is own["ATLoss"]
    with pytest.raises(ZeroDivisionError), kdkernels.patch("torchdistill"):
        raise ZeroDivisionError
    assert mid_level.ATLoss is own["ATLoss"]


def test_patch_of_a_static_method(install):
    install("trl", "1.16.0")
    trainer = importlib.import_module("trl.experimental.gkd.gkd_trainer").GKDTrainer
    with kdkernels.patch("trl"):
        assert trainer().loss(torch.randn(2, 3, 4)).item() == 0
    assert trainer().loss(None) == "their own"


def test_unknown_versions_and_packages_raise(install):
    install("torchdistill", "2.0.0")
    with pytest.raises(RuntimeError, match=r"torchdistill 2\.0\.0 is not a version whose losses were compared with ours \(1\.1\.5\)"):
        kdkernels.patch("torchdistill")
    assert "torchdistill.losses" not in sys.modules
    with pytest.raises(ValueError, match=r"target must be one of 'liger_kernel', .*, got 'torch'"):
        kdkernels.patch("torch")


def test_packages_that_cannot_be_patched(install):
    with pytest.raises(ImportError, match="trl is not installed, so that there is nothing to patch"):
        kdkernels.patch("trl")
    install("trl", "1.16.0", {"trl/__init__.py": ""})
    with pytest.raises(ImportError, match=r"No module named 'trl\.experimental'"):
        kdkernels.patch("trl")
    with pytest.raises(ImportError, match=r"No module named 'trl\.experimental'"):  # and is not "patched already"
        kdkernels.patch("trl")
