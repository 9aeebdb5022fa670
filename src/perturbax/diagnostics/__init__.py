"""What an estimate and a noise are worth."""
