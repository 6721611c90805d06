"""What a flag is, and its ways in and out: command line, file, ``--help``, names of other trainers, verbs to start.

What the flags of a room mean is said in that room. Nothing here loads torch.
"""
