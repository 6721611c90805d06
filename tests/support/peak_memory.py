"""The peak of what tensors take, in bytes."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch.profiler import ProfilerActivity, profile


def peak_bytes(action: Callable[[], object]) -> int:
    """Return the most memory that tensors took at any moment, above what was there at the start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        action()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        recorded.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    total = highest = 0
    for _, change in changes:
        total += change
        highest = max(highest, total)
    return highest
