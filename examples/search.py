"""Find the images that are most similar to an image, in the shards of `embed.py`.

python examples/search.py --embeddings embeddings query.jpg --top_k 5

The search is exact; with FAISS installed, `datasets` builds the index.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

from hf_vit import HfViTModel
from hf_vit.checkpoints import processor_of
from hf_vit.cli import run
from hf_vit.data import read_image
from hf_vit.evaluation import checksum_of, embed, normalized, read_shards, search


def main(argv: list[str]) -> int:
    args = parse_arguments(argv)
    table, settings = read_shards(args.embeddings)
    embeddings = np.array(table["embedding"].to_pylist(), dtype=np.float32)
    queries = embed_queries(args.images, settings, args.model_name_or_path)
    find = search_with_faiss if importlib.util.find_spec("faiss") else search
    scores, rows = find(embeddings, queries, top_k=args.top_k)
    paths = table["path"].to_pylist()
    results = {
        query: [{"path": paths[row], "similarity": float(score)} for score, row in zip(*pair, strict=True)]
        for query, *pair in zip(args.images, scores, rows, strict=True)
    }
    if args.json:
        print(json.dumps(results, indent=2, ensure_ascii=False))
        return 0
    for query, found in results.items():
        print(query)
        for item in found:
            print(f"  {item['similarity']:6.3f}  {item['path']}")
    return 0


def embed_queries(images: list[str], settings: dict[str, Any], model_name: str | None) -> np.ndarray:
    """Return the features (M, D) of the query images, from the model that wrote the shards.

    Raises:
        ValueError: If the model is another one.
    """
    fields = {} if settings["image_size"] is None else {"image_size": settings["image_size"]}
    source = model_name or settings["model"]
    model = HfViTModel.from_pretrained(source, **fields).eval()
    if checksum_of(model) != settings["model_sha256"]:
        raise ValueError(f"{source} is not the model that wrote these embeddings ({settings['model']}): its weights "
                         "differ; give that model with --model_name_or_path")  # fmt: skip
    processor = processor_of(source, model.config)
    pixels = processor([read_image(path) for path in images], return_tensors="pt")["pixel_values"]
    model.to(getattr(torch, settings["dtype"]))
    with torch.inference_mode():
        found = embed(model, pixels.to(model.dtype), pooling=settings["pooling"], layer=settings["layer"])
    return found.float().numpy()


def search_with_faiss(embeddings: np.ndarray, queries: np.ndarray, *, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return what `search` returns, from a FAISS index."""
    import faiss  # ty: ignore[import-not-found]

    dataset = datasets.Dataset.from_dict({"embedding": normalized(embeddings)})
    dataset.add_faiss_index("embedding", metric_type=faiss.METRIC_INNER_PRODUCT)
    found = dataset.search_batch("embedding", normalized(queries), k=min(top_k, len(dataset)))
    return np.array(found.total_scores), np.array(found.total_indices)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="Query images.")
    parser.add_argument("--embeddings", required=True, type=Path, help="Folder that embed.py wrote.")
    parser.add_argument("--model_name_or_path", help="The model that wrote them; by default where it was then.")
    parser.add_argument("--top_k", type=int, default=10, help="Number of images found for each query.")
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run(main))
