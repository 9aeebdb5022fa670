"""Functions outside JAX: where they run, what they return, and what is kept of it."""
