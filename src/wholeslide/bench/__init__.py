"""Measurements: every one in a process of its own, with the machine's facts beside the figures."""
