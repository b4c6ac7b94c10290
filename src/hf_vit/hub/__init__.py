"""Pushing models to the Hub, their cards, and the check of what was downloaded."""

from hf_vit.hub.push import push, write_model_card, write_stock_card
from hf_vit.hub.verification import verify


__all__ = ["push", "verify", "write_model_card", "write_stock_card"]
