"""Tasks that need no files: made-up people, and real facts."""
