"""How much of each part of an image a layer keeps: entropies of the largest harmless perturbation.

X. Cheng, Z. Rao, Y. Chen, Q. Zhang. Explaining Knowledge Distillation by Quantifying the Knowledge.
CVPR 2020.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..data.image_pool import images_of
from ..data.keyed_random import bits
from ..files import replaced_atomically
from ..nn.hashing import hash_of
from ..ops import checks
from .frozen_network import FrozenNetwork, check_module
from .side_by_side import SideBySide

__all__ = ["PixelEntropy", "pixel_entropy"]

VERSION = 2  # of the format of the files
HALF_LOG_2_PI_E = 0.5 * math.log(2 * math.pi * math.e)
MIN_SIGMA, MAX_SIGMA = 1e-3, 1.0
EXTENSION = 20  # the last steps, which are made only if the first ones do not reach the target
CPU_CHUNK = 24  # noisy images at once on a thread of a CPU: their activations stay in the cache
GROWTH = 1.5  # factor of the weight in the last steps


class PixelEntropy(NamedTuple):
    """The entropies of images, and how they were found."""

    entropy: Tensor  # [N, grid, grid] float32, in nats; NaN for rejected images
    valid: Tensor  # [N] bool; False: the feature did not react to the noise, and the image is rejected
    step: Tensor  # [N] int64, the number of the chosen iterate, from 0
    feature_loss: Tensor  # [N] float32, change of the feature at this iterate, relative to feature_scale
    feature_scale: Tensor  # [N] float32, mean squared change of the feature for sigma = initial_sigma
    provenance: dict[str, Any]  # model (a hash), layer, images (a hash), feature of the first image, and the options

    def save(self, path: str | os.PathLike) -> None:
        """Write an ``.npz`` file, completely or not at all."""
        with replaced_atomically(path) as temporary, temporary.open("wb") as file:
            arrays = {name: cast(Tensor, getattr(self, name)).numpy() for name in _ARRAYS}
            cast(Any, np.savez_compressed)(file, provenance=json.dumps(self.provenance), **arrays)

    @staticmethod
    def load(path: str | os.PathLike) -> PixelEntropy:
        """Read a file that :meth:`save` has written.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a complete file of :func:`pixel_entropy`.
        """
        try:
            with np.load(path, allow_pickle=False) as stored:
                provenance = json.loads(str(stored["provenance"]))
                if provenance["version"] != VERSION:
                    raise ValueError(f"its version is {provenance['version']}, expected {VERSION}")
                return PixelEntropy(**{name: torch.from_numpy(stored[name]) for name in _ARRAYS}, provenance=provenance)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(f"{os.fspath(path)!r} is not a file of pixel_entropy: {error}") from error


_ARRAYS = ("entropy", "valid", "step", "feature_loss", "feature_scale")


def pixel_entropy(
    model: nn.Module,
    layer: str,
    images: Tensor | Dataset | Sequence,
    *,
    grid: int = 16,
    weight: float = 7.0,
    target: float = -2.8,
    initial_sigma: float = 0.01,
    lr: float = 1e-4,
    steps: int = 80,
    copies: int = 96,
    relu: bool = True,
    margin: float | None = 4.0,
    seed: int = 0,
    batch_size: int = 8,
    device: str | torch.device | None = None,
    path: str | os.PathLike | None = None,
    save_every: int = 10,
    progress: bool = True,
) -> PixelEntropy:
    r"""Entropy of the largest perturbation of each part of an image that a feature does not notice.

    Gaussian noise with the standard deviation sigma_i is added to all pixels of block i of an
    image. The entropy of the block is :math:`H_i = \log \sigma_i + \frac12 \log 2 \pi e`. SGD on
    the sigma_i minimises

    .. math:: \frac{E \| f(x') - f(x) \|^2}{\sigma_f^2} - \lambda \frac1n \sum_i H_i

    where f is the output of ``layer`` after a ReLU, both mean squared differences are means over
    the elements of the feature and over ``copies`` noisy images, and :math:`\sigma_f^2` is the
    difference for the initial sigma. A small entropy means that the layer keeps the information of
    the block.

    The iterate with the mean entropy nearest to ``target`` is returned, so that networks and layers
    are compared at equal total entropy. If none of the first ``steps - 20`` iterates exceeds
    ``target``, lambda is multiplied by 1.5 for the last 20; otherwise these are not computed.

    The noise depends on ``seed``, the number of the step, the dtype and the kind of device, and is
    the same for all images and networks. The result does not depend on ``batch_size`` beyond
    rounding, nor on the number of threads, unless the network mixes the images of a batch or is
    random in eval mode.

    If lambda, the rate or the grid are such that no iterate comes near ``target``, the nearest one
    is still returned: compare the mean of the entropies with ``target``.

    Args:
        model: a copy is run in eval mode, up to the layer; in float32 if the model is in half
            precision.
        layer: name of a layer as in ``model.named_modules()``. Its output is a tensor [B, ...].
        images: [N, C, H, W], normalised as the model expects; or a map-style dataset of images [C,
            H, W], of (image, label) or of dicts with ``image``, of floats and of one size. Images
            of a dataset are read when they are needed.
        grid: number of blocks along each side, at most H and W.
        weight: lambda; the authors use 7 for VGG and AlexNet and 6 for ResNets.
        target: mean entropy at which networks are compared, in nats.
        initial_sigma: in the units of the images.
        lr: learning rate.
        steps: number of iterates, more than 20.
        copies: number of noisy images in each step.
        relu: apply a ReLU to the feature.
        margin: an image is finished as soon as its mean entropy exceeds the target by more than
            this number of its largest steps so far. The mean entropy grows there, so that no later
            iterate is nearer to the target. ``None``: make all steps, as the authors do.
        seed: seed of the noise.
        batch_size: number of images at once; each needs the memory of ``copies`` images.
        device: by default that of the model's parameters.
        path: ``.npz`` file to write. If it exists, it is checked and returned: model (all its
            weights, and the feature of the first image), layer, images and options must be the
            same. An interrupted run is continued from the file ``path`` + ``.part``.
        save_every: number of batches after which the state is stored in this file.
        progress: show a progress bar.

    Returns:
        The entropies, in the order of the images, on the CPU.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the model has no such layer, an option is out of range, an image is smaller than
            the grid, or ``path`` or the stored state is of another model, layer, image or option.
        RuntimeError: the layer does not run.
    """
    options = _checked_options(grid, weight, target, initial_sigma, lr, steps, copies, relu, margin, seed)
    for name, value in (("batch_size", batch_size), ("save_every", save_every)):
        checks.integer(name, value)
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    check_module(model)
    total = _count(images)
    parameter = next(model.parameters(), torch.empty(0))
    where = parameter.device if device is None else torch.device(device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {str(where)!r}, but torch finds no GPU")
    target_path = None if path is None else Path(path)
    if target_path is not None and target_path.suffix != ".npz":
        raise ValueError(f"path must end in .npz, got {target_path.name!r}")
    chunk, threads = (CPU_CHUNK, torch.get_num_threads()) if where.type == "cpu" else (batch_size * copies, 1)
    network = FrozenNetwork(model, layer, where)
    search = _Search(network, where, chunk, options, threads)
    modes = torch.inference_mode(False), torch.autocast(where.type, enabled=False)  # the caller may be in others
    with modes[0], modes[1]:
        fingerprint = search.fingerprint(_read(images, [0]))
    provenance = {"version": VERSION, "model": hash_of(model), "layer": layer, "count": total, "device": where.type, **options}
    if target_path is not None and target_path.exists():
        stored = PixelEntropy.load(target_path)
        _check_same(target_path, stored.provenance, provenance)
        if stored.provenance["images"] != _joint_hash(_hashes(_read(images, [i]))[0] for i in range(total)):
            raise ValueError(f"{os.fspath(target_path)!r} was made from other images: remove it, or give another path")
        _check_same(target_path, stored.provenance, fingerprint)
        return stored
    state = _State(target_path, provenance, fingerprint, save_every)
    state.resume(images)
    with modes[0], modes[1], search.parts.open(), _bar(total, state.done, progress) as bar:
        for first in range(state.done, total, batch_size):
            batch = _read(images, range(first, min(first + batch_size, total)))
            state.add(search(batch), _hashes(batch))
            bar.update(len(batch))
    return state.finish()


class _Search:
    """The optimisation for a batch of images."""

    def __init__(self, network: FrozenNetwork, device: torch.device, chunk: int, options: dict[str, Any], threads: int = 1):
        self.network, self.device, self.dtype, self.chunk, self.options = network, device, network.dtype, chunk, options
        self.parts = SideBySide(self.losses_of_part, network, threads)

    def feature(self, network: FrozenNetwork, image: Tensor) -> Tensor:
        """Return the feature [B, ...]. The network may change the images in place."""
        output = network(image)
        return output.relu() if self.options["relu"] else output

    @torch.no_grad()
    def fingerprint(self, image: Tensor) -> dict[str, Any]:
        """Return what tells networks of equal weights and different forward passes apart."""
        feature = self.network(image.to(self.device, self.dtype, copy=True))
        return {"feature shape": list(feature.shape[1:]), "feature norm": float(feature.double().norm())}

    def noise(self, step: int, shape: Sequence[int]) -> Tensor:
        """Return standard normal numbers [copies, C, H, W] that depend on the seed and the step."""
        generator = torch.Generator(self.device)
        generator.manual_seed(int(bits(self.options["seed"], step)) & 0x7FFFFFFFFFFFFFFF)
        noise = torch.randn(self.options["copies"], *shape, generator=generator, device=self.device, dtype=self.dtype)
        return noise.contiguous(memory_format=torch.channels_last)

    def losses(self, image: Tensor, clean: Tensor, sigma: Tensor, step: int, scale: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the mean squared differences of the features, and the gradient for each pixel.

        Args:
            image: [B, C, H, W].
            clean: the features of these images [B, ...].
            sigma: [B, grid, grid].
            step: number of the noise.
            scale: divisor of the differences [B]; ``None``: without division and without gradient.

        Returns:
            [B], and the gradient with respect to the sigma of each pixel [B, H, W].
        """
        noise, copies = self.noise(step, image.shape[1:]), self.options["copies"]
        by_pixel = sigma[:, self.rows][:, :, self.columns]  # nearest-neighbour upsampling
        loss = torch.zeros(len(image), device=self.device, dtype=self.dtype)
        slope = torch.zeros_like(by_pixel)
        at_once = max(1, self.chunk // copies)  # images; on a CPU one, of which some copies are taken at a time
        batches = [slice(first, first + at_once) for first in range(0, len(image), at_once)]
        parts = [(rows, part) for rows in batches for part in noise.split(min(copies, self.chunk))]
        tasks = [(image[rows], clean[rows], by_pixel[rows], part, None if scale is None else scale[rows]) for rows, part in parts]
        for (rows, _), (part_of_loss, part_of_slope) in zip(parts, self.parts(tasks), strict=True):
            loss[rows] += part_of_loss
            if part_of_slope is not None:
                slope[rows] += part_of_slope
        return loss, None if scale is None else slope

    def losses_of_part(
        self, network: FrozenNetwork, image: Tensor, clean: Tensor, by_pixel: Tensor, noise: Tensor, scale: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return what some of the noisy images contribute to :meth:`losses`."""
        leaf = by_pixel.detach().requires_grad_(scale is not None)
        with torch.set_grad_enabled(scale is not None):
            noisy = torch.addcmul(image[:, None], leaf[:, None, None], noise).flatten(0, 1)  # no leaf: the network may change it in place
            feature = self.feature(network, noisy).unflatten(0, (-1, len(noise)))
            difference = (feature - clean[:, None]).square().flatten(2).mean(2).sum(1) / self.options["copies"]
            if scale is None:
                return difference, None
            difference = difference / scale
            if not difference.requires_grad:
                raise ValueError("model: the feature does not depend differentiably on the images, because its forward pass uses no_grad or detach")
            (slope,) = torch.autograd.grad(difference.sum(), leaf)
        return difference.detach(), slope

    def __call__(self, image: Tensor) -> dict[str, Tensor]:
        o = self.options
        image = image.to(self.device, self.dtype)
        count, grid = len(image), o["grid"]
        height, width = image.shape[2:]
        if min(height, width) < grid:
            raise ValueError(f"grid must be at most the height and the width of the images, {height} and {width}, got {grid}")
        # Block of each row and column of pixels, as in nearest-neighbour upsampling.
        self.rows, self.columns = (torch.arange(n, device=self.device) * grid // n for n in (height, width))
        in_row, in_column = (F.one_hot(blocks, grid).to(self.dtype) for blocks in (self.rows, self.columns))
        sigma = torch.full((count, grid, grid), o["initial_sigma"], device=self.device, dtype=self.dtype)
        with torch.no_grad():
            clean = torch.cat([self.feature(self.network, part.clone()) for part in image.split(self.chunk)])
        scale, _ = self.losses(image, clean, sigma, -1)
        results = {
            "entropy": torch.full((count, grid, grid), torch.nan, device=self.device, dtype=self.dtype),
            "valid": (scale > 0) & scale.isfinite(),
            "step": torch.zeros(count, dtype=torch.int64, device=self.device),
            "feature_loss": torch.full((count,), torch.nan, device=self.device, dtype=self.dtype),
            "feature_scale": scale,
        }
        nearest = torch.full((count,), torch.inf, device=self.device, dtype=self.dtype)
        highest = torch.full((count,), -torch.inf, device=self.device, dtype=self.dtype)
        previous, largest = torch.zeros_like(highest), torch.zeros_like(highest)  # last mean, and the largest step of it
        weight = o["weight"]
        (active,) = results["valid"].nonzero(as_tuple=True)
        for step in range(o["steps"]):
            if not len(active):
                break
            current = sigma[active].clamp_(MIN_SIGMA, MAX_SIGMA)
            entropy = current.log() + HALF_LOG_2_PI_E
            mean = entropy.mean((1, 2))
            loss, by_pixel = self.losses(image[active], clean[active], current, step, scale[active])
            slope = in_row.T @ cast(Tensor, by_pixel) @ in_column - weight / grid**2 / current
            distance = (mean - o["target"]).abs()
            nearer = distance < nearest[active]
            chosen = active[nearer]
            nearest[chosen] = distance[nearer]
            results["entropy"][chosen], results["feature_loss"][chosen], results["step"][chosen] = entropy[nearer], loss[nearer], step
            if step:
                largest[active] = torch.maximum(largest[active], (mean - previous[active]).abs())
            previous[active] = mean
            highest[active] = torch.maximum(highest[active], mean)
            sigma[active] = current - o["lr"] * slope
            keep = torch.ones_like(nearer) if o["margin"] is None else mean <= o["target"] + o["margin"] * largest[active]
            if step == o["steps"] - EXTENSION - 1:  # the last steps are only for images that have not exceeded the target
                keep &= highest[active] <= o["target"]
                weight *= GROWTH
            active = active[keep]
        return {name: value.cpu() for name, value in results.items()}


class _State:
    """The results so far, and their file."""

    def __init__(self, path: Path | None, provenance: dict[str, Any], fingerprint: dict[str, Any], save_every: int):
        self.path, self.provenance, self.fingerprint, self.save_every = path, provenance, fingerprint, save_every
        self.part = None if path is None else path.with_name(f"{path.name}.part")
        self.results: list[dict[str, Tensor]] = []
        self.hashes: list[str] = []  # of the images

    @property
    def done(self) -> int:
        return len(self.hashes)

    def resume(self, images: Any) -> None:
        if self.part is None or not self.part.exists():
            return
        try:
            stored = torch.load(self.part, weights_only=True)
            provenance, self.results, self.hashes = (stored[name] for name in ("provenance", "results", "hashes"))
        except Exception as error:
            raise ValueError(f"the stored state {os.fspath(self.part)!r} cannot be read: remove it: {error}") from error
        _check_same(self.part, provenance, self.provenance)
        if self.done and _hashes(_read(images, [self.done - 1])) != self.hashes[-1:]:
            raise ValueError(f"the stored state {os.fspath(self.part)!r} is of other images: remove it, or give another path")
        _check_same(self.part, provenance, self.fingerprint)

    def add(self, result: dict[str, Tensor], hashes: list[str]) -> None:
        self.results.append(result)
        self.hashes += hashes
        if self.part is not None and len(self.results) % self.save_every == 0:
            stored = {"provenance": self.provenance | self.fingerprint, "results": self.results, "hashes": self.hashes}
            with replaced_atomically(self.part) as temporary:
                torch.save(stored, temporary)

    def finish(self) -> PixelEntropy:
        joined = {name: torch.cat([result[name] for result in self.results]) for name in _ARRAYS}
        joined = {name: value.float() if value.is_floating_point() else value for name, value in joined.items()}
        found = PixelEntropy(**joined, provenance=self.provenance | self.fingerprint | {"images": _joint_hash(self.hashes)})
        if self.path is not None and self.part is not None:
            found.save(self.path)
            self.part.unlink(missing_ok=True)
        return found


def _checked_options(
    grid: int,
    weight: float,
    target: float,
    initial_sigma: float,
    lr: float,
    steps: int,
    copies: int,
    relu: bool,
    margin: float | None,
    seed: int,
) -> dict[str, Any]:
    for name, value, minimum in (("grid", grid, 1), ("steps", steps, EXTENSION + 1), ("copies", copies, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ValueError(f"{name} must be an integer >= {minimum}, got {value!r}")
    for name, number in (("weight", weight), ("lr", lr)):
        checks.positive(name, number)
    if isinstance(target, bool) or not isinstance(target, (int, float)) or not math.isfinite(target):
        raise ValueError(f"target must be a finite number, got {target!r}")
    if not MIN_SIGMA <= initial_sigma <= MAX_SIGMA:
        raise ValueError(f"initial_sigma must lie in [{MIN_SIGMA:g}, {MAX_SIGMA:g}], got {initial_sigma}")
    if margin is not None:
        checks.not_negative("margin", margin)
    checks.flag("relu", relu)
    checks.integer("seed", seed)
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must lie in [0, 2**63), got {seed}")
    return {
        "grid": grid,
        "weight": float(weight),
        "target": float(target),
        "initial_sigma": float(initial_sigma),
        "lr": float(lr),
        "steps": steps,
        "copies": copies,
        "relu": relu,
        "margin": None if margin is None else float(margin),
        "seed": seed,
    }


def _count(images: Any) -> int:
    if isinstance(images, Tensor) and images.dim() != 4:
        raise ValueError(f"images must have the shape [N, C, H, W], got {list(images.shape)}")
    if isinstance(images, (np.ndarray, Mapping)):
        raise TypeError(f"images must be a tensor or a map-style dataset, got {type(images).__name__}: torch.from_numpy makes a tensor of an array")
    if not hasattr(images, "__len__") or not hasattr(images, "__getitem__"):
        raise TypeError(f"images must be a tensor or a map-style dataset, got {type(images).__name__}")
    if not len(images):
        raise ValueError("images must not be empty")
    return len(images)


def _read(images: Any, indices: Sequence[int]) -> Tensor:
    """Return images [B, C, H, W] on the CPU."""
    batch = (
        images[list(indices)].detach().cpu() if isinstance(images, Tensor) else images_of(images, list(indices), None, name="images", resizable=False)
    )
    if not batch.is_floating_point():
        raise TypeError(f"images must be floats, normalised as the model expects, got {batch.dtype}")
    return batch


def _hashes(batch: Tensor) -> list[str]:
    return [hashlib.sha256(str(tuple(image.shape)).encode() + image.float().contiguous().numpy().tobytes()).hexdigest()[:32] for image in batch]


def _joint_hash(hashes: Iterable[str]) -> str:
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _check_same(path: Path, stored: dict[str, Any], given: dict[str, Any]) -> None:
    for name, value in given.items():
        same = stored.get(name) == value
        if name == "feature norm" and isinstance(stored.get(name), float):  # beyond rounding
            same = math.isclose(stored[name], value, rel_tol=1e-3)
        if not same:
            feature = "another forward pass"
            words = {"model": "another model", "count": "another number of images", "feature shape": feature, "feature norm": feature}.get(
                name, f"another {name}"
            )
            raise ValueError(f"{os.fspath(path)!r} was made with {words} ({name} {stored.get(name)}, now {value}): remove it, or give another path")


def _bar(total: int, done: int, progress: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, initial=done, unit="image", disable=not progress, dynamic_ncols=True)
