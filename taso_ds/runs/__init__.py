"""The verbs, each from a configuration to files: train, calibrate, evaluate, export, dry run; its folder, and going on.

Only order and words live here: what a step does belongs to the room it is about.
"""
