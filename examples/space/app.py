"""A demo page: upload an image, see its classes and the attention. Runs as a Hugging Face Space, or locally:

    python examples/space/app.py

The model is the one that the variable MODEL names, anything that `from_pretrained` opens; without it, the checkpoint
of handwritten digits that comes with the repository.
"""

import functools
import html
import os
from pathlib import Path


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr

from hf_vit import HfViTForImageClassification
from hf_vit.checkpoints import processor_of
from hf_vit.data import ImageError, read_image
from hf_vit.evaluation import answers
from hf_vit.explain import AttentionPage, image_of


DIGITS = Path(__file__).parents[1] / "checkpoints" / "vit-mnist.npz"
MODEL = os.environ.get("MODEL", str(DIGITS))
PAGE_BYTES = 8 * 2**20  # of attention; larger models show squares of patches
# Fonts of the reader's own system: gradio's themes fetch theirs from elsewhere.
THEME = gr.themes.Soft(primary_hue="orange", font=["system-ui", "sans-serif"], font_mono=["monospace"])
CSS = "#attention iframe { width: 100%; height: 960px; border: 0; border-radius: 12px; }"


@functools.cache
def load_model(name: str) -> HfViTForImageClassification:
    return HfViTForImageClassification.from_pretrained(name).eval()


def explain_image(path: str | None) -> tuple[dict[str, float] | None, str]:
    """Return the probabilities of the predicted classes, and a frame with the explorable page."""
    if path is None:
        return None, ""
    model = load_model(MODEL)
    processor = processor_of(MODEL, model.config)
    try:
        pixels = processor(read_image(path), return_tensors="pt")["pixel_values"]
    except ImageError as error:
        raise gr.Error(str(error).replace(path, Path(path).name)) from error
    seen = image_of(pixels, processor.image_mean, processor.image_std)
    page = AttentionPage(model, name=Path(MODEL).stem, max_bytes=PAGE_BYTES)
    explanation = page.add("your image", seen, pixels, num_classes=3, occlusion_steps=8)
    if explanation.logits is None:
        raise gr.Error(f"{MODEL} has no classifier: expected an image classifier in the variable MODEL")
    answer = answers(explanation.logits[None], model.config)[0]
    if answer.problem_type == "regression":
        raise gr.Error(f"{MODEL} predicts values: expected a classifier in the variable MODEL")
    frame = f'<iframe title="Attention" sandbox="allow-scripts" srcdoc="{html.escape(page.html())}"></iframe>'
    return dict(answer.scores), frame


def build() -> gr.Blocks:
    with gr.Blocks(title="Where a Vision Transformer looks", analytics_enabled=False) as app:
        gr.Markdown(
            "# Where a Vision Transformer looks\n"
            f"Upload an image. `{Path(MODEL).stem}` names what it sees, and shows which patches it looked at."
        )
        with gr.Row():
            image = gr.Image(label="Image", sources=["upload", "clipboard"], height=320)
            # The file as it was uploaded: gradio would decode it first, and clip or darken what is not RGB of 8 bits.
            image.preprocess = lambda payload: None if payload is None else payload.path
            classes = gr.Label(label="Classes", num_top_classes=5)
        attention = gr.HTML(elem_id="attention")
        image.change(explain_image, image, [classes, attention], api_name="explain")
    return app


if __name__ == "__main__":
    load_model(MODEL)
    build().launch(theme=THEME, css=CSS, ssr_mode=False)
