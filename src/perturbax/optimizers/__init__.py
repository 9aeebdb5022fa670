"""Perturbed optimizers: layers and losses made of a solver."""
