"""What a model is trained for: how rows become batches, a loss and scores. An objective is one file.

No method, no training loop and no configuration of a whole run may be imported here.
"""
