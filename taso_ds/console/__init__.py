"""What a person sees: our lines and bars on the screen. What libraries print goes into a log file.

Nothing here knows a run, and nothing here loads torch.
"""
