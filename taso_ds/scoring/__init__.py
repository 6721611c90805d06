"""Calibration over ranks: rows through the frozen base, each matrix scored on its owner, core regions for all.

No adapter is trained here, and no folder of a run or configuration of one may be imported.
"""
