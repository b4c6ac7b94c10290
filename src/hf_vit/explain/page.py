"""A self-contained HTML page for exploring a model's attention.

It makes no request: data, style and script are in the file, and its content security policy forbids others.
Attention is stored as one byte per value, q = 255 sqrt(p / p_max) for each row, with p_max, deflated and in base64.

Shapes: L blocks, K heads, N tokens, h and w patches in a column and a row.
"""

import base64
import copy
import io
import json
import math
import zlib
from importlib import resources
from typing import Any

import torch
from PIL import Image
from transformers.modeling_utils import PreTrainedModel

from hf_vit.explain.attentions import TokenGrid
from hf_vit.explain.explanation import Explanation, explain
from hf_vit.explain.maps import join_patches, joining_matrix, uniform_distance
from hf_vit.explain.weights import patch_filters, position_similarity


class AttentionPage:
    """A page on which images are explained, one after the other.

    Args:
        model: The model to explain.
        name: What the page calls it.
        num_images: Number of images that will be added, random twins included.
        max_bytes: Largest size of the attention, before compression. Larger attention is reduced by joining squares
            of patches.
    """

    def __init__(self, model: PreTrainedModel, *, name: str, num_images: int = 1, max_bytes: int = 64 * 2**20):
        self.model = model
        self.name = name
        self.bytes_per_block = max_bytes // num_images // max(model.config.num_hidden_layers, 1)
        self.images: list[dict[str, Any]] = []
        self.attentions: list[list[str]] = []
        self.distances: list[torch.Tensor] = []
        self.uniform_distances: list[float] = []

    def add(self, name: str, image: Image.Image, pixel_values: torch.Tensor, **options: Any) -> Explanation:
        """Explain an image and put it on the page.

        Args:
            name: What the page calls the image.
            image: What the model sees, as an image of the same size as `pixel_values` (1, C, H, W).
            options: Of `explain`.
        """
        config, size = self.model.config, (pixel_values.shape[2], pixel_values.shape[3])
        packed: list[str] = []
        join = 1

        def pack(layer: int, attention: torch.Tensor) -> None:
            nonlocal join
            tokens = TokenGrid.of(config, size, attention.shape[-1])
            join = self._joining(tokens, len(attention))
            joined, _ = join_patches(attention.float().cpu(), tokens, join)
            packed.append(pack_rows(joined))

        explanation = explain(self.model, pixel_values, visit=pack, **options)
        self.attentions.append(packed)
        self.distances.append(explanation.distances)
        self.uniform_distances.append(uniform_distance(explanation.tokens))
        self.images.append(_describe(name, image, explanation, join))
        return explanation

    def add_random_twin(self, name: str, image: Image.Image, pixel_values: torch.Tensor) -> Explanation:
        """Put the image on the page once more, as the same network with random weights sees it, without classes.

        A map that this network shows as well is not evidence of what the trained one has learned.
        """
        trained, distances = self.model, (list(self.distances), list(self.uniform_distances))
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            twin: Any = type(trained)(copy.deepcopy(trained.config)).to(trained.device, trained.dtype).eval()
        self.model = twin
        try:
            return self.add(f"{name}, random weights", image, pixel_values, num_classes=0, occlusion_steps=0)
        finally:
            self.model = trained
            self.distances, self.uniform_distances = distances  # figures of the trained model alone

    def mean_distances(self) -> torch.Tensor:
        """Return the mean attention distance over the images, (L, K) in pixels."""
        return torch.stack(self.distances).mean(dim=0)

    def uniform_distance(self) -> float:
        """Return the attention distance of uniform attention over the same images, in pixels."""
        return sum(self.uniform_distances) / len(self.uniform_distances)

    def html(self) -> str:
        """Return the page."""
        positions = position_similarity(self.model)
        filters = patch_filters(self.model)
        data = {
            "model": self.name,
            "pooling": getattr(self.model.config, "pooling", "token"),
            "images": self.images,
            "distances": self.mean_distances().tolist(),
            "uniform_distance": self.uniform_distance(),
            "filters": _png(_filter_sheet(filters)),
            "positions": None
            if positions is None
            else {"grid": list(positions.shape[:2]), "values": _bytes((positions + 1) / 2)},
        }
        blocks = "\n".join(
            f'<script type="text/plain" id="attention-{image}-{layer}">{packed}</script>'
            for image, layers in enumerate(self.attentions)
            for layer, packed in enumerate(layers)
        )
        text = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
        template = resources.files("hf_vit.explain").joinpath("page.html").read_text(encoding="utf-8")
        return template.replace("{{attention}}", blocks).replace("{{data}}", text)

    def _joining(self, tokens: TokenGrid, heads: int) -> int:
        """Return the side in patches of the smallest squares whose attention fits the budget of a block."""
        join = 1
        while join < max(tokens.size):
            squares = math.prod(-(-side // join) for side in tokens.size) + tokens.num_prefix_tokens
            if heads * squares**2 <= self.bytes_per_block:
                break
            join += 1
        return join


def pack_rows(attention: torch.Tensor) -> str:
    """Return (K, N, N) as base64 of deflated bytes: all q = 255 sqrt(p / p_max), then p_max (K, N) as float32."""
    largest = attention.amax(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)  # (K, N)
    steps = ((attention / largest[..., None]).clamp(min=0).sqrt() * 255).round().to(torch.uint8)
    return _base64(zlib.compress(steps.numpy().tobytes() + largest.numpy().astype("<f4").tobytes(), 6))


def unpack_rows(packed: str, heads: int, tokens: int) -> torch.Tensor:
    """Return what `pack_rows` stored, (K, N, N), to 0.4% of each row's maximum."""
    data = bytearray(zlib.decompress(base64.b64decode(packed)))
    count = heads * tokens * tokens
    steps = torch.frombuffer(data, dtype=torch.uint8, count=count).reshape(heads, tokens, tokens)
    largest = torch.frombuffer(data, dtype=torch.float32, offset=count).reshape(heads, tokens, 1)
    return (steps.float() / 255).square() * largest


def _describe(name: str, image: Image.Image, explanation: Explanation, join: int) -> dict[str, Any]:
    tokens = explanation.tokens
    height, width = (min(n * p, s) for n, p, s in zip(tokens.size, tokens.patch, image.size[::-1], strict=True))
    weights = explanation.pooling @ joining_matrix(tokens, join)
    return {
        "name": name,
        "image": _png(image.crop((0, 0, width, height))),
        "width": width,
        "height": height,
        "grid": [-(-side // join) for side in tokens.size],
        "cell": [side * join for side in tokens.patch],
        "patches": list(tokens.size),
        "join": join,
        "prefix": tokens.num_prefix_tokens,
        "heads": explanation.pooled_attention.shape[1],
        "weights": weights.tolist(),
        "rollout": _map(explanation.rollout_map),
        "colors": {"size": list(tokens.size), "values": _bytes(explanation.colors)},
        "classes": [
            {
                "label": found.label,
                "probability": found.probability,
                "relevance": _map(found.relevance),
                "occlusion": None if found.occlusion is None else _map(found.occlusion.clamp(min=0)),
                "agreement": found.agreement,
            }
            for found in explanation.classes
        ],
    }


def _map(values: torch.Tensor) -> dict[str, Any]:
    largest = values.max().clamp(min=torch.finfo(torch.float32).tiny)
    return {"size": list(values.shape), "values": _bytes(values / largest)}


def _bytes(values: torch.Tensor) -> str:
    """Return values of 0...1 as one byte each, in base64."""
    return _base64((values.clamp(0, 1) * 255).round().to(torch.uint8).contiguous().numpy().tobytes())


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{_base64(buffer.getvalue())}"


def _filter_sheet(filters: torch.Tensor) -> Image.Image:
    """Return the filters (count, C, height, width) as an image, seven per row, one transparent pixel apart."""
    colors = filters if filters.shape[1] == 3 else filters.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    height, width = filters.shape[2:]
    sheet = Image.new("RGBA", (7 * (width + 1) - 1, -(-len(filters) // 7) * (height + 1) - 1))
    for i, color in enumerate(colors):
        pixels = ((0.5 + color / 2) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
        sheet.paste(Image.fromarray(pixels.numpy()), ((i % 7) * (width + 1), (i // 7) * (height + 1)))
    return sheet
