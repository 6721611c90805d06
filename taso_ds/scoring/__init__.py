"""Calibration over ranks to core regions."""
