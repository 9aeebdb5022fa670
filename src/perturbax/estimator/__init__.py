"""The estimator: the formula, its surrogates, its derivatives, and what is chosen by default."""
