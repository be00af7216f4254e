"""Pick LoRA hyperparameters for production."""

__version__ = "0.1.0"
