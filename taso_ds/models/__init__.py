"""The frozen base: what it is before its weights are loaded, how it is loaded and quantized, and its fingerprint.

Nothing here knows a task, a method or a run; what is trained on top of the base lives in ``methods``.
"""
