"""Laws of noise: how to draw them, their log-density, and how many derivatives they allow."""
