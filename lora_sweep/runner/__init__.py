"""Trains a study's cells on the devices of this machine."""
