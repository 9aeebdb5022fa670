"""The scale of the noise, sigma: numbers, arrays and matrices."""
