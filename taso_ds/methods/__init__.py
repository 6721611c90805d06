"""What a run trains, one file for each ``--method``: what it counts, attaches to the base, saves and opens again.

It knows no run folder and no configuration: a method is made from numbers and handed a base.
"""
