"""Files that are written whole or not at all, and strict readers of JSON, YAML and safetensors.

Nothing here knows what a file is for: no name of a run's file, no method and no model may stand here.
"""
