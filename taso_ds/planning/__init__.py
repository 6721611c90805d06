"""Memory and time of a run before it is queued: the forecast, its words, and the check of this host.

What is computed from numbers alone lives in ``numbers``; here a job is counted, and nothing loads.
"""
