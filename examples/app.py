"""A page to try a model in the browser: its top classes, classes that you type, and the prior correction.

pip install 'ballad_hf[app]'
python examples/app.py outputs/digits
"""

import argparse
import os
import sys

import gradio as gr
from transformers import pipeline

from ballad_hf.inference import TASK


SHOWN = 5
PRIOR = (
    "-1: rare classes first; 0: every class alike; 1: as frequent as in training. For the model's own classes only."
)


def main(command_line: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a folder that was trained or saved, or a name on the Hub")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--share", action="store_true", help="make a public link, through Gradio's servers")
    arguments = parser.parse_args(command_line)
    try:
        classify = pipeline(TASK, model=arguments.model)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: the model {arguments.model} can't be loaded: {error}") from error
    if not hasattr(classify.model, "stored_class_embeds"):
        kind = type(classify.model).__name__
        raise SystemExit(f"error: {arguments.model} holds a {kind}, which has no classes of its own: give a Ballad.")
    page = build_page(classify, arguments.model)
    try:
        page.launch(server_port=arguments.port, share=arguments.share, show_error=True)
    except OSError as error:
        raise SystemExit(f"error: the page can't be served at --port {arguments.port}: {error}") from error


def build_page(classify, name: str) -> gr.Blocks:
    """The page over one pipeline; the text tower runs once for each label that somebody types."""
    config = classify.model.config
    has_counts = config.class_counts is not None
    with gr.Blocks(title=name, analytics_enabled=False) as page:
        gr.Markdown(
            f"# {name}\n{config.num_labels} classes: {', '.join(config.class_names[:12])}"
            + (", …" if config.num_labels > 12 else "")
        )
        with gr.Row():
            with gr.Column():
                # The file as it came: Gradio would cut pictures of 16 bits off at white.
                picture = gr.Image(type="filepath", image_mode=None, label="Picture", height=320)
                typed = gr.Textbox(
                    label="Classes of your own, one a line",
                    info="Leave it empty for the model's own."
                    if config.has_text_tower
                    else "No text tower, no classes.",
                    placeholder="a red fox\na grey wolf",
                    lines=3,
                    interactive=config.has_text_tower,
                )
                dial = gr.Slider(
                    -1,
                    1,
                    value=0,
                    step=0.1,
                    label="Prior",
                    interactive=has_counts,
                    info=PRIOR if has_counts else "This model keeps no training counts.",
                )
                button = gr.Button("Classify", variant="primary")
            answer = gr.Label(num_top_classes=SHOWN, label="Classes")
        given = [picture, typed, dial]

        def answer_for(picture, typed, dial):
            return top_classes(classify, picture, typed, dial)

        # However the dial moves: by mouse, by keyboard, by its number. On the way only the last place is asked for.
        for event in (button.click, picture.change, dial.change, typed.submit, typed.blur):
            event(answer_for, given, answer, trigger_mode="always_last")
    return page


def top_classes(classify, picture, typed: str, dial: float) -> dict[str, float]:
    """Label -> score of the best classes; the dial counts for the model's own classes only."""
    if picture is None:
        return {}
    labels = list(dict.fromkeys(line.strip() for line in (typed or "").splitlines() if line.strip()))
    wanted = {"candidate_labels": labels} if labels else {}
    if not labels and classify.model.config.class_counts is not None and dial:
        wanted["target_prior"] = float(dial)
    try:
        return {row["label"]: row["score"] for row in classify(picture, top_k=SHOWN, **wanted)}
    except ValueError as error:
        # Nobody knows the folder that uploads go to.
        raise gr.Error(str(error).replace(f"{os.path.dirname(str(picture))}{os.sep}", "")) from error


if __name__ == "__main__":
    main(sys.argv[1:])
