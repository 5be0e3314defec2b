"""Zeros in the place of the weights that matter least: one decoder layer in, one out."""
