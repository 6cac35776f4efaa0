"""Training: schedules, data, and the demonstration on handwritten digits."""
