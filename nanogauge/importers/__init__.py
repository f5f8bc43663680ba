"""Logs that other programs wrote, turned into run logs of our own form."""
