"""Training as the papers did it: data, augmentation, metrics, recipes, the trainer; imported module by module."""
