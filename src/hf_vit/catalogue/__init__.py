"""The published checkpoints: names, addresses, checksums and class names."""
