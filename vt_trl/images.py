"""Pictures: reading them safely, and the one resolution rule for training, data preparation, evaluation and demo.

Sizes are ``(width, height)`` in pixels. A picture is *original* (as decoded, upright), *full* (within the area bounds)
or *low* (``1 / scale`` of each full side): a policy sees *low* first and *full* on request. Source of the bounds:
VisionThink (arXiv 2507.13348).
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vt_trl.errors import ConfigError, DataError

Size = tuple[int, int]

MAX_DECODED_PIXELS = 89_478_485  # Pillow starts to warn of a decompression bomb here; 256 MiB as RGB
MAX_ASPECT = 200  # Qwen refuses anything longer

# Raster formats only: Pillow would also hand EPS to Ghostscript, which no file from a data set should reach.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/|data:")  # also "https:/x", which Path makes of a URL
_ORIENTATION_TAG = 0x0112
_TURNS = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
_UPRIGHT = {value: Image.Transpose[name] for value, name in enumerate(_TURNS, start=2)}  # by EXIF orientation


def load_image(
    source: Any, *, base_dir: str | os.PathLike | None = None, max_decoded_pixels: int = MAX_DECODED_PIXELS
) -> Image.Image:
    """Read one picture as upright RGB; transparency is laid on white, of an animation the first frame is taken.

    ``source`` is a PIL image, the bytes of a picture file, a local path, or the ``{"bytes", "path"}`` of
    ``datasets.Image(decode=False)``. With ``base_dir`` relative paths start there and none may leave it. Pictures that
    declare more than ``max_decoded_pixels`` are refused before they are decoded. A PIL image that is RGB and upright
    already comes back as the same object. Raises :class:`DataError`.
    """
    if isinstance(source, Mapping):
        source = source.get("path") if source.get("bytes") is None else source["bytes"]
    if source is None:
        raise DataError("cannot read the image: it is missing")
    if isinstance(source, str | Path):
        source = _read_file(local_path(source, base_dir))
    if isinstance(source, bytes | bytearray | memoryview):
        return _guarded(_decode, bytes(source), max_decoded_pixels)
    if isinstance(source, Image.Image):
        return _guarded(_upright_rgb, source, max_decoded_pixels)
    kind = type(source).__name__
    raise DataError(f"cannot read the image: it is a {kind}; give a PIL image, bytes, a path or a dict of the two")


def local_path(path: str | Path, base_dir: str | os.PathLike | None = None) -> Path:
    """The path as an absolute one, or :class:`DataError` when it is a URL or leaves ``base_dir``.

    The check is on the text: a data set is text from somebody else, and its rows must not name files outside its
    folder. Symbolic links are followed, because folders in the Hub's cache consist of them.
    """
    text = str(path)
    if _SCHEME.match(text):
        raise DataError(f"cannot read the image: {text[:80]!r} is no local path; download it first")
    if not text or "\0" in text:
        raise DataError("cannot read the image: its path is empty or holds a NUL character")
    if base_dir is None:
        return Path(text).absolute()
    root = os.path.abspath(base_dir)
    full = os.path.normpath(os.path.join(root, text))
    if os.path.commonpath([root, full]) != root:
        raise DataError(f"cannot read the image: the path {text!r} leaves the data set's folder; move the file there")
    return Path(full)


def _read_file(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():  # a named pipe or a device would block for ever
            raise DataError(f"cannot read the image: {str(path)!r} is not a file")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the image: {error.strerror or error}: {str(path)!r}") from error


def _guarded(function: Callable[..., Image.Image], *args: Any) -> Image.Image:
    """Call ``function`` and turn whatever Pillow raises into :class:`DataError`."""
    try:
        return function(*args)
    except DataError:
        raise
    except Image.UnidentifiedImageError as error:
        raise DataError(f"cannot read the image: it is in none of the formats {', '.join(FORMATS)}") from error
    except Exception as error:  # Pillow raises nearly everything on damaged files; its bomb error and warning too
        raise DataError(f"cannot read the image: {str(error) or type(error).__name__}") from error


def _decode(data: bytes, max_decoded_pixels: int) -> Image.Image:
    if not data:
        raise DataError("cannot read the image: it has no bytes")
    Image.init()  # or OPEN knows only the commonest formats
    image = Image.open(BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN])  # the header only
    rgb = _upright_rgb(image, max_decoded_pixels)
    return rgb.copy() if rgb is image else rgb  # a plain image, without the file behind it


def _upright_rgb(image: Image.Image, max_decoded_pixels: int) -> Image.Image:
    if not 1 <= image.width * image.height <= max_decoded_pixels:
        raise DataError(
            f"cannot read the image: it declares {image.width} x {image.height} pixels, and 1 to {max_decoded_pixels} "
            "are allowed; shrink it, or raise max_decoded_pixels if you trust it"
        )
    image.load()
    try:
        turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION_TAG))
    except Exception:  # broken metadata is no broken picture: show it as it is stored
        turn = None
    if image.mode == "RGB" and turn is None and not image.has_transparency_data:
        return image
    rgb = _to_rgb(image)
    if turn is not None:
        rgb = rgb.transpose(turn)
    rgb.info = {}  # or the orientation would be applied once more on the next call
    return rgb


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int32)  # older Pillow reads 16-bit greyscale PNGs as "I"
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise DataError("cannot read the image: its values have no agreed white; convert it to 8 or 16 bits")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def content_id(image: Image.Image) -> str:
    """Size, mode and a hash of the pixels, the same for equal pictures alone: vLLM trusts it, and caches do."""
    digest = hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest()
    return f"{image.width}x{image.height}-{image.mode}-{digest}"


@dataclass(frozen=True)
class ResolutionRule:
    """How large a picture is shown: area within ``min_pixels`` and ``max_pixels``, aspect kept up to rounding.

    Full sides are multiples of ``scale``, so that the low view is exactly ``1 / scale`` of them, and low sides are at
    least ``min_side``, one visual patch. Raises :class:`ConfigError` on values that cannot be met.
    """

    max_pixels: int = 2048 * 2048
    min_pixels: int = 512 * 512
    scale: int = 2
    min_side: int = 28

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 2 if name == "scale" else 1
            if type(value) is not int or value < least:
                raise ConfigError(f"{name}={value!r}: it counts pixels or a factor; set a whole number >= {least}")
        if self.min_pixels > self.max_pixels:
            raise ConfigError(
                f"min_pixels={self.min_pixels} is above max_pixels={self.max_pixels}, so no picture fits; swap them"
            )
        least = (self.scale * self.min_side) ** 2
        if least > self.max_pixels:
            raise ConfigError(
                f"max_pixels={self.max_pixels} is too small: with scale={self.scale} and min_side={self.min_side} the "
                f"smallest full view has {least} pixels; raise max_pixels"
            )

    def full_size(self, width: int, height: int) -> Size:
        """Size of the full view; ``full_size(*full_size(w, h)) == full_size(w, h)``.

        The area never exceeds ``max_pixels`` and is below ``min_pixels`` only when no size in between has this aspect.
        Raises :class:`DataError` for an aspect ratio above :data:`MAX_ASPECT`, or one so long that its short side
        would drop below ``scale * min_side`` within ``max_pixels``.
        """
        long, short = max(width, height), min(width, height)
        if short < 1 or long > MAX_ASPECT * short:
            raise DataError(
                f"an image of {width} x {height} pixels cannot be shown: its aspect ratio "
                f"{long / max(short, 1):.1f} is above {MAX_ASPECT}, or it is empty; crop it or leave the row out"
            )
        if not self._is_full(long, short):
            long, short = self._fit(long, short)
        return (long, short) if width >= height else (short, long)

    def low_size(self, full: Size) -> Size:
        """Size of the low view: exactly ``1 / scale`` of each full side."""
        if full[0] % self.scale or full[1] % self.scale:
            raise ValueError(f"{full} is no full size: its sides are not multiples of {self.scale}; use full_size()")
        return full[0] // self.scale, full[1] // self.scale

    def views(self, image: Image.Image) -> Views:
        """Both views of a picture, resampled when first asked for. Raises :class:`DataError` like ``full_size``."""
        image = load_image(image)
        full = self.full_size(*image.size)
        return Views(image, full, self.low_size(full))

    def _is_full(self, long: int, short: int) -> bool:
        """Whether a size needs no change: on the grid, within the area, or a grid step too small to be enlarged."""
        step = self.scale
        on_grid = long % step == 0 and short % step == 0 and short >= step * self.min_side
        largest = long * short >= self.min_pixels or (long + step) * (short + step) > self.max_pixels
        return on_grid and long * short <= self.max_pixels and largest

    def _fit(self, long: int, short: int) -> Size:
        """The full size of a picture, in whole numbers: with floats, 55.999... would lose a grid step."""
        step, least = self.scale, self.scale * self.min_side
        area = min(max(long * short, self.min_pixels), self.max_pixels)
        # Squared ideal sides in grid steps, as fractions: side**2 = area * side / other side.
        if area * short >= least**2 * long:
            squares = (area * long, short * step**2), (area * short, long * step**2)
        else:
            squares = ((least * long) ** 2, (short * step) ** 2), (least**2, step**2)
        down = [isqrt(top // bottom) for top, bottom in squares]
        up = [side + (side**2 * bottom < top) for side, (top, bottom) in zip(down, squares, strict=True)]
        clamped = down[0] > MAX_ASPECT * down[1]  # rounding the short side down can overstep the aspect
        down[0] = min(down[0], MAX_ASPECT * down[1])
        small = down[0] * down[1] * step**2
        if small < self.min_pixels and up[0] * up[1] * step**2 <= self.max_pixels:
            return up[0] * step, up[1] * step
        if small > self.max_pixels or (clamped and small < self.min_pixels):
            raise DataError(
                f"an image with sides {long} and {short} cannot be shown with min_pixels={self.min_pixels}, "
                f"max_pixels={self.max_pixels} and a short side >= {least}; raise max_pixels or leave the row out"
            )
        return down[0] * step, down[1] * step


@dataclass(frozen=True)
class Views:
    """The two views of one picture. Sizes are known at once; pixels are resampled (Lanczos) when first asked for."""

    image: Image.Image  # the original, upright RGB
    full_size: Size
    low_size: Size

    @cached_property
    def full(self) -> Image.Image:
        """RGB picture of ``full_size``; the original itself when it has that size already."""
        same = self.image.size == self.full_size
        return self.image if same else self.image.resize(self.full_size, Image.Resampling.LANCZOS)

    @cached_property
    def low(self) -> Image.Image:
        """RGB picture of ``low_size``, made of the full view, so that it never shows more than that."""
        return self.full.resize(self.low_size, Image.Resampling.LANCZOS)


def data_uri(kind: str, data: bytes) -> str:
    """A picture as an address that holds it. ``kind``: png, jpeg or svg+xml."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def png_uri(image: Image.Image) -> str:
    """A picture as a ``data:`` URI, without loss."""
    file = BytesIO()
    image.save(file, "PNG")
    return data_uri("png", file.getvalue())
