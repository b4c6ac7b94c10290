"""Images, data sets and augmentation."""
