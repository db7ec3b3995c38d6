"""What was said and seen in an episode, kept: a record, its Parquet table, and how it is shown.

Training, evaluation, data pipelines and a server write the same :class:`Transcript`; ``vt-trl view`` and every page
that shows an episode read it. Nothing here knows the trainer, except :mod:`vt_trl.transcripts.log`, which serves it.
"""

from vt_trl.transcripts.looks import Part
from vt_trl.transcripts.record import Picture, PictureEncoder, Transcript, TranscriptTurn
from vt_trl.transcripts.table import read_transcripts, write_transcripts

__all__ = [
    "Part",
    "Picture",
    "PictureEncoder",
    "Transcript",
    "TranscriptTurn",
    "read_transcripts",
    "write_transcripts",
]
