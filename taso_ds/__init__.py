"""TASO: task-aligned sparse optimization (arXiv 2509.17688) as a DeepSpeed trainer."""

__version__ = "0.1.0"
