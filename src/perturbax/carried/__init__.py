"""What the steps of an optimisation before this one saw, put to use without bias."""
