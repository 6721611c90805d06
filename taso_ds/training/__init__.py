"""Composition: the base model, scoring, the loop, evaluation, export and the run folder.

Puts adapters, data and distributed together; nothing below imports it.
"""
