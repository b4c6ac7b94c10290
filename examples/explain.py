"""Look inside a model: where it looks in your pictures, what its classes rest on, what its weights have learned.

python examples/explain.py --model_name_or_path ViT-B_16.npz --output_dir explained cat.jpg dog.png

Writes `index.html`, one page that needs nothing else, and PNGs under `figures/`.
"""

import argparse
import re
import sys
from pathlib import Path

from tqdm import tqdm
from transformers.modeling_utils import PreTrainedModel

from hf_vit import HfViTForImageClassification
from hf_vit.checkpoints import processor_of
from hf_vit.data.images import ImageError, read_image
from hf_vit.explain import patch_filters, position_similarity
from hf_vit.explain.figures import (
    draw_distances,
    draw_filters,
    draw_heads,
    draw_overview,
    draw_positions,
    picture_of,
    save_figure,
)
from hf_vit.explain.page import AttentionPage
from hf_vit.files.atomic import atomic_folder


WRITTEN = ("index.html", "figures")


def main(argv: list[str]) -> int:
    args = parse_arguments(argv)
    model = HfViTForImageClassification.from_pretrained(args.model_name_or_path).eval()
    processor = processor_of(args.model_name_or_path, model.config, image_size=args.image_size)
    try:
        pictures = [(Path(path).name, read_image(path)) for path in args.images]
    except ImageError as error:
        print(error, file=sys.stderr)
        return 1
    page = AttentionPage(
        model,
        name=Path(args.model_name_or_path).stem,
        num_pictures=len(pictures),
        max_bytes=args.page_megabytes * 2**20,
    )
    with atomic_folder(args.output_dir, owned=WRITTEN) as staging:
        figures = staging / "figures"
        figures.mkdir()
        for number, (name, picture) in enumerate(tqdm(pictures, unit="picture", disable=None), start=1):
            pixels = processor(picture, return_tensors="pt")["pixel_values"]
            seen = picture_of(pixels, processor.image_mean, processor.image_std)
            explanation = page.add(name, seen, pixels, num_classes=args.top_k, occlusion_steps=args.occlusion_steps)
            stem = f"{number:02d}-{re.sub(r'[^A-Za-z0-9._-]+', '_', Path(name).stem)}"
            save_figure(draw_overview(explanation, seen), figures / f"{stem}-overview.png")
            save_figure(draw_heads(explanation, seen), figures / f"{stem}-heads.png")
        draw_weights(model, page, figures)
        (staging / "index.html").write_text(page.html(), encoding="utf-8")
    print(f"open {Path(args.output_dir) / 'index.html'} in a browser; figures are beside it")
    return 0


def draw_weights(model: PreTrainedModel, page: AttentionPage, folder: Path) -> None:
    """Write the figures that belong to the model: filters, positions, and distances over all the pictures."""
    save_figure(draw_filters(patch_filters(model)), folder / "model-filters.png")
    save_figure(draw_distances(page.mean_distances()), folder / "model-distances.png")
    positions = position_similarity(model)
    if positions is not None:
        save_figure(draw_positions(positions), folder / "model-positions.png")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="Picture files.")
    parser.add_argument("--model_name_or_path", required=True, help="Anything that from_pretrained opens.")
    parser.add_argument("--output_dir", required=True, help="Folder to write; what else it holds stays.")
    parser.add_argument("--top_k", type=int, default=3, help="How many of the most probable classes are explained.")
    parser.add_argument("--image_size", type=int, nargs=2, metavar=("H", "W"), help="Pixels; default: the model's.")
    parser.add_argument("--occlusion_steps", type=int, default=12, help="Most windows along a side; 0 for none.")
    parser.add_argument("--page_megabytes", type=int, default=64, help="Most attention on the page, uncompressed.")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
