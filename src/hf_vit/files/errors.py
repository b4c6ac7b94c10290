"""The error that every reader of weight files raises."""


class CheckpointError(ValueError):
    """A weight file is defective or unsupported: names the file, the array, what was found and what was expected."""
