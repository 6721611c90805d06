"""Files whole or not at all, and strict readers of text. Nothing here knows what a file is for."""
