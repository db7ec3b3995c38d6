"""What this library's trainer holds of its rollouts, as allocated and as the preflight says.

Part of ``python -m benchmarks.preflight_check``.
"""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vt_trl.preflight.episodes import Episode
from vt_trl.preflight.launch import Launch
from vt_trl.preflight.meter import nbytes, tensors_in
from vt_trl.preflight.setup import Setup
from vt_trl.preflight.states import rollouts
from vt_trl.recipe import RunArguments

PARTS = ("prompt", "completion")


def trainer_rollouts(model_path: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of a generation's tensors in this library's trainer, as held and as estimated.

    ``rollouts``: what the buffer holds between two generations. ``splitting``: the most that old and new rollouts take
    while the new ones are cut into micro-batches.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(model_path, Path(folder))
        trainer.train()
    setup = Setup(RunArguments(model="-", dataset="-", dtype="float32"), trainer.args, trainer.model.config, Launch())
    one = trainer.last_rollouts[0]
    visual = trainer.features.visual_tokens(one.images[0])
    lengths = [max(len(getattr(rollout, f"{part}_ids")) for rollout in trainer.last_rollouts) for part in PARTS]
    patches = visual * setup.widths.merge**2
    episode = Episode(lengths[0] - visual, visual, 0, 0, lengths[1], patches, 1, patches, 1)
    batch = rollouts(setup, episode, patches)
    estimate = {"rollouts": batch.total, "splitting": 2 * batch.total + batch.tokens}
    return {"rollouts": trainer.held, "splitting": trainer.most}, estimate


def _trainer(model_path: Path, folder: Path) -> Any:
    """A trainer that notes the bytes of its rollouts: four micro-batches per generation, two generations."""
    from datasets import Dataset

    from vt_trl.config import VTGRPOConfig
    from vt_trl.trainer import VTGRPOTrainer

    class Watching(VTGRPOTrainer):
        held = most = 0

        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            self.made = super()._generate_and_score_completions(inputs)
            return self.made

        def _prepare_inputs(self, batch: Any) -> dict[str, Any]:
            old, self.made = list(tensors_in(self._buffered_inputs)), None
            inputs = super()._prepare_inputs(batch)
            parts = list(tensors_in(self._buffered_inputs))
            self.held = nbytes(parts)
            if old and self.made is not None:
                self.most = max(self.most, nbytes([*old, *tensors_in(self.made), *parts]))  # pixels: one storage
            return inputs

    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(4):
        pixels = torch.randint(0, 255, (112, 168, 3), generator=generator, dtype=torch.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels.numpy()).save(stream, "PNG")
        rows.append({"image": {"bytes": stream.getvalue(), "path": None}, "question": "Which?", "answer": "1"})
    args = VTGRPOConfig(
        output_dir=str(folder),
        environment="direct",
        environment_args={"min_pixels": 3136},
        penalty="none",
        num_generations=4,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        steps_per_generation=4,
        max_steps=5,
        max_completion_length=16,
        beta=0.001,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return Watching(model=str(model_path), args=args, train_dataset=Dataset.from_list(rows))
