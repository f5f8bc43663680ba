"""Prediction versus actual, from the run folder alone."""
