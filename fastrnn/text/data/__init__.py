"""From text on disk to batches: `corpus` reads and splits, `tokens` makes vocabularies, `stream` cuts batches."""
