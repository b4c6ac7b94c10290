"""hf-vit: the original Vision Transformer as a first-class Hugging Face model."""
