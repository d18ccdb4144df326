"""`ballad app`: a web page to try a model on, with its classes or your own, and the prior correction."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .options import OptionParser, add_dataclass, build, load_pipeline, option


TOP_K = 5
_PRIOR = (
    "-1: rare classes first; 0: every class alike; 1: as frequent as in training. For the model's own classes only."
)


@dataclass
class AppArguments:
    """What to serve, and where."""

    model: str
    port: int = option("port of the page", 7860)
    share: bool = option("make a public link, through Gradio's servers", False)

    def __post_init__(self) -> None:
        if not 0 < self.port < 2**16:
            raise ValueError(f"port is {self.port}: choose a number from 1 to {2**16 - 1}.")


def main(options: Sequence[str]) -> None:
    parser = OptionParser("app", "Serve a model as a web page.")
    parser.add_argument("model", metavar="MODEL", help="model directory, or model name on the Hub")
    add_dataclass(parser, AppArguments, "Page")
    parsed = vars(parser.parse_args(options))
    run(build(AppArguments, parsed, model=parsed["model"]))


def run(options: AppArguments) -> None:
    """Load the model and serve the page until Ctrl-C."""
    _import_gradio()

    classify = load_pipeline(options.model)
    if not hasattr(classify.model, "stored_class_embeds"):
        kind = type(classify.model).__name__
        raise ValueError(f"{options.model} holds a {kind}, which has no classes of its own: give a BALLAD model.")
    page = build_page(classify, options.model)
    try:
        page.launch(server_port=options.port, share=options.share, show_error=True)
    except OSError as error:
        raise OSError(f"The page can't be served on port {options.port}: {error} Choose another --port.") from error


def build_page(classify: Any, name: str) -> Any:
    """A page over one pipeline. The text tower runs once for each label that somebody types.

    Args:
        classify: the pipeline `cached-zero-shot-image-classification` over a BALLAD model.
        name: title of the page.

    Returns:
        `gradio.Blocks`; `launch` serves it.
    """
    gr = _import_gradio()
    config = classify.model.config
    has_counts = config.class_counts is not None
    with gr.Blocks(title=name, analytics_enabled=False) as page:
        gr.Markdown(
            f"# {name}\n{config.num_labels} classes: {', '.join(config.class_names[:12])}"
            + (", …" if config.num_labels > 12 else "")
        )
        with gr.Row():
            with gr.Column():
                # The file as it is: Gradio would clip 16-bit images to white.
                image = gr.Image(type="filepath", image_mode=None, label="Image", height=320)
                labels = gr.Textbox(
                    label="Your own classes, one per line",
                    info="Leave empty for the model's own."
                    if config.has_text_tower
                    else "This model has no text tower.",
                    placeholder="a red fox\na grey wolf",
                    lines=3,
                    interactive=config.has_text_tower,
                )
                prior = gr.Slider(
                    -1,
                    1,
                    value=0,
                    step=0.1,
                    label="Target prior",
                    interactive=has_counts,
                    info=_PRIOR if has_counts else "This model has no training counts.",
                )
                button = gr.Button("Classify", variant="primary")
            answer = gr.Label(num_top_classes=TOP_K, label="Classes")
        inputs = [image, labels, prior]

        def answer_for(image: Any, labels: Any, prior: Any) -> Any:
            return top_classes(classify, image, labels, prior)

        # While the slider moves, only its last position is classified.
        for event in (button.click, image.change, prior.change, labels.submit, labels.blur):
            event(answer_for, inputs, answer, trigger_mode="always_last")
    return page


def top_classes(classify: Any, image: Any, labels: str | None, prior: float) -> dict[str, float]:
    """Label -> score of the best classes; the prior applies to the model's own classes only."""
    if image is None:
        return {}
    own = list(dict.fromkeys(line.strip() for line in (labels or "").splitlines() if line.strip()))
    options: dict[str, Any] = {"candidate_labels": own} if own else {}
    if not own and classify.model.config.class_counts is not None and prior:
        options["target_prior"] = float(prior)
    try:
        return {row["label"]: row["score"] for row in classify(image, top_k=TOP_K, **options)}
    except ValueError as error:
        # The page must not show the folder of its uploads.
        message = str(error).replace(f"{os.path.dirname(str(image))}{os.sep}", "")
        raise _import_gradio().Error(message) from error


def _import_gradio() -> Any:
    try:
        import gradio
    except ImportError:
        raise ImportError("The page needs gradio: pip install 'ballad_hf[app]'") from None
    return gradio
