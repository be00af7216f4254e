"""The base model: where it lies, how it is loaded, its kinds of weights."""
