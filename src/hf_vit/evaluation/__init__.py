"""Metrics, prediction and probing of trained models."""
