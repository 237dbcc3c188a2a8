"""Rendering of road scenes for :class:`kdkernels.data.SyntheticLanes`.

The ground is a plane seen by a camera above the road. A row of the image below the horizon has the
*nearness* t: 0 at the horizon and 1 at the bottom. On the ground, the depth is z = 1 / t, and a
point at the lateral position X, in lane widths from the middle of the road, has the column

    x = v + c (1 - t)^2 + X w t

with the vanishing point v, the curvature c and the width w of a lane at the bottom of the image.
Columns x are fractions of the image's width.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .keyed_random import normal, uniform
from .lane_files import label_width

LANES = 4
_VEHICLES, _LAMPS = 3, 4
_HORIZON = (0.28, 0.42)  # smallest and largest height of the horizon, from the top, as a fraction of the height
# The purpose of a random number, a part of the key from which it is computed.
(
    _GEOMETRY,
    _PRESENT,
    _PAINT,
    _DASHES,
    _SURFACE,
    _TINT,
    _EDGES,
    _SKY,
    _SKYLINE,
    _BLOCK,
    _SHADOW,
    _IS_VEHICLE,
    _VEHICLE,
    _BODY,
    _NIGHT,
    _LAMP,
    _NOISE,
) = range(17)


@cache
def _photographs() -> tuple[Tensor, Tensor, Tensor]:
    """Return photographs [2, H, W, 3] in [0, 1]; their grey details, and their blurred grey values,
    both [2, H, W] with the mean 0 and the standard deviation 1.
    """
    from sklearn.datasets import load_sample_images

    colour = torch.stack([torch.tensor(photograph.copy()) for photograph in load_sample_images().images]).float() / 255
    grey = colour.mean(3)

    def blur(x: Tensor, side: int) -> Tensor:
        x = F.avg_pool2d(F.pad(x[:, None], [side // 2] * 4, mode="reflect"), (side, 1), 1)
        return F.avg_pool2d(x, (1, side), 1)[:, 0]

    def standardised(x: Tensor) -> Tensor:
        return (x - x.mean((1, 2), keepdim=True)) / x.std((1, 2), keepdim=True)

    return colour, standardised(grey - blur(grey, 9)).clamp(-2.5, 2.5), standardised(blur(blur(grey, 31), 31))


class LaneScenes:
    """Generator of road scenes with label maps; a scene depends only on ``seed`` and its index.

    Args:
        seed: seed of the scenes.
        size: height and width of the images.
        night: fraction of the scenes at night.
    """

    def __init__(self, seed: int, size: tuple[int, int], night: float):
        self.seed, self.size, self.night = seed, size, night

    def make(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Generate the scenes at the positions ``index`` [B].

        Returns:
            Images [B, 3, H, W] uint8, and label maps [B, H, W] uint8.
        """
        return _Scene(self, index).render()

    def random(self, index: Tensor, purpose: int, *shape: int) -> Tensor:
        """Return uniform random numbers in [0, 1), [B, *shape]."""
        positions = [torch.arange(n).view(-1, *[1] * (len(shape) - 1 - i)) for i, n in enumerate(shape)]
        return uniform(self.seed, purpose, index.view(-1, *[1] * len(shape)), *positions)


def _between(u: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * u


class _Scene:
    """The scenes of one batch. Maps of pixels are [B, H, W], and colours [B, H, W, 3]."""

    def __init__(self, scenes: LaneScenes, index: Tensor):
        self.scenes, self.index = scenes, index
        self.height, self.width = scenes.size
        g = self.random(_GEOMETRY, 8)[:, :, None, None]  # [B, 8, 1, 1]
        self.horizon = _between(g[:, 0], *_HORIZON)  # fraction of the height
        self.vanishing = _between(g[:, 1], 0.42, 0.58)
        self.curvature = 0.3 * (g[:, 2] - 0.5) * (1 + (g[:, 3] > 0.6))
        self.lane_width = _between(g[:, 4], 0.5, 0.75)
        shift = _between(g[:, 5], -0.2, 0.2)
        # Lateral positions of the four lane lines and of the middles of the three lanes.
        self.lines = torch.arange(LANES).view(1, -1, 1, 1) - 1.5 + shift[:, None]  # [B, 4, 1, 1]
        self.middles = torch.arange(LANES - 1).view(1, -1, 1, 1) - 1.0 + shift[:, None]
        self.y = ((torch.arange(self.height) + 0.5) / self.height)[None, :, None]
        self.x = ((torch.arange(self.width) + 0.5) / self.width)[None, None]
        # The maps of the ground are [B, G, W] and [B, G, 1], with the last G rows of the image.
        self.top = int(_HORIZON[0] * self.height)  # the first of these rows
        self.t = (self.y[:, self.top :] - self.horizon) / (1 - self.horizon)
        self.near = self.t.clamp(min=0.5 / self.height)
        self.is_ground = self.t > 0
        self.lateral = (self.x - self.middle(self.near)) / (self.lane_width * self.near)  # X of each pixel
        self.depth = 1 / self.near
        present = self.random(_PRESENT, LANES)
        self.present = present < torch.tensor([0.65, 0.93, 0.93, 0.65])
        self.is_night = self.random(_NIGHT, 1)[:, :, None] < scenes.night
        self.lights = torch.zeros(len(index), self.height, self.width)  # rear lamps, which are not darkened at night

    def random(self, purpose: int, *shape: int) -> Tensor:
        return self.scenes.random(self.index, purpose, *shape)

    def middle(self, t: Tensor) -> Tensor:
        """Return the column of the middle of the road at the nearness t."""
        return self.vanishing + self.curvature * (1 - t).square()

    def photograph(self, kind: int, row: Tensor, column: Tensor, purpose: int) -> Tensor:
        """Look up pixels of a random photograph, mirrored at its borders, at a random offset.

        Args:
            kind: 0 for its colours, 1 for its details, 2 for the blurred photograph.
            row, column: positions in pixels; broadcast to [B, H, W].
        """
        source = _photographs()[kind]
        count, height, width = source.shape[:3]
        offset = self.random(purpose, 3)[:, :, None, None]
        row, column = (row + offset[:, 0] * height).int() % (2 * height), (column + offset[:, 1] * width).int() % (2 * width)
        row, column = torch.minimum(row, 2 * height - 1 - row), torch.minimum(column, 2 * width - 1 - column)
        first_row = (offset[:, 2] * count).int() * height
        return source.flatten(0, 2)[(first_row + row) * width + column]

    def on_ground(self, kind: int, scale: float, purpose: int) -> Tensor:
        """Look up a photograph that lies on the ground, with ``scale`` pixels per lane width."""
        return self.photograph(kind, 2.5 * scale * self.depth.clamp(max=40), scale * self.lateral.clamp(-60, 60), purpose)

    def render(self) -> tuple[Tensor, Tensor]:
        image = self.background()
        image[:, self.top :] = torch.where(self.is_ground[..., None], self.ground(), image[:, self.top :])
        image = self.add_vehicles(image)
        image = self.darken(image)
        pixels = torch.arange(image[0].numel()).view(image.shape[1:])
        noise = torch.where(self.is_night, 0.035, 0.015)[..., None]
        image += noise * normal(self.scenes.seed, _NOISE, self.index.view(-1, 1, 1, 1), pixels)
        image = image.clamp_(0, 1).mul_(255).round_().to(torch.uint8)
        return image.permute(0, 3, 1, 2).contiguous(), self.label()

    def label(self) -> Tensor:
        """Draw the label map: each present line, also where nothing is painted or visible."""
        offset = self.lines * self.lane_width[:, None]  # [B, 4, 1, 1]
        t = self.near[:, None]
        distance = (self.x - self.middle(self.near)).unsqueeze(1) - offset * t
        # Columns per row, in pixels: the derivative of the column by t, divided by that of the row.
        slope = (offset - 2 * (self.curvature * (1 - self.near)).unsqueeze(1)) * self.width / ((1 - self.horizon[:, None]) * self.height)
        distance = distance.abs() * self.width / (1 + slope.square()).sqrt()
        distance, lane = torch.where(self.present[..., None, None], distance, torch.inf).min(1)
        is_line = (distance <= label_width(self.width) / 2) & (self.t > 0.07)
        return F.pad(torch.where(is_line, lane + 1, 0).to(torch.uint8), [0, 0, self.top, 0])

    def ground(self) -> Tensor:
        surface = self.random(_SURFACE, 4)[:, :, None, None]
        grain = self.on_ground(1, 60.0, _SURFACE)
        road = _between(surface[:, 0], 0.3, 0.52) * (1 + _between(surface[:, 1], 0.04, 0.14) * grain + 0.05 * self.on_ground(2, 25.0, _TINT))
        tint = 1 + 0.08 * (self.random(_TINT, 3)[:, None, None] - 0.5)
        colour = self.paint(road[..., None] * tint, grain)
        # The surroundings: grass, earth or pavement.
        kinds = torch.tensor([[0.26, 0.38, 0.16], [0.45, 0.38, 0.27], [0.5, 0.5, 0.48]])
        base = kinds[(surface[:, 2, 0, 0] * len(kinds)).long()][:, None, None]
        beside = 0.65 * base * (1 + 0.2 * grain[..., None]) + 0.35 * self.on_ground(0, 45.0, _EDGES)
        edges = _between(self.random(_EDGES, 2), 0.12, 0.55)[..., None, None]
        lines = torch.where(self.present[..., None, None], self.lines, torch.nan)
        left, right = lines.nan_to_num(9.0).amin(1).clamp(max=-0.5) - edges[:, 0], lines.nan_to_num(-9.0).amax(1).clamp(min=0.5) + edges[:, 1]
        soft = 0.5 / (self.near * self.lane_width * self.width)  # half a pixel, in lane widths
        is_road = ((self.lateral - left) / soft).clamp(0, 1) * ((right - self.lateral) / soft).clamp(0, 1)
        colour = torch.lerp(beside, colour, is_road[..., None])
        # Shadows of trees and houses, in two thirds of the scenes.
        shadow = self.random(_SHADOW, 3)[:, :, None, None]
        strength = _between(shadow[:, 0], 0.35, 0.65) * (shadow[:, 1] < 0.65)
        shade = (4 * (self.on_ground(2, 70.0, _SHADOW) - _between(shadow[:, 2], 0.2, 1.0))).sigmoid()
        colour = colour * (1 - strength * shade)[..., None]
        haze = 0.45 * (1 - self.near).pow(6)[..., None]
        return torch.lerp(colour, torch.full_like(colour, 0.66), haze)

    def paint(self, road: Tensor, grain: Tensor) -> Tensor:
        """Paint the lines on the road, solid or dashed, worn, white or yellow."""
        paint, dashes = self.random(_PAINT, LANES, 4), self.random(_DASHES, LANES, 3)
        half = 0.5 * _between(paint[:, :, 0], 0.05, 0.085)[..., None, None] * (self.lane_width * self.near * self.width)[:, None]  # pixels
        distance = (self.lateral[:, None] - self.lines).abs() * (self.lane_width * self.near * self.width)[:, None]
        cover = (half + 0.5 - distance).clamp(0, 1) * (2 * half).clamp(max=1)
        period, phase, duty = (_between(dashes[..., i], *limits)[..., None, None] for i, limits in enumerate(((0.9, 1.8), (0, 1), (0.35, 0.6))))
        # Lines between lanes are usually dashed, and the edges of the road solid.
        is_outer = torch.tensor([True, False, False, True]) | ~self.present.roll(1, 1) | ~self.present.roll(-1, 1)
        is_dashed = paint[:, :, 1] < torch.where(is_outer, 0.2, 0.7)
        is_gap = is_dashed[..., None, None] & ((self.depth[:, None] / period + phase) % 1 > duty)
        strength = _between(paint[:, :, 2], 0.45, 1.0) * (paint[:, :, 2] > 0.06) * self.present
        cover = cover * ~is_gap * strength[..., None, None] * (1 - 0.12 * grain.abs())[:, None]
        is_yellow = (paint[:, :, 3] < torch.tensor([0.35, 0.2, 0.02, 0.02]))[..., None]
        colours = torch.where(is_yellow, torch.tensor([0.86, 0.66, 0.2]), torch.tensor([0.9, 0.9, 0.87]))  # [B, 4, 3]
        for line in range(LANES):
            road = torch.lerp(road, colours[:, line, None, None].expand_as(road), cover[:, line, ..., None])
        return road

    def background(self) -> Tensor:
        """Draw the sky, and houses and trees along the horizon, in the rows above any horizon."""
        sky = self.random(_SKY, 4)[:, :, None, None]
        y = self.y[:, : int(_HORIZON[1] * self.height) + 1]
        height = (y / self.horizon).clamp(0, 1)[..., None]  # 0 at the top, 1 at the horizon
        blue, grey = torch.tensor([0.38, 0.58, 0.86]), torch.tensor([0.68, 0.71, 0.75])
        top = torch.lerp(grey, blue, sky[:, 0, ..., None]) * _between(sky[:, 1], 0.8, 1.05)[..., None]
        colour = torch.lerp(top, torch.tensor([0.83, 0.86, 0.88]), height)
        colour = colour + (0.06 * self.photograph(2, y * 500, self.x * 400, _SKY))[..., None].clamp(min=-0.05)
        # Blocks of different heights: houses with the pixels of a photograph, or trees.
        line = self.random(_SKYLINE, 4)[:, :, None, None]
        block = ((self.x + line[:, 0]) * _between(line[:, 1], 5, 14)).long()
        random = [uniform(self.scenes.seed, _BLOCK, self.index.view(-1, 1, 1), block, i) for i in range(3)]
        is_tree = random[0] < _between(line[:, 2], 0.1, 0.9)
        # Blocks are higher at the sides of the road.
        rise = 0.25 + (self.x - self.vanishing).abs() * 2.2
        leaves = 0.12 * self.photograph(1, torch.zeros_like(self.x), self.x * 300, _BLOCK)
        top_of_block = (self.horizon * rise * _between(random[1], 0.35, 0.95)).clamp(max=0.4) * (1 + torch.where(is_tree, leaves, 0))
        is_block = y > self.horizon - top_of_block
        texture = self.photograph(0, y * 260, self.x * 260 + 40 * block, _SKYLINE)
        grey_value = texture.mean(3, keepdim=True)
        house = torch.lerp(texture, grey_value, 0.5) * _between(random[2], 0.4, 0.9)[..., None] + 0.12
        tree = torch.tensor([0.2, 0.3, 0.14]) * (0.4 + 1.1 * grey_value) * _between(random[2], 0.7, 1.3)[..., None]
        upright = torch.where(is_tree[..., None], tree, house)
        colour = torch.where(is_block[..., None], torch.lerp(upright, torch.full_like(upright, 0.68), 0.2), colour)
        return F.pad(colour, [0, 0, 0, 0, 0, self.height - y.shape[1]])

    def add_vehicles(self, image: Tensor) -> Tensor:
        """Draw up to three vehicles from behind, one in each lane, the farthest first."""
        random = self.random(_VEHICLE, _VEHICLES, 4)[..., None, None]  # [B, 3, 4, 1, 1]
        body = self.random(_BODY, _VEHICLES, 3)
        is_there = self.random(_IS_VEHICLE, _VEHICLES)[..., None, None] < torch.tensor([0.45, 0.55, 0.45]).view(-1, 1, 1)
        nearness = torch.where(
            torch.tensor([False, True, False]).view(-1, 1, 1), _between(random[:, :, 0], 0.1, 0.5), _between(random[:, :, 0], 0.1, 0.8)
        )
        for pick in nearness.flatten(1).argsort(1).unbind(1):
            images = is_there[torch.arange(len(image)), pick, 0, 0].nonzero().flatten()
            pick = pick[images]
            parameters = (values[images, pick] for values in (nearness, self.middles, random, body))
            image[images] = self.add_vehicle(image[images], images, *parameters)
        return image

    def add_vehicle(self, image: Tensor, images: Tensor, t: Tensor, lane: Tensor, random: Tensor, body: Tensor) -> Tensor:
        """Draw one vehicle in each of the ``images`` at the nearness t [N, 1, 1].

        Args:
            image: the images so far, [N, H, W, 3].
            images: their positions in the batch, [N].
            t, lane: nearness, and lateral position of the middle of the lane, [N, 1, 1].
            random, body: random numbers [N, 4, 1, 1] for the shape and [N, 3] for the colour.
        """
        horizon, lane_width = self.horizon[images], self.lane_width[images]
        middle = self.vanishing[images] + self.curvature[images] * (1 - t).square()
        is_truck = random[:, 1] > 0.8
        half = 0.5 * torch.where(is_truck, 0.66, _between(random[:, 2], 0.5, 0.58)) * lane_width * t
        high = 2 * half * torch.where(is_truck, 1.25, _between(random[:, 3], 0.72, 0.9)) * self.width / self.height
        bottom = horizon + t * (1 - horizon)
        u = (self.x - middle - (lane + 0.15 * (random[:, 3] - 0.5)) * lane_width * t) / half  # -1 to 1 between the sides
        w = (bottom - self.y) / high  # 0 at the road, 1 at the roof
        side = u.abs()

        part = torch.zeros(image.shape[:3], dtype=torch.int64)  # of the vehicle, for each pixel; 0: none

        def fill(number: int, area: Tensor) -> None:
            part.masked_fill_(area, number)

        waist = torch.where(is_truck, 1.0, 0.5)
        inside = (w >= 0.08) & (w <= 1) & (side < torch.where(w < waist, 1.0, 1 - 0.55 * (w - waist)))
        lamp = inside & (w > 0.34) & (w < 0.48) & (side > 0.7)
        fill(1, (side < 1.15) & (w > -0.08) & (w < 0.16))  # shadow on the road
        fill(2, (side > 0.6) & (side < 0.95) & (w > -0.02) & (w < 0.2))  # tyres
        fill(3, inside)
        fill(4, (w > torch.where(is_truck, 2.0, 0.54)) & (w < 0.9) & (side < 0.82 - 0.5 * (w - 0.54)))  # window
        fill(5, inside & (w < 0.2))  # bumper
        fill(6, inside & (w > 0.26) & (w < 0.36) & (side < 0.22))  # number plate
        fill(7, lamp)
        colours = torch.tensor([[0.0] * 3, [0.06] * 3, [0.05] * 3, [0.0] * 3, [0.16, 0.19, 0.23], [0.12] * 3, [0.8] * 3, [0.72, 0.1, 0.08]])
        colours = colours.repeat(len(image), 1, 1)
        colours[:, 3] = (0.15 + 0.75 * body[:, :1] + 0.5 * (body - 0.5) * (body[:, 1:2] > 0.4)).clamp(0.05, 0.95)
        vehicle = colours[torch.arange(len(image)).view(-1, 1, 1), part]
        vehicle = vehicle * torch.where(part == 3, 0.72 + 0.3 * w, 1.0)[..., None]  # the body is lighter at the top
        opacity = torch.tensor([0.0, 0.75, 1, 1, 1, 1, 1, 1])[part]
        self.lights[images] = torch.where(part < 3, self.lights[images], (part == 7).float())
        return torch.lerp(image, vehicle, opacity[..., None])

    def darken(self, image: Tensor) -> Tensor:
        """Set the brightness of the day, and darken the scenes at night, which have headlights."""
        light = self.random(_NIGHT, 3)[:, :, None, None]
        image = image * torch.where(self.is_night, 1.0, _between(light[:, 1], 0.72, 1.12))[..., None]
        night = self.is_night.flatten()
        if not night.any():
            return image
        near, horizon = self.near[night], self.horizon[night]
        # The own headlights light the road in front.
        spread = (self.x - self.middle(self.near)[night]) / (0.2 + 0.35 * near)
        beam = (-spread.square()).exp() * (near * 3.5).clamp(max=1) * self.is_ground[night]
        beam = F.pad(beam, [0, 0, self.top, 0])
        dark = image[night] * (0.1 + _between(light[night, 2], 0.4, 0.8) * beam)[..., None] * torch.tensor([1.0, 0.95, 0.88])
        dark = dark + 0.06 * (-((self.y - horizon) / 0.2).square()).exp()[..., None] * torch.tensor([1.0, 0.8, 0.6])
        dark = dark + self.lights[night, ..., None] * torch.tensor([0.85, 0.1, 0.08])
        glow = torch.zeros(1)
        for lamp in self.random(_LAMP, _LAMPS, 3)[night, ..., None, None].unbind(1):  # street lamps
            y = horizon * _between(lamp[:, 1], 0.35, 0.9)
            squared = ((self.x - lamp[:, 0]) * self.width / self.height).square() + (self.y - y).square()
            glow = glow + _between(lamp[:, 2], 0.2, 0.9) * (-squared / 0.0006).exp()
        image[night] = dark + glow[..., None] * torch.tensor([1.0, 0.85, 0.6])
        return image
