"""The method: importance, core regions, sparse adapters and their files. Tensors and numbers in, tensors out.

Torch only: no ranks, no DeepSpeed, no tokenizer, no configuration object may be imported here.
"""
