"""Models written for other libraries and runtimes: transformers, timm, ONNX, torch.export."""

from hf_vit.export.formats import export_onnx, export_program, export_timm, export_transformers


__all__ = ["export_onnx", "export_program", "export_timm", "export_transformers"]
