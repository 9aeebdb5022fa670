"""Minimising with smoothed derivatives: the driver, two ways of stepping, what it returns."""
