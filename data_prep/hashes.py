"""Fingerprints of pictures: one for the very same pixels, one for pictures that look alike."""

from __future__ import annotations

import hashlib

import numpy as np
from PIL import Image

from vt_trl.errors import ConfigError

_FLAT = 2.0  # standard deviation of grey values below which a picture has nothing to be recognised by
_PAIRS = 2**22  # comparisons at a time: 32 MiB


def text_hash(text: str) -> int:
    """64 bits of a text, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "little")


def pixel_hash(picture: Image.Image) -> int:
    """64 bits of size and pixels of an upright RGB picture: file format and metadata do not matter."""
    digest = hashlib.blake2b(f"{picture.mode}{picture.size}".encode(), digest_size=8)
    digest.update(picture.tobytes())
    return int.from_bytes(digest.digest(), "little")


def perceptual_hash(picture: Image.Image) -> int | None:
    """64 bits that scaling, compression and small edits hardly change; None for a picture of one colour.

    The signs of the 8 x 8 lowest frequencies of the picture in grey (``imagehash.phash``).
    """
    try:
        import imagehash
    except ImportError as error:
        raise ConfigError("Comparing pictures needs the package imagehash: pip install 'vt-trl[prepare]'.") from error
    grey = picture.convert("L").resize((32, 32), Image.Resampling.LANCZOS)
    if np.asarray(grey).std() < _FLAT:
        return None
    return int(str(imagehash.phash(grey)), 16)


def nearest(hashes: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each of N perceptual hashes the place of the nearest of M others, and how many of the 64 bits differ."""
    place = np.zeros(len(hashes), np.int64)
    bits = np.full(len(hashes), 65, np.int64)
    step = max(1, _PAIRS // max(1, len(others)))
    for start in range(0, len(hashes) if len(others) else 0, step):
        differing = np.bitwise_count(hashes[start : start + step, None] ^ others[None])  # (step, M)
        place[start : start + step] = differing.argmin(1)
        bits[start : start + step] = differing.min(1)
    return place, bits
