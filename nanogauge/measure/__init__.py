"""Instruments: they receive plain numbers and know no configuration and no prediction."""
