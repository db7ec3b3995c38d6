"""Evaluation by the rollout loop that trains: model x data x policy, judged, resumable, reported, compared."""

from vt_trl.evaluation.rows import Evaluation, RowResult, play_rows

__all__ = ["Evaluation", "RowResult", "play_rows"]
