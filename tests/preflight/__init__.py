"""Predictions of a run."""
