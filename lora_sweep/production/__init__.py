"""What goes out: the decision and its files."""
