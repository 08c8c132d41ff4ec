"""One file per task: what its batches, steps and figures are."""
