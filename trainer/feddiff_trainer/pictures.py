"""Images and small charts as text that stands inside a page: PNG data URIs and inline SVG.

Nothing here refers to a file or an address, so a page made of it shows the same picture everywhere.

Shapes: N images, C channels, H height, W width.
"""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from PIL import Image
from safetensors import SafetensorError

from feddiff_protocol.api import ImageSpec
from feddiff_protocol.errors import DataInvalid

from .pages import Html, element

Pixels = npt.NDArray[np.uint8]

GAP = 1  # transparent pixels between two images of a grid
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # by channels


@dataclass(frozen=True)
class Picture:
    """A grid of images as PNG bytes, with its size in its own pixels."""

    png: bytes
    width: int
    height: int

    @property
    def data_uri(self) -> str:
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


@dataclass(frozen=True)
class LabelledImages:
    """Sets of images with one label each, common to all sets: images[name]_NCHW uint8 in 0..255, labels_N int64."""

    images: dict[str, Pixels]
    labels_N: npt.NDArray[np.int64]


def read_samples(data: bytes, where: str, names: Sequence[str], shape: ImageSpec, num_classes: int) -> LabelledImages:
    """The named sets of images in a safetensors file. Raises DataInvalid where one is missing or of another shape."""
    try:
        tensors = safetensors.numpy.load(data)
    except SafetensorError as error:
        raise DataInvalid(f"{where}: expected a safetensors file, found: {error}; sample again") from None
    labels_N = tensors.get("labels", np.empty(0))
    if labels_N.ndim != 1 or labels_N.dtype != np.int64 or not ((labels_N >= 0) & (labels_N < num_classes)).all():
        raise DataInvalid(f"{where}: expected labels as int64 in 0..{num_classes - 1}, found others; sample again")
    expected = (len(labels_N), shape.channels, shape.height, shape.width)
    for name in names:
        found = tensors.get(name)
        if found is None or found.dtype != np.uint8 or found.shape != expected:
            described = "none" if found is None else f"{found.dtype} of shape {found.shape}"
            raise DataInvalid(f"{where}: expected {name} as uint8 of shape {expected}, found {described}; sample again")
    return LabelledImages({name: tensors[name] for name in names}, labels_N)


def grid(x_NCHW: Pixels, columns: int) -> Picture:
    """The images in rows of `columns`, one transparent pixel apart; without images, an empty transparent pixel.

    x_NCHW: uint8 in 0..255; one channel is grey, three are red, green and blue, the last of two or four is opacity.
    """
    num_images, _, height, width = x_NCHW.shape
    rows = -(-num_images // columns)
    columns = min(columns, num_images)
    size = (max(columns * (width + GAP) - GAP, 1), max(rows * (height + GAP) - GAP, 1))
    sheet = Image.new("RGBA", size, (0, 0, 0, 0))
    for index, x_CHW in enumerate(x_NCHW):
        place = (index % columns * (width + GAP), index // columns * (height + GAP))
        sheet.paste(_tile(x_CHW), place)
    return Picture(_png_bytes(sheet), *size)


def _tile(x_CHW: Pixels) -> Image.Image:
    channels = x_CHW.shape[0]
    x_HWC = x_CHW[0] if channels == 1 else np.moveaxis(x_CHW, 0, -1)
    return Image.fromarray(np.ascontiguousarray(x_HWC), MODES[channels]).convert("RGBA")


def _png_bytes(sheet: Image.Image) -> bytes:
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def to_pixels(x: npt.NDArray[np.floating]) -> Pixels:
    """Values of [0, 1] as whole numbers of 0..255; what lies outside is clipped to black or white."""
    pixels: Pixels = np.rint(np.clip(x, 0.0, 1.0) * 255).astype(np.uint8)
    return pixels


def image(picture: Picture, alt: str, fit: int) -> Html:
    """An <img> of the picture, enlarged by the largest whole factor that keeps it within `fit` CSS pixels wide.

    A whole factor keeps every pixel a square of one size.
    """
    factor = max(fit // picture.width, 1)
    return element(
        "img",
        src=picture.data_uri,
        alt=alt,
        width=picture.width * factor,
        height=picture.height * factor,
        cls="pixels",
    )


def bar(share: float, cls: str = "") -> Html:
    """A horizontal bar filled from the left by `share` of its width, in the colour of its class."""
    filled = f"{100 * min(max(share, 0.0), 1.0):.2f}"
    track = element("rect", width="100", height="1", cls="track")
    fill = element("rect", width=filled, height="1", cls="fill")
    svg = element("svg", track, fill, viewBox="0 0 100 1", preserveAspectRatio="none", aria_hidden="true")
    return element("span", svg, cls=f"bar {cls}".strip())


ROC_SIDE = 240.0
ROC_MARGIN = 34.0


def roc_bound(tpr_at: Callable[[float], float], auc: float, marked_fpr: float = 0.01) -> Html:
    """A chart of the best attack that the promise leaves possible: true against false positive rate.

    `tpr_at` is the trade-off curve of the promise; no attack has a point above it.
    """
    rates = [k / 1000 for k in range(40)] + [k / 100 for k in range(4, 101)]
    points = " ".join(_roc_point(rate, tpr_at(rate) if rate > 0 else 0.0) for rate in rates)
    total = ROC_SIDE + 2 * ROC_MARGIN
    label = f"Best possible attack: area under the curve {auc:.3f}, {tpr_at(marked_fpr):.1%} found at 1% false alarms"
    return element(
        "svg",
        element("title", label),
        element("polygon", points=f"{points} {_roc_point(1, 0)}", cls="roc-area"),
        *_roc_axes(),
        element("line", **_line((0, 0), (1, 1)), cls="roc-chance"),
        element("polyline", points=points, cls="roc-curve"),
        element("circle", **_centre(marked_fpr, tpr_at(marked_fpr)), r="4", cls="roc-mark"),
        _roc_text(f"{tpr_at(marked_fpr):.0%} found", marked_fpr + 0.17, tpr_at(marked_fpr) - 0.015, "roc-label"),
        _roc_text("guessing", 0.78, 0.62, "roc-label"),
        viewBox=f"0 0 {total:.0f} {total:.0f}",
        role="img",
        cls="roc",
    )


def _roc_axes() -> list[Html]:
    lines = []
    for rate in (0.0, 0.25, 0.5, 0.75, 1.0):
        lines.append(element("line", **_line((rate, 0), (rate, 1)), cls="roc-grid"))
        lines.append(element("line", **_line((0, rate), (1, rate)), cls="roc-grid"))
    for rate in (0.0, 0.5, 1.0):
        lines.append(_roc_text(f"{rate:g}", rate, -0.07, "roc-tick"))
        lines.append(_roc_text(f"{rate:g}", -0.065, rate - 0.015, "roc-tick"))
    lines.append(_roc_text("false alarms", 0.76, -0.07, "roc-tick"))
    lines.append(_roc_text("found", 0.0, 1.05, "roc-tick"))
    return lines


def _roc_xy(fpr: float, tpr: float) -> tuple[str, str]:
    return f"{ROC_MARGIN + fpr * ROC_SIDE:.1f}", f"{ROC_MARGIN + (1 - tpr) * ROC_SIDE:.1f}"


def _roc_point(fpr: float, tpr: float) -> str:
    return ",".join(_roc_xy(fpr, tpr))


def _line(start: tuple[float, float], end: tuple[float, float]) -> dict[str, str]:
    (x1, y1), (x2, y2) = _roc_xy(*start), _roc_xy(*end)
    return {"x1": x1, "y1": y1, "x2": x2, "y2": y2}


def _centre(fpr: float, tpr: float) -> dict[str, str]:
    cx, cy = _roc_xy(fpr, tpr)
    return {"cx": cx, "cy": cy}


def _roc_text(text: str, fpr: float, tpr: float, cls: str) -> Html:
    x, y = _roc_xy(fpr, tpr)
    return element("text", text, x=x, y=y, text_anchor="middle", cls=cls)
