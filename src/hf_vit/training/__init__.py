"""Fine-tuning and training: recipes, data, augmentation, metrics, optimizers and the loop."""
