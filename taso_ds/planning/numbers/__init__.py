"""Bytes and seconds from shapes: pure functions of numbers, each with its formula and source.

No ranks, flags, files or weights may be seen here.
"""
