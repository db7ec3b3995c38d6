"""How the samples of a micro-batch lie in one padding-free row: each prompt once, its completions after it.

``[prefix | branch 1 | … | branch G | next prefix | …]``: a prefix is a prompt without its last token and attends to
itself; a branch is that last token and the completion after it, and attends to its prefix and to itself. The last
prompt token is repeated in each branch so that every branch predicts its own first token, position by position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vt_trl.forward.batches import by_prompt

IGNORED = -100  # a label without loss, as everywhere in transformers


@dataclass(frozen=True)
class Segment:
    """Tokens ``start`` to ``start + length`` of the row, which attend to themselves and, whole, to what lies before.

    ``before``: (start, length) of the prefix; length 0 for a prefix itself.
    """

    start: int
    length: int
    before: tuple[int, int] = (0, 0)


class Layout:
    """The segments of one row, and the index tensors that attention kernels want, made once per device."""

    def __init__(self, segments: Sequence[Segment]):
        self.segments = tuple(segments)
        self._made: dict[Any, Any] = {}

    def mask(self, before: int, length: int, device: torch.device) -> torch.Tensor:
        """(length, before + length) bool, True where a query may look."""
        return self._once(
            ("mask", before, length, device),
            lambda: torch.ones(length, before + length, dtype=torch.bool, device=device).tril(before),
        )

    def variable(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int]:
        """Where keys come from (K,), cumulative lengths of queries and keys (S + 1,), and the longest of each."""
        return self._once(("variable", device), lambda: self._variable(device))

    def _once(self, key: Any, make: Any) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _variable(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int]:
        keys, queries, lengths = [], [0], [0]
        for one in self.segments:
            first, before = one.before
            keys += [torch.arange(first, first + before), torch.arange(one.start, one.start + one.length)]
            queries.append(queries[-1] + one.length)
            lengths.append(lengths[-1] + before + one.length)
        longest = max(one.length for one in self.segments), max(one.before[1] + one.length for one in self.segments)
        as_int = [torch.tensor(values, dtype=torch.int32, device=device) for values in (queries, lengths)]
        return torch.cat(keys).to(device), *as_int, *longest


@dataclass
class Row:
    """One packed row of T tokens, on the CPU.

    ``ids`` (T,); ``labels`` (T,) the next token of the branch, IGNORED where there is no loss; ``places`` (N, 2) row
    and column in (B, C) of each label, in their order; ``images``: which unique picture each placeholder run shows;
    ``positions`` (3, T).
    """

    layout: Layout
    ids: torch.Tensor
    labels: torch.Tensor
    places: torch.Tensor
    images: list[int]
    positions: torch.Tensor


def lay_out(batch: dict[str, Any], rows: Sequence[int], image_token_id: int, merge: int, rope_index: Any) -> Row:
    """Pack ``rows`` of ``batch``, whose tensors must be on the CPU (:func:`vt_trl.forward.batches.on_cpu`).

    What follows the last loss token of a sample predicts nothing and is left out. ``rope_index``: the model's
    ``get_rope_index``; ``merge``: patches per side of a visual token.
    """
    layout = _Writer(batch, image_token_id, merge, rope_index)
    for members in by_prompt(batch["prompt_index"], rows):
        layout.group(members)
    return layout.finish()


class _Writer:
    def __init__(self, batch: dict[str, Any], image_token_id: int, merge: int, rope_index: Any):
        self.batch, self.image_token_id, self.merge, self.rope_index = batch, image_token_id, merge, rope_index
        self.segments: list[Segment] = []
        self.ids: list[torch.Tensor] = []
        self.labels: list[torch.Tensor] = []
        self.positions: list[torch.Tensor] = []
        self.places: list[torch.Tensor] = []
        self.images: list[int] = []
        self.length = 0

    def group(self, members: Sequence[int]) -> None:
        batch, prefix = self.batch, (self.length, 0)
        for number, row in enumerate(members):
            prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
            loss = batch["loss_mask"][row].nonzero()[:, 0]
            last = int(loss[-1]) if len(loss) else 0
            completion = batch["completion_ids"][row][: last + 1]
            whole = torch.cat([prompt, completion[:-1]])
            shown = self._shown(row, whole)
            positions = self._positions(whole, shown)
            known, rest = len(prompt) - 1, batch["prompt_images"][row]
            if number == 0 and known:
                self._add(Segment(self.length, known), whole[:known], positions[:, :known], shown[:rest])
                self.labels.append(torch.full((known,), IGNORED))
                prefix = self.segments[-1].start, known
            self._add(Segment(self.length, last + 1, prefix), whole[known:], positions[:, known:], shown[rest:])
            labels = torch.full((last + 1,), IGNORED)
            labels[loss] = completion[loss]
            self.labels.append(labels)
            self.places.append(torch.stack([torch.full_like(loss, row), loss], dim=1))

    def _add(self, segment: Segment, ids: torch.Tensor, positions: torch.Tensor, images: Sequence[int]) -> None:
        self.segments.append(segment)
        self.ids.append(ids)
        self.positions.append(positions)
        self.images += images
        self.length += segment.length

    def _shown(self, row: int, ids: torch.Tensor) -> list[int]:
        """The pictures whose placeholders lie in ``ids``: the first ones of the sample, each whole."""
        left, shown = int((ids == self.image_token_id).sum()), []
        for image in self.batch["image_index"][row] if left else ():
            if left <= 0:
                break
            left -= int(self.batch["image_grid_thw"][image].prod()) // self.merge**2
            shown.append(image)
        if left:
            raise RuntimeError(f"row {row} of the batch: its pictures do not fill its placeholders ({-left} too many)")
        return shown

    def _positions(self, ids: torch.Tensor, shown: Sequence[int]) -> torch.Tensor:
        """(3, L): the positions the model would give this sample alone and without padding."""
        if not shown:
            return torch.arange(len(ids)).expand(3, -1)
        kinds = (ids == self.image_token_id).int()[None]
        return self.rope_index(ids[None], kinds, self.batch["image_grid_thw"][list(shown)])[0][:, 0]

    def finish(self) -> Row:
        return Row(
            Layout(self.segments),
            torch.cat(self.ids),
            torch.cat(self.labels),
            torch.cat(self.places),
            self.images,
            torch.cat(self.positions, dim=1),
        )
