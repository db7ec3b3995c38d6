"""From a recipe to a trainer: what is refused before a model is loaded, and what is trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from vt_trl.config import VTGRPOConfig
from vt_trl.errors import ConfigError
from vt_trl.recipe import RunArguments
from vt_trl.run import check_precision


def config(tmp_path: Path) -> VTGRPOConfig:
    return VTGRPOConfig(str(tmp_path), use_cpu=True, num_generations=4, per_device_train_batch_size=4)


def test_weights_are_not_trained_in_16_bits(tmp_path: Path):
    with pytest.raises(ConfigError, match="dtype is bfloat16.*float32"):
        check_precision(RunArguments(model="m", dataset="d", dtype="bfloat16"), config(tmp_path))


@pytest.mark.parametrize(("dtype", "lora"), [("float32", "none"), ("bfloat16", "language"), ("bfloat16", "all")])
def test_full_precision_and_adapters_may_train(tmp_path: Path, dtype: str, lora: str):
    check_precision(RunArguments(model="m", dataset="d", dtype=dtype, lora=lora), config(tmp_path))
