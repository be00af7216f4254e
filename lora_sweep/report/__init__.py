"""A study as others see it; reads and draws only."""
