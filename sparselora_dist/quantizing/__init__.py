"""Codes in the place of a model's weights, made once with calibration data: one decoder layer in, one out."""
