"""Minimising with smoothed derivatives: the driver, its two ways of stepping, and what it returns."""
