"""Fast inference behind the model's own interface: OpenVINO on a CPU, `torch.compile` with CUDA graphs on a GPU.

fast = prepare(HfViTForImageClassification.from_pretrained("ViT-B_16.npz"))
logits = fast(pixel_values).logits
"""

from hf_vit.inference.preparation import load_prepared, prepare


__all__ = ["load_prepared", "prepare"]
