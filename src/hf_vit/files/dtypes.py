"""The dtypes of weight files under the names that each format gives them."""

import torch


FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
SAFETENSORS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
NPY = {
    "f2": torch.float16, "f4": torch.float32, "f8": torch.float64, "V2": torch.bfloat16,
    "i1": torch.int8, "i2": torch.int16, "i4": torch.int32, "i8": torch.int64,
    "u1": torch.uint8, "u2": torch.uint16, "u4": torch.uint32, "u8": torch.uint64,
}  # fmt: skip
FLAX = {str(dtype).removeprefix("torch."): dtype for dtype in NPY.values()}
