"""The frozen base."""
