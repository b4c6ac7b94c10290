"""Pushing models to the Hub, and their cards."""
