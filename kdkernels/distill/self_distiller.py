"""The base class of methods without a teacher, which train modules besides the student."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..data.keyed_random import bits
from ..models.weights import CHECKPOINT_KEY
from .base import Distiller
from .network_checks import unchanged

MakeBranches = Callable[[dict[str, tuple[int, ...]], Tensor], nn.Module]


class SelfDistiller(Distiller):
    """Base class of self-distillation: trains ``branches``, modules that read the student's layers.

    The branches, such as classifiers of inner layers, are trained and saved in checkpoints, but
    they are no part of the student: an exported student is the plain network.

    The sizes of the branches are known after one run of the student. This is done in the
    constructor if ``image_shape`` is given, else when training begins, with the shape that the data
    module gives.

    Args:
        student: maps images [B, C, H, W] to logits in the shape of ``task``.
        student_taps: names of at least two layers, from the front to the back, whose outputs are
            feature maps [B, C, H, W].
        make_branches: function of the shapes [C, H, W] of the tapped feature maps, by the names of
            their layers, and of the student's logits for two images, that returns new branches. It
            raises ValueError if the shapes do not suit the method. ``None`` if the subclass
            overrides :meth:`new_branches`.
        image_shape: [C, H, W], if the data module does not give it.
        **options: the other arguments of :class:`Distiller`. There is no teacher.
    """

    min_taps = 2

    def __init__(
        self,
        student: nn.Module,
        student_taps: Iterable[str],
        make_branches: MakeBranches | None,
        image_shape: Sequence[int] | None = None,
        **options,
    ):
        super().__init__(student, student_taps=student_taps, **options)
        if self.teachers:
            raise ValueError(f"{type(self).__name__} has no teacher: the network is its own teacher; got teacher={type(self.teacher).__name__}")
        if len(self.student_taps.names) < self.min_taps:
            raise ValueError(f"student_taps must name at least {self.min_taps} layers, from the front to the back, got {self.student_taps.names}")
        self.make_branches = make_branches
        self.branches: nn.Module | None = None
        self._branches_shape: list[int] | None = None  # of the images for which the branches were built
        if image_shape is not None:
            self.build_branches(image_shape)

    def build_branches(self, image_shape: Sequence[int]) -> None:
        """Construct the branches for images [C, H, W], unless they exist.

        Raises:
            ValueError: the student cannot process such images, or a tapped layer has no feature map
                [B, C, H, W] of a suitable size.
        """
        if self.branches is not None:
            return
        sides = list(image_shape) if isinstance(image_shape, Sequence) and not isinstance(image_shape, str) else [image_shape]
        if len(sides) != 3 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sides):
            raise ValueError(f"image_shape must be [C, H, W], three integers >= 1, got {image_shape!r}")
        parameter = next(self.student.parameters(), torch.empty(0))
        image = torch.zeros(2, *image_shape, device=parameter.device, dtype=parameter.dtype)
        with unchanged(self.student), torch.no_grad(), torch.random.fork_rng(devices=()):
            self.student.eval()
            torch.manual_seed(int(bits(torch.initial_seed() & 0x7FFFFFFFFFFFFFFF, 1)) & 0x7FFFFFFFFFFFFFFF)
            try:
                branches = self.new_branches(image)
            except (RuntimeError, IndexError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                kind = type(self.student).__name__
                raise ValueError(
                    f"the student ({kind}) cannot process images of image_shape {sides}, or its branches do not suit them: {error}"
                ) from error
        self.branches = branches.to(parameter.device, parameter.dtype)
        self._branches_shape = sides

    def new_branches(self, image: Tensor) -> nn.Module:
        """Return the branches for images [2, C, H, W]; the student is in eval mode."""
        logits, features = self.student_outputs({"image": image})
        return cast(MakeBranches, self.make_branches)({name: feature_map_shape(name, feature) for name, feature in features.items()}, logits)

    def trained_modules(self) -> dict[str, nn.Module]:
        branches: dict[str, nn.Module] = {} if self.branches is None else {"branches": self.branches}
        return super().trained_modules() | branches

    def build_modules(self, data: Any) -> None:
        shape = getattr(data, "image_shape", None)
        if shape is not None and self.branches is None:
            self.build_branches(shape)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        shape: Sequence[int] | None = getattr(cast(Any, self.trainer).datamodule, "image_shape", None)
        if self.branches is not None:
            if shape is not None and self._branches_shape is not None and list(shape) != self._branches_shape:
                raise ValueError(f"image_shape is {self._branches_shape}, but the data have images {list(shape)}: leave image_shape out")
            return
        if shape is None:
            raise ValueError(f"{type(self).__name__} needs image_shape=[C, H, W], because the data do not give it")
        self.check_not_copied("image_shape")
        self.build_branches(shape)

    def restore_modules(self, image_shape: list[int], weights: dict[str, Tensor]) -> None:
        self.build_branches(image_shape)
        cast(nn.Module, self.branches).load_state_dict(
            {name.removeprefix("branches."): value for name, value in weights.items() if name.startswith("branches.")}
        )

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        super().on_load_checkpoint(checkpoint)
        shape = checkpoint.get(CHECKPOINT_KEY, {}).get("image_shape")
        if shape is not None:
            self.build_branches(shape)


def feature_map_shape(name: str, feature: object, argument: str = "student_taps") -> tuple[int, ...]:
    """Return the shape [C, H, W] of the output of a tapped layer.

    Raises:
        ValueError: it is not a feature map [B, C, H, W].
    """
    if not isinstance(feature, Tensor) or feature.dim() != 4:
        shape = list(feature.shape) if isinstance(feature, Tensor) else type(feature).__name__
        raise ValueError(f"{argument}: the output of layer {name!r} must be a feature map [B, C, H, W], got {shape}")
    return tuple(feature.shape[1:])
