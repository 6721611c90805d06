"""Scores the frozen base over all ranks: calibration rows go through it, and each matrix is scored on its owner.

Nothing here trains an adapter, opens a run folder, or imports the configuration of a run.
"""
