"""The project's claims, measured."""
