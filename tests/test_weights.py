"""Weights in files as other people's scripts leave them: prefixes, wrappers, what lies beside them, and what is said where they do not fit."""

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


def _loads(stored, tmp_path, network=None):
    torch.save(stored, tmp_path / "w.pth")
    return load_weights(network or TinyCNN(4), tmp_path / "w.pth")


def _same(network, state):
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    "prefix",
    ["_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "module.model.", "net.", "student.", "module.student.", "model.student."],
)
def test_prefixes(state, tmp_path, prefix):
    named = {prefix + name: value for name, value in state.items()}
    _same(_loads(named, tmp_path), state)
    if "student" in prefix:  # the same names twice
        teacher = {(prefix + name).replace("student", "teacher"): torch.zeros_like(value) for name, value in state.items()}
        for key in ("model", "state_dict"):
            _same(_loads({key: teacher | named, "epoch": 3}, tmp_path), state)


def test_names_in_the_middle(state, tmp_path):
    """A layer that was compiled by itself, in the file, in the network, in both."""
    inside = {name.replace("block2.", "block2._orig_mod."): value for name, value in state.items()}
    _same(_loads(inside, tmp_path), state)
    for stored in (inside, state):
        network = TinyCNN(4)
        network.block2 = torch.compile(network.block2, backend="eager")
        _loads(stored, tmp_path, network)
        assert torch.equal(network.state_dict()["block2._orig_mod.0.weight"], state["block2.0.weight"])


class Holder(nn.Module):
    """A network whose parts have the names that wrappers use."""

    def __init__(self):
        super().__init__()
        self.student, self.module, self.model = nn.Linear(2, 2), nn.Linear(2, 3), nn.Linear(3, 3)


def test_a_network_with_parts_of_those_names(tmp_path):
    network = Holder()
    own = network.state_dict()
    for prefix in ("", "module.", "student.", "_orig_mod."):
        loaded = _loads({prefix + name: value for name, value in own.items()}, tmp_path, Holder())
        _same(loaded, own)
    with pytest.raises(ValueError, match=r"student.weight is \[5, 5\] in the file and \[2, 2\] in the network"):
        _loads(own | {"student.weight": torch.zeros(5, 5)}, tmp_path, Holder())


def test_plain_values_beside_the_weights(state, tmp_path):
    beside = {"opt": argparse.Namespace(lr=0.1, model="tiny"), "best_acc": numpy.float64(0.5), "count": numpy.int64(3), "seen": numpy.float32(1)}
    for key in ("model", "state_dict", "net", "network", "student", "model_state_dict", "any_other"):
        _same(_loads(beside | {key: state}, tmp_path), state)
    with pytest.raises(ValueError, match=r"contains several state dicts, under \['first', 'second'\]"):
        _loads({"first": state, "second": state}, tmp_path)
    with pytest.raises(ValueError, match=r"no state dict .* but a dict of 'epoch', 'lr'"):
        _loads({"epoch": 3, "lr": 0.1}, tmp_path)
    with pytest.raises(ValueError, match=r"no state dict .* but list"):
        _loads([state], tmp_path)


class Options:
    pass


@pytest.mark.parametrize("zipped", [True, False])
def test_classes_in_the_file_are_named(state, tmp_path, zipped):
    for stored in ({"model": state, "options": Options()}, TinyCNN(4)):
        torch.save(stored, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match=r"objects of .*(Options|TinyCNN).* could run arbitrary code") as caught:
            load_weights(TinyCNN(4), tmp_path / "w.pth")
        assert "\x1b" not in str(caught.value)
        assert "\n" not in str(caught.value)


def test_files_without_the_count_of_batches(state, tmp_path):
    old = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    assert len(old) < len(state)
    for prefix in ("", "module.", "student."):
        loaded = _loads({prefix + name: value for name, value in old.items()}, tmp_path).state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in old.items())


def test_what_does_not_fit_is_shown_side_by_side(state, tmp_path):
    network = TinyCNN(4)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(ValueError, match=r"only in the file: other.block1.0.weight, .*; only in the network: block1.0.weight, "):
        _loads({"other." + name: value for name, value in state.items()}, tmp_path, network)
    with pytest.raises(ValueError, match=r"only in the file: nothing; only in the network: fc.weight, fc.bias"):
        _loads({name: value for name, value in state.items() if not name.startswith("fc")}, tmp_path, network)
    with pytest.raises(ValueError, match=r"only in the file: ema.decay; only in the network: nothing"):
        _loads(state | {"ema.decay": torch.zeros(())}, tmp_path, network)
    _same(network, before)


def test_files_that_are_none(tmp_path, state):
    from safetensors.torch import save_file

    (tmp_path / "empty.pth").touch()
    with pytest.raises(ValueError, match="cannot be read as weights"):
        read_weights(tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="is a folder"):
        read_weights(tmp_path)
    save_file(state, tmp_path / "w.safetensors")
    whole = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is incomplete"):
        read_weights(tmp_path / "w.safetensors")
    torch.save({"model": state}, tmp_path / "w.pth")
    whole = (tmp_path / "w.pth").read_bytes()
    (tmp_path / "w.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot be read as weights"):
        read_weights(tmp_path / "w.pth")


def test_layers_without_sizes_take_those_of_the_file(tmp_path):
    lazy, sized = nn.Sequential(nn.LazyLinear(3)), nn.Sequential(nn.Linear(5, 3))
    _loads(sized.state_dict(), tmp_path, lazy)
    x = torch.randn(2, 5)
    assert torch.equal(lazy(x), sized(x))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.student, self.teacher = TinyCNN(4), nn.Linear(10, 10)


def test_one_student_is_taken_off_and_no_more(tmp_path):
    """A student with parts of its own called student and teacher, in a checkpoint."""
    pair = Pair()
    stored = {"state_dict": {f"student.{name}": value for name, value in pair.state_dict().items()}}
    _same(_loads(stored, tmp_path, Pair()), pair.state_dict())
    with pytest.raises(ValueError, match=r"does not fit TinyCNN: only in the file: student.block1.0.weight"):
        _loads(stored, tmp_path)


def test_two_tensors_of_one_name_are_refused(state, tmp_path):
    for prefix in ("_orig_mod.", "module._orig_mod."):
        twice = {prefix.replace("_orig_mod.", "") + k: v for k, v in state.items()} | {prefix + k: v for k, v in state.items()}
        with pytest.raises(ValueError, match="contains two tensors for"):
            _loads(twice, tmp_path)


def test_tensors_that_cannot_be_taken_change_nothing(state, tmp_path):
    network = TinyCNN(4)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    for bad, message in (
        (state["fc.weight"].to_sparse(), "fc.weight is not a dense tensor"),
        (state["fc.weight"].to("meta"), "fc.weight is not a dense tensor"),
        (state["fc.weight"].int(), "fc.weight is torch.int32 in the file and torch.float32 in the network"),
        (state["fc.weight"].to(torch.complex64), "fc.weight is torch.complex64"),
    ):
        with pytest.raises(ValueError, match=message):
            _loads(state | {"fc.weight": bad}, tmp_path, network)
        _same(network, before)
    _loads({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, tmp_path, network)
