"""Training of several networks that teach each other: FFL, deep mutual learning, ONE, DualNet."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..models.shared_layers import SharedLayers
from ..models.taps import FeatureTaps
from ..nn.online import ffl_ramp
from ..ops import checks
from .checks import check_weights
from .network_checks import check_not_shared, check_sizes
from .self_distiller import SelfDistiller, feature_map_shape


class NetworkOutputs(NamedTuple):
    """What the networks compute; the lists begin with the student."""

    outputs: list[object]  # as the networks returned them
    logits: list[Tensor]
    joint: Tensor | None  # logits of the head, if there is one


class HeadInputs(NamedTuple):
    """What a head gets that joins the networks; the lists begin with the student."""

    logits: list[Tensor]
    maps: list[Tensor]  # [B, C_i, H_i, W_i] each, of the tapped layers
    stem: Tensor | None  # input of the first layer that is not shared
    size: tuple[int, int]  # of the images


class OnlineBranches(nn.Module):
    """The networks besides the student, and a head that joins all networks.

    Args:
        peers: the other networks.
        taps: name of the tapped layer of each peer, or ``None``.
        head: module that maps :class:`HeadInputs` to joint logits; or ``None``.
        shared: the layers that the peers share with the student.
    """

    def __init__(self, peers: Sequence[nn.Module], taps: Sequence[str | None], head: nn.Module | None, shared: SharedLayers | None):
        super().__init__()
        self.peers = nn.ModuleList(peers)
        self.taps = [FeatureTaps(peer, [] if name is None else [name]) for peer, name in zip(peers, taps, strict=True)]
        self.head, self.shared = head, shared

    def forward(
        self,
        image: Tensor,  # [B, C, H, W]
        logits: Tensor,  # of the student
        features: Iterable[Tensor],  # the tapped feature map of the student, if one is tapped
        recorded: dict[str, list],  # outputs of the shared layers
        logits_of: Callable[[object], Tensor],  # returns the logits in a network's output
    ) -> tuple[list[object], Tensor | None]:
        """Return the outputs of the peers, and the joint logits."""
        outputs: list[object] = []
        all_logits, maps = [logits], list(features)
        for peer, taps in zip(self.peers, self.taps, strict=True):
            with contextlib.nullcontext() if self.shared is None else self.shared.replayed(peer, recorded):
                output, tapped = taps(image)
            outputs.append(output)
            all_logits.append(logits_of(output))
            maps.extend(tapped.values())
        if self.head is None:
            return outputs, None
        stem = recorded[""][0] if recorded else None
        return outputs, self.head(HeadInputs(all_logits, maps, stem, (image.shape[2], image.shape[3])))


class OnlineDistiller(SelfDistiller):
    """Base class of methods that train the student together with other networks.

    Validation evaluates the student, each other network (``val/accuracy_peer_1``, ...) and the mean
    of all logits (``val/accuracy_ensemble``); and the joint logits, if the method has them.

    Args:
        student: the first network; maps images [B, C, H, W] to logits in the shape of ``task``.
        peers: the other networks, with logits of the same shape.
        split: name of a layer, if the networks have one architecture and share the layers before
            this layer. The shared layers are those of the student, and run once.
        student_tap, peer_taps: name of the layer with the feature map of the student, and of each
            peer; by default the peers' are named as the student's.
        image_shape: see :class:`SelfDistiller`.
        **options: the other arguments of :class:`Distiller`. There is no teacher.
    """

    min_taps = 0
    needs: tuple[str, ...] = ()  # of "split" and "student_tap", those that cannot be None
    joint_suffix: str | None = None  # of the metrics of the joint logits, if the method has a head

    def __init__(
        self,
        student: nn.Module,
        peers: list[nn.Module],
        split: str | None = None,
        student_tap: str | None = None,
        peer_taps: list[str] | None = None,
        image_shape: Sequence[int] | None = None,
        **options,
    ):
        networks = list(peers) if isinstance(peers, (list, tuple, nn.ModuleList)) else [peers]
        if not networks or not all(isinstance(peer, nn.Module) for peer in networks):
            raise TypeError(f"peers must be a list of at least one nn.Module, got {[type(peer).__name__ for peer in networks]}")
        for i, peer in enumerate(networks, 1):
            for j, other in enumerate((student, *networks[: i - 1])):
                check_not_shared(other, peer, ("student" if j == 0 else f"peer {j}", f"peer {i}"))
            check_sizes(f"peer {i}", peer)
        for option, layer in (("split", split), ("student_tap", student_tap)):
            if not (layer is None and option not in self.needs) and not isinstance(layer, str):
                raise TypeError(f"{option} must be the name of a layer, got {layer!r}")
        taps: list[str | None] = [student_tap] * len(networks)
        if peer_taps is not None:
            if student_tap is None or isinstance(peer_taps, str) or len(peer_taps) != len(networks):
                raise ValueError(f"peer_taps must be the name of one layer for each of the {len(networks)} peers, got {peer_taps!r}")
            taps = list(peer_taps)
        for peer, name in zip(networks, taps, strict=True):
            FeatureTaps(peer, [] if name is None else [name])  # check the name
        super().__init__(student, () if student_tap is None else (student_tap,), None, **options)
        self.new_peers, self.peer_taps, self.split = networks, taps, split  # the peers become branches
        if image_shape is not None:
            self.build_branches(image_shape)

    def new_head(self, shapes: list[tuple[int, ...]], logits: Tensor, shared: SharedLayers | None) -> nn.Module | None:
        """Return the module that joins the networks.

        Args:
            shapes: [C, H, W] of the tapped feature map of each network, or of none.
            logits: of the student.
            shared: the shared layers.
        """
        return None

    def new_branches(self, image: Tensor) -> nn.Module:
        image = torch.randn_like(image)
        shared = None if self.split is None else SharedLayers(self.student, self.split, image)
        logits, features = self.student_outputs({"image": image})
        shapes = [feature_map_shape(name, feature, "student_tap") for name, feature in features.items()]
        for i, (peer, name) in enumerate(zip(self.new_peers, self.peer_taps, strict=True), 1):
            peer.to(image.device, image.dtype)
            mode = peer.training
            output, features = FeatureTaps(peer.eval(), [] if name is None else [name])(image)
            peer.train(mode)
            found = self.task.logits(output)
            if found.shape != logits.shape:
                raise ValueError(f"peer {i} ({type(peer).__name__}) has logits {list(found.shape)}, and the student {list(logits.shape)}")
            shapes += [feature_map_shape(tap, feature, "peer_taps") for tap, feature in features.items()]
        head = self.new_head(shapes, logits, shared)
        if shared is not None:
            for peer in self.new_peers:
                shared.replace_layers(peer)
        return OnlineBranches(self.new_peers, self.peer_taps, head, shared)

    def run_networks(self, image: Tensor) -> NetworkOutputs:
        """Run all networks."""
        branches = cast(OnlineBranches, self.branches)
        if branches.shared is None:
            recorded: dict[str, list] = {}
            logits, features = self.student_outputs({"image": image})
        else:
            with branches.shared.recorded(self.student) as recorded:
                logits, features = self.student_outputs({"image": image})
        outputs, joint = branches(image, logits, features.values(), recorded, self.task.logits)
        return NetworkOutputs([self._output_with(logits), *outputs], [logits, *(self.task.logits(output) for output in outputs)], joint)

    def all_label_losses(self, outputs: NetworkOutputs, batch: dict) -> dict[str, Tensor]:
        """Return the losses of all networks on the labels."""
        losses = self.label_losses(outputs.logits[0], batch)
        for i, (output, logits) in enumerate(zip(outputs.outputs[1:], outputs.logits[1:], strict=True), 1):
            losses[f"cross_entropy_peer_{i}"] = self.task.label_loss(logits, batch)
            for name, value in self.task.output_losses(output, batch).items():
                losses[f"{name}_peer_{i}"] = value
        if outputs.joint is not None:
            losses[f"cross_entropy{self.joint_suffix}"] = self.task.label_loss(outputs.joint, batch)
        return losses

    def divergences(
        self, pairs: tuple[Sequence[Tensor], Sequence[Tensor]], temperature: float, batch: dict, *, detached: bool = True, target_eps: float = 0.0
    ) -> Tensor:
        """Return the sum of T^2 KL(target || learner) over pairs, by one call with stacked rows.

        Args:
            pairs: logits that learn, and the logits that each of them learns from.
            temperature: T.
            batch: its labels determine the ignored rows.
            detached: whether the targets are constants.
            target_eps: number added to each target probability.
        """
        learners, targets = (torch.cat(list(logits)) for logits in pairs)
        count = len(pairs[0])
        rows = {"image": batch["image"]}  # only the labels determine which rows are ignored
        if "label" in batch and self.task.mask(batch) is not None:
            rows["label"] = batch["label"].repeat(count, *[1] * (batch["label"].dim() - 1))
        target = targets.detach() if detached else targets
        return count * self.task.divergence(learners, target, temperature, rows, target_eps=target_eps)

    def predictions(self, image: Tensor) -> dict[str, Any]:
        outputs = self.run_networks(image)
        peers = {f"_peer_{i}": output for i, output in enumerate(outputs.outputs[1:], 1)}
        joint = {} if self.joint_suffix is None else {self.joint_suffix: outputs.joint}
        return {"": outputs.logits[0], **peers, "_ensemble": torch.stack(outputs.logits).mean(0), **joint}

    def prediction_names(self) -> list[str]:
        joint = [] if self.joint_suffix is None else [self.joint_suffix]
        return ["", *(f"_peer_{i}" for i in range(1, len(self.peer_taps) + 1)), "_ensemble", *joint]

    def check_unlabelled(self) -> None:
        raise ValueError(f"{type(self).__name__} trains its networks on labels, and the first training batch has none")


def check_online_options(temperature: float, alpha: float, ramp_epochs: int) -> None:
    """Raise TypeError or ValueError if an option is out of range."""
    check_weights(alpha=alpha)
    checks.positive("temperature", temperature)
    ffl_ramp(0, ramp_epochs)  # validate the option
