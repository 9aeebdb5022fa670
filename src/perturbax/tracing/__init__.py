"""All that looks into JAX: comparable traces, derivative rules, mesh axes, users' functions."""
