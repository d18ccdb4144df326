"""Custom handler of Inference Endpoints for the BALLAD model in the same repository.

`push_model_directory(..., with_handler=True)` uploads this file as `handler.py`. It needs transformers, not ballad_hf.

Request, as JSON or as the bytes of an image with its content type (`image/jpeg`; then parameters go into the query):

    {"inputs": "<image, base64>", "parameters": {"top_k": 3}}
    {"inputs": "<image, base64>", "parameters": {"candidate_labels": ["a red fox", "a grey wolf"]}}

Response: `[{"label": ..., "score": ...}, ...]`, best first. A list of images gives a list of such lists.
"""

import base64
import binascii
import io
from typing import Any

from PIL import Image
from transformers import AutoTokenizer, pipeline


PARAMETERS = ("top_k", "candidate_labels", "hypothesis_template")
DEFAULT_TOP_K = 5


class EndpointHandler:
    """Classify images into the model's own classes, or into classes given in words.

    Args:
        path: folder of the repository.
    """

    def __init__(self, path: str = ""):
        # The code to be trusted is in the repository of this file.
        self.classify = pipeline("image-classification", model=path, trust_remote_code=True)
        self.zero_shot = None
        if self.classify.model.config.has_text_tower:
            self.zero_shot = pipeline(
                "zero-shot-image-classification",
                model=self.classify.model,
                tokenizer=AutoTokenizer.from_pretrained(path, trust_remote_code=True),
                image_processor=self.classify.image_processor,
            )

    def __call__(self, data: dict[str, Any]) -> list[Any]:
        """Answer one request.

        Args:
            data: `inputs`, an image as a PIL image, as bytes or as base64 text, or a list of them; and optionally
                `parameters`: `top_k` (default 5), `candidate_labels` (a list of classes in words) and
                `hypothesis_template` (their prompt with `{}`, default: the first one that the model was trained with).

        Returns:
            Labels and scores of an image, best first; for a list of images a list of them.

        Raises:
            ValueError: no image, one that can't be read, or a wrong parameter. The endpoint answers with the message.
        """
        if "inputs" not in data:
            raise ValueError("The request has no 'inputs': send the image there, as base64 text.")
        inputs, parameters = data["inputs"], data.get("parameters") or {}
        unknown = sorted(set(parameters) - set(PARAMETERS))
        if unknown:
            raise ValueError(f"Unknown parameters {unknown}: choose from {', '.join(PARAMETERS)}.")
        top_k = parameters.get("top_k", DEFAULT_TOP_K)
        if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1:
            raise ValueError(f"top_k is {top_k!r}: pass a whole number of 1 or more.")
        images = [_read_image(image) for image in inputs] if isinstance(inputs, list) else _read_image(inputs)
        labels = parameters.get("candidate_labels")
        if labels is None:
            return self.classify(images, top_k=top_k)
        return self._zero_shot(images, labels, parameters.get("hypothesis_template"), top_k)

    def _zero_shot(self, images: Any, labels: Any, template: str | None, top_k: int) -> list[Any]:
        if self.zero_shot is None:
            raise ValueError("This model was saved without its text tower: leave candidate_labels out.")
        if not isinstance(labels, list) or not labels or not all(isinstance(label, str) for label in labels):
            raise ValueError(f"candidate_labels is {labels!r}: pass a list of classes in words.")
        template = template or self.zero_shot.model.config.templates[0]
        scores = self.zero_shot(images, candidate_labels=labels, hypothesis_template=template)
        return [rows[:top_k] for rows in scores] if isinstance(images, list) else scores[:top_k]


def _read_image(image: Any) -> Image.Image:
    """An image of a request. Text is never taken for a path or a URL: a request could name any of this machine's."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, str):
        try:
            image = base64.b64decode(image.rpartition("base64,")[2], validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError(
                f"An image that starts with {image[:40]!r} is no base64 text ({error}): send the image itself."
            ) from error
    if not isinstance(image, bytes):
        raise ValueError(f"An image is a {type(image).__name__}: send it as base64 text.")
    try:
        Image.init()
        # All that Pillow reads but PostScript, for which it runs Ghostscript.
        opened = Image.open(io.BytesIO(image), formats=[name for name in Image.ID if name != "EPS"])
        opened.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"An image of {len(image)} bytes can't be read: {error}") from error
    return opened
