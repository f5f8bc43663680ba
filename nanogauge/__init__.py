"""Say what a training run will cost, measure what it did cost, explain the difference."""

__version__ = "0.1.0"
