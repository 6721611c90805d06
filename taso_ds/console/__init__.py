"""What a person sees: our lines and bars on the screen, and what libraries print in a log file.

Nothing here knows a run, and nothing loads torch.
"""
