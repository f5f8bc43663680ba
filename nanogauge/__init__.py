"""Predict the time, memory, energy and cost of a training run, measure them, explain errors."""

__version__ = "0.1.0"
