"""The way from text to tensors: records, tasks, prompts, token ids and padded batches.

No model, no ranks and no method may be imported here.
"""
