"""The scripts, each of which parses and calls one function of a room below; `taso VERB` runs them too.

Nothing is decided here.
"""
