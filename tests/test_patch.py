"""kdkernels.patch, on packages that the tests write. `make test-peers` patches the real ones."""

import importlib
import sys
import threading

import pytest
import torch

import kdkernels
from kdkernels import compat
from kdkernels.compat import patching

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
        if name.split(".")[0] in ("distiller_zoo", "torchdistill", "trl"):
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
    with pytest.raises(ValueError, match=r"target must be one of 'distiller_zoo', .*, got 'torch'"):
        kdkernels.patch("torch")


def test_packages_that_cannot_be_patched(install):
    with pytest.raises(ImportError, match="trl is not installed, so that there is nothing to patch"):
        kdkernels.patch("trl")
    install("trl", "1.16.0", {"trl/__init__.py": ""})
    with pytest.raises(ImportError, match=r"No module named 'trl\.experimental'"):
        kdkernels.patch("trl")
    with pytest.raises(ImportError, match=r"No module named 'trl\.experimental'"):  # and is not "patched already"
        kdkernels.patch("trl")


ZOO = {
    "distiller_zoo/__init__.py": "from .KD import DistillKL\nfrom . import AT, FSP, KDSVD\n",
    "distiller_zoo/KD.py": "class DistillKL:\n    '''KL'''\n    def __init__(self, T): self.T = T  # temperature\n",
    "distiller_zoo/AT.py": "class Attention: pass\n",
    "distiller_zoo/FSP.py": "class FSP: pass\n",
    "distiller_zoo/KDSVD.py": "class KDSVD: pass\n",
}


def test_repository_is_known_by_the_source_of_its_losses(install, monkeypatch):
    target = patching._TARGETS["distiller_zoo"]
    with pytest.raises(ImportError, match=r"distiller_zoo\.AT\.Attention of RepDistiller cannot be imported"):
        kdkernels.patch("distiller_zoo")
    install("unrelated", "1.0", ZOO)
    zoo = importlib.import_module("distiller_zoo")
    with pytest.raises(RuntimeError, match=r"distiller_zoo\.AT\.Attention has another source than the one of RepDistiller"):
        kdkernels.patch("distiller_zoo")
    sources = {(module, name): patching.source_hash(getattr(importlib.import_module(module), name)) for module, name in target.replacements}
    monkeypatch.setitem(patching._TARGETS, "distiller_zoo", target._replace(sources=sources))
    own = zoo.DistillKL
    with kdkernels.patch("distiller_zoo"):
        assert zoo.DistillKL is zoo.KD.DistillKL is compat.repdistiller.DistillKL
    assert zoo.DistillKL is zoo.KD.DistillKL is own


def test_hash_of_a_source_does_not_depend_on_its_layout(tmp_path, monkeypatch):
    texts = {
        "plain": "def f(x):\n    return x * 'a'\n",
        "formatted": '# comment\ndef f( x ):\n\n  """Doc."""\n  return (\n    x * \'a\')  # comment\n'.replace("(\n    x * 'a')", "x*'a'"),
        "other": "def f(x):\n    return x * 'b'\n",
        "nested": "def f(x):\n    if x:\n        return x * 'a'\n",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}_layout.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    hashes = {name: patching.source_hash(importlib.import_module(f"{name}_layout").f) for name in texts}
    assert hashes["plain"] == hashes["formatted"]
    assert len(set(hashes.values())) == 3
    assert patching.source_hash(3) == ""


def test_second_undo_does_not_end_a_later_patch(install):
    install("torchdistill", "1.1.5")
    mid_level = importlib.import_module("torchdistill.losses.mid_level")
    own = mid_level.KDLoss
    first = kdkernels.patch("torchdistill")
    first.undo()
    second = kdkernels.patch("torchdistill")
    first.undo()
    with pytest.raises(RuntimeError, match="is patched already"):
        kdkernels.patch("torchdistill")
    with pytest.raises(RuntimeError, match=r"this patch of torchdistill was undone"), first:
        pass
    second.undo()
    assert mid_level.KDLoss is own


def test_undo_keeps_what_was_assigned_during_the_patch(install):
    install("torchdistill", "1.1.5")
    mid_level = importlib.import_module("torchdistill.losses.mid_level")
    with kdkernels.patch("torchdistill"):
        mid_level.KDLoss = "the user's"
    assert mid_level.KDLoss == "the user's"
    with pytest.raises(TypeError, match="target must be the name of a package, got list"):
        kdkernels.patch(["torchdistill"])


def test_patches_of_several_threads_leave_nothing_behind(install):
    install("torchdistill", "1.1.5")
    mid_level, registry = (importlib.import_module(f"torchdistill.{name}") for name in ("losses.mid_level", "registry"))
    own = dict(registry.LOSSES)

    def work():
        for _ in range(50):
            try:
                with kdkernels.patch("torchdistill"):
                    pass
            except RuntimeError:  # another thread has patched it
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert own == registry.LOSSES
    assert mid_level.KDLoss is own["KDLoss"]
