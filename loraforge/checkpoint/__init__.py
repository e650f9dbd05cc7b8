"""Base checkpoints on disk: streaming merge, exact unmerge, verification, extraction."""
