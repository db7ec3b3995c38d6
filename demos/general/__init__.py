"""Demo of general VQA: one turn, and a judge that decides."""
