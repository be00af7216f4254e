"""Measurements of the project itself, made where it runs.

Nothing is imported here: the process of an HF Trainer trial, whose start-up is timed, comes through this file.
"""
