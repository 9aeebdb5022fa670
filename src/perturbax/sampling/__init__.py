"""Samplers: how the noise of a group of samples is drawn together."""
