"""Vision transformers that look closely only where it matters: tokens of two scales, region by region."""
