"""The embedded base and its world."""
