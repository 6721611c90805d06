"""What a run shows of itself: the picture of its regions, and the monitors that watch it.

It knows no rank and no engine: it is told on rank 0 what happened, and never asks.
"""
