"""The folders of a run that hold what was trained."""

ADAPTER, MODEL = "adapter", "model"
