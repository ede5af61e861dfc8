"""Coloured shapes on soft backgrounds as a folder of 64×64 PNG files, one folder for each of four classes.

    python examples/images/make_shapes.py OUT [IMAGES_PER_CLASS] [SEED]

Shape and hue tell the class; place, size, turn, shade and background vary. Nothing of it is private.
"""

import colorsys
import sys
from math import cos, pi, sin
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIDE, FINER = 64, 4  # drawn FINER times as large, then averaged: smooth edges
HUES = {"cross": 0.34, "disc": 0.02, "ring": 0.13, "square": 0.61}  # of 1: green, red, yellow, blue
IMAGES_PER_CLASS, SEED = 240, 0

Points = list[tuple[float, float]]


def shape(name: str, radius: float) -> Points:
    """Corners around (0, 0), clockwise; of a disc and a ring, many."""
    if name == "square":
        return [(radius * x, radius * y) for x, y in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
    if name == "cross":
        arm = [(-0.35, -1.2), (0.35, -1.2), (0.35, -0.35)]
        quarters = [[(x * c - y * s, x * s + y * c) for x, y in arm] for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]
        return [(radius * x, radius * y) for quarter in quarters for x, y in quarter]
    return [(radius * cos(2 * pi * k / 90), radius * sin(2 * pi * k / 90)) for k in range(90)]


def draw(name: str, generator: np.random.Generator) -> Image.Image:
    """One image of the class: a shape somewhere near the middle, before a gradient of two greys."""
    size = SIDE * FINER
    first, second = generator.uniform(0.55, 0.95, 2)
    direction = generator.uniform(0, 2 * pi)
    y, x = np.mgrid[:size, :size] / size - 0.5
    slope = x * cos(direction) + y * sin(direction) + 0.5
    grey = np.clip(255 * (first + (second - first) * slope), 0, 255).astype(np.uint8)
    image = Image.fromarray(grey).convert("RGB")
    hue = (HUES[name] + generator.normal(0, 0.015)) % 1
    red, green, blue = colorsys.hsv_to_rgb(hue, generator.uniform(0.7, 0.95), generator.uniform(0.6, 0.9))
    fill = (round(255 * red), round(255 * green), round(255 * blue))
    turn, (left, top) = generator.uniform(0, pi / 2), size * generator.uniform(0.4, 0.6, 2)
    radius = size * generator.uniform(0.18, 0.28)

    def placed(points: Points) -> Points:
        return [(left + x * cos(turn) - y * sin(turn), top + x * sin(turn) + y * cos(turn)) for x, y in points]

    pencil = ImageDraw.Draw(image)
    if name == "ring":
        pencil.line(placed([*shape(name, radius), (radius, 0)]), fill, width=round(0.4 * radius), joint="curve")
    else:
        pencil.polygon(placed(shape(name, radius)), fill)
    return image.resize((SIDE, SIDE), Image.Resampling.BOX)


def main(out: Path, images_per_class: int = IMAGES_PER_CLASS, seed: int = SEED) -> None:
    generator = np.random.default_rng(seed)
    for name in HUES:
        (out / name).mkdir(parents=True)
        for i in range(images_per_class):
            draw(name, generator).save(out / name / f"{i:04}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
