"""Occlusion sensitivity: the loss of a class when a part of the image is hidden, measured without attention.

Shapes: C channels, H and W pixels, rows and columns of window positions.
"""

import torch
from transformers.modeling_utils import PreTrainedModel

from hf_vit.evaluation.outputs import log_probabilities
from hf_vit.explain.attentions import class_logits


def occlusion_sensitivity(
    model: PreTrainedModel,
    pixel_values: torch.Tensor,
    class_index: int,
    *,
    window: tuple[int, int],
    stride: tuple[int, int],
    fill: float | None = None,
    batch_size: int = 16,
) -> torch.Tensor:
    """Return the decrease of the logarithm of a class's probability when a window hides a part of the image.

    Args:
        pixel_values: (1, C, H, W), normalised as the image processor does.
        window, stride: (height, width) in pixels. The last row and column of windows end with the image.
        fill: Value of the hidden pixels, in units of `pixel_values`; by default each channel's median over the image.
            A window brighter or darker than its surroundings is an object itself: a gray square on the black of
            handwritten digits moves their classes more than a hidden stroke does.

    Returns:
        (rows, columns); positive where the class needs what was hidden.

    Raises:
        ValueError: if the window is larger than the image, or a stride is below 1.
    """
    height, width = pixel_values.shape[2:]
    if not (1 <= window[0] <= height and 1 <= window[1] <= width and min(stride) >= 1):
        raise ValueError(
            f"window is {window} with stride {stride}: expected a window inside the image of {height}x{width} "
            "pixels and strides of 1 or more"
        )
    tops, lefts = _starts(height, window[0], stride[0]), _starts(width, window[1], stride[1])
    places = [(top, left) for top in tops for left in lefts]
    color = pixel_values[0].flatten(1).median(dim=1).values if fill is None else pixel_values.new_tensor([fill])
    whole = log_probabilities(class_logits(model, pixel_values), model.config)[0, class_index]
    drops = []
    for start in range(0, len(places), batch_size):
        batch = places[start : start + batch_size]
        hidden = pixel_values.repeat(len(batch), 1, 1, 1)
        for image, (top, left) in zip(hidden, batch, strict=True):
            image[:, top : top + window[0], left : left + window[1]] = color[:, None, None]
        drops.append(whole - log_probabilities(class_logits(model, hidden), model.config)[:, class_index])
    return torch.cat(drops).reshape(len(tops), len(lefts)).cpu()


def _starts(size: int, window: int, stride: int) -> list[int]:
    starts = list(range(0, size - window + 1, stride))
    return starts if starts[-1] == size - window else [*starts, size - window]
