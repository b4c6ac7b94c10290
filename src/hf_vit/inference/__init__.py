"""A model prepared for fast inference on the device where it is: the same class, the same numbers, other arithmetic.

    fast = prepare(HfViTForImageClassification.from_pretrained("ViT-B_16.npz"))
    logits = fast(pixel_values).logits

On a CPU: one product for queries, keys and values; the scale of attention folded into the queries' weights; weights
packed for oneDNN with GELU and the residual sum fused in, or laid out for the BLAS library with a quicker tanh GELU,
whichever measures faster here; attention by oneDNN in one kernel, by plain products or by torch's own, likewise; a
hybrid's kernels standardised and packed once; pixel normalisation folded into the patch embedding. All of it is exact
algebra. In bfloat16 where the processor can, and in int8 (`quantization.py`).
On a GPU: `torch.compile` with CUDA graphs.
"""

from hf_vit.inference.preparation import prepare


__all__ = ["prepare"]
