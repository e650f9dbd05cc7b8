"""Data for training: lines of JSON, tokens and labels, batches."""
