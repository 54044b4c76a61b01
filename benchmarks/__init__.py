"""Timings of the operators against their rivals."""
