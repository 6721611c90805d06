"""Memory and time of a run from the shape of its model alone: pure functions of numbers, no weights, no ranks, no GPU.

Counting the model and reading flags is ``taso_ds/planning/forecast.py``; this room may not import ``training``.
"""
