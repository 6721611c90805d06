"""The loop from the first step to the last: trainer, checkpoints, learning rates, divergence.

It knows no method, no task and no run folder: what trains, what the loss is and who watches is handed in.
"""
