"""What a run trains, one file for each ``--method``: what it counts, adds to the base, saves and opens again.

Nothing here knows a run folder or the configuration of a run: a method is made from numbers and gets a base.
"""
