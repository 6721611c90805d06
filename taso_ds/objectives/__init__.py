"""Rows to batches, loss and scores."""
