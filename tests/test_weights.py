"""Weight files of other projects: prefixes, wrappers, additional entries, and errors for weights
that do not fit.
"""

import argparse

import numpy
import pytest
import torch
from torch import nn

from kdkernels.models import TinyCNN, load_weights
from kdkernels.models.weights import read_weights


@pytest.fixture
def state():
    torch.manual_seed(3)
    network = TinyCNN(4)
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            value.uniform_(0.1, 1.0)
        assert not name.startswith(("module", "model", "student"))
    return network.state_dict()


def _save_and_load(stored, tmp_path, network=None):
    torch.save(stored, tmp_path / "w.pth")
    return load_weights(network or TinyCNN(4), tmp_path / "w.pth")


def _assert_same(network, state):
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    "prefix",
    ["_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "module.model.", "net.", "student.", "module.student.", "model.student."],
)
def test_prefixes_are_removed(state, tmp_path, prefix):
    named = {prefix + name: value for name, value in state.items()}
    _assert_same(_save_and_load(named, tmp_path), state)
    if "student" in prefix:  # a teacher with the same names
        teacher = {(prefix + name).replace("student", "teacher"): torch.zeros_like(value) for name, value in state.items()}
        for key in ("model", "state_dict"):
            _assert_same(_save_and_load({key: teacher | named, "epoch": 3}, tmp_path), state)


def test_prefixes_of_compiled_layers_are_removed(state, tmp_path):
    """A single layer is compiled in the file, in the network, or in both."""
    inside = {name.replace("block2.", "block2._orig_mod."): value for name, value in state.items()}
    _assert_same(_save_and_load(inside, tmp_path), state)
    for stored in (inside, state):
        network = TinyCNN(4)
        network.block2 = torch.compile(network.block2, backend="eager")
        _save_and_load(stored, tmp_path, network)
        assert torch.equal(network.state_dict()["block2._orig_mod.0.weight"], state["block2.0.weight"])


class WrapperNames(nn.Module):
    """A network whose submodules have the names that wrappers use as prefixes."""

    def __init__(self):
        super().__init__()
        self.student, self.module, self.model = nn.Linear(2, 2), nn.Linear(2, 3), nn.Linear(3, 3)


def test_network_whose_submodules_are_named_like_wrappers(tmp_path):
    network = WrapperNames()
    expected = network.state_dict()
    for prefix in ("", "module.", "student.", "_orig_mod."):
        loaded = _save_and_load({prefix + name: value for name, value in expected.items()}, tmp_path, WrapperNames())
        _assert_same(loaded, expected)
    with pytest.raises(ValueError, match=r"student.weight is \[5, 5\] in the file and \[2, 2\] in the network"):
        _save_and_load(expected | {"student.weight": torch.zeros(5, 5)}, tmp_path, WrapperNames())


def test_additional_entries_are_ignored(state, tmp_path):
    entries = {"opt": argparse.Namespace(lr=0.1, model="tiny"), "best_acc": numpy.float64(0.5), "count": numpy.int64(3), "seen": numpy.float32(1)}
    for key in ("model", "state_dict", "net", "network", "student", "model_state_dict", "any_other"):
        _assert_same(_save_and_load(entries | {key: state}, tmp_path), state)
    with pytest.raises(ValueError, match=r"contains several state dicts, under \['first', 'second'\]"):
        _save_and_load({"first": state, "second": state}, tmp_path)
    with pytest.raises(ValueError, match=r"no state dict .* but a dict of 'epoch', 'lr'"):
        _save_and_load({"epoch": 3, "lr": 0.1}, tmp_path)
    with pytest.raises(ValueError, match=r"no state dict .* but list"):
        _save_and_load([state], tmp_path)


class Options:
    pass


@pytest.mark.parametrize("zipped", [True, False])
def test_error_names_the_classes_in_the_file(state, tmp_path, zipped):
    for stored in ({"model": state, "options": Options()}, TinyCNN(4)):
        torch.save(stored, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match=r"objects of .*(Options|TinyCNN).* could run arbitrary code") as caught:
            load_weights(TinyCNN(4), tmp_path / "w.pth")
        assert "\x1b" not in str(caught.value)
        assert "\n" not in str(caught.value)


def test_files_without_num_batches_tracked(state, tmp_path):
    old = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    assert len(old) < len(state)
    for prefix in ("", "module.", "student."):
        loaded = _save_and_load({prefix + name: value for name, value in old.items()}, tmp_path).state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in old.items())


def test_error_lists_names_that_do_not_match(state, tmp_path):
    network = TinyCNN(4)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(ValueError, match=r"only in the file: other.block1.0.weight, .*; only in the network: block1.0.weight, "):
        _save_and_load({"other." + name: value for name, value in state.items()}, tmp_path, network)
    with pytest.raises(ValueError, match=r"only in the file: nothing; only in the network: fc.weight, fc.bias"):
        _save_and_load({name: value for name, value in state.items() if not name.startswith("fc")}, tmp_path, network)
    with pytest.raises(ValueError, match=r"only in the file: ema.decay; only in the network: nothing"):
        _save_and_load(state | {"ema.decay": torch.zeros(())}, tmp_path, network)
    _assert_same(network, before)


def test_unreadable_files_raise(tmp_path, state):
    from safetensors.torch import save_file

    (tmp_path / "empty.pth").touch()
    with pytest.raises(ValueError, match="cannot be read as weights"):
        read_weights(tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="is a folder"):
        read_weights(tmp_path)
    save_file(state, tmp_path / "w.safetensors")
    content = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="is incomplete"):
        read_weights(tmp_path / "w.safetensors")
    torch.save({"model": state}, tmp_path / "w.pth")
    content = (tmp_path / "w.pth").read_bytes()
    (tmp_path / "w.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cannot be read as weights"):
        read_weights(tmp_path / "w.pth")


def test_lazy_layers_take_their_sizes_from_the_file(tmp_path):
    lazy, sized = nn.Sequential(nn.LazyLinear(3)), nn.Sequential(nn.Linear(5, 3))
    _save_and_load(sized.state_dict(), tmp_path, lazy)
    x = torch.randn(2, 5)
    assert torch.equal(lazy(x), sized(x))


class StudentAndTeacher(nn.Module):
    def __init__(self):
        super().__init__()
        self.student, self.teacher = TinyCNN(4), nn.Linear(10, 10)


def test_only_one_student_prefix_is_removed(tmp_path):
    """A checkpoint of a student that has submodules named student and teacher."""
    network = StudentAndTeacher()
    stored = {"state_dict": {f"student.{name}": value for name, value in network.state_dict().items()}}
    _assert_same(_save_and_load(stored, tmp_path, StudentAndTeacher()), network.state_dict())
    with pytest.raises(ValueError, match=r"does not fit TinyCNN: only in the file: student.block1.0.weight"):
        _save_and_load(stored, tmp_path)


def test_two_tensors_with_the_same_name_raise(state, tmp_path):
    for prefix in ("_orig_mod.", "module._orig_mod."):
        twice = {prefix.replace("_orig_mod.", "") + k: v for k, v in state.items()} | {prefix + k: v for k, v in state.items()}
        with pytest.raises(ValueError, match="contains two tensors for"):
            _save_and_load(twice, tmp_path)


def test_unsupported_tensors_raise_and_do_not_change_the_network(state, tmp_path):
    network = TinyCNN(4)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    for bad, message in (
        (state["fc.weight"].to_sparse(), "fc.weight is not a dense tensor"),
        (state["fc.weight"].to("meta"), "fc.weight is not a dense tensor"),
        (state["fc.weight"].int(), "fc.weight is torch.int32 in the file and torch.float32 in the network"),
        (state["fc.weight"].to(torch.complex64), "fc.weight is torch.complex64"),
    ):
        with pytest.raises(ValueError, match=message):
            _save_and_load(state | {"fc.weight": bad}, tmp_path, network)
        _assert_same(network, before)
    _save_and_load({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, tmp_path, network)
