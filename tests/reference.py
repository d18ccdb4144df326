"""Two tiny towers in the original layouts, and what the original code computed from them."""

from pathlib import Path

import torch
from safetensors.torch import load_file


FOLDER = Path(__file__).parent / "fixtures" / "reference"
KINDS = ("vit", "resnet")
TEXT_HEADS = 2  # the one thing about them that no shape tells


def openai_file(kind: str) -> Path:
    return FOLDER / f"openai_clip_tiny_{kind}.pt"


def official_file(kind: str) -> Path:
    return FOLDER / f"official_ballad_tiny_{kind}.pth"


def openai_state(kind: str) -> dict[str, torch.Tensor]:
    return torch.load(openai_file(kind), weights_only=True)


def expected(kind: str) -> dict[str, torch.Tensor]:
    """`pixel_values`, `input_ids`, `image_features`, `text_features`, `logits_per_image` and `ballad_logits`."""
    return load_file(FOLDER / f"expected_{kind}.safetensors")


def assert_agrees(actual: torch.Tensor, original: torch.Tensor) -> None:
    """To 1e-5 of each entry; entries near zero, to 1e-5 of the tensor's own size."""
    torch.testing.assert_close(actual.detach(), original, rtol=1e-5, atol=1e-5 * original.abs().max().item())


@torch.no_grad()
def assert_is_the_original(clip, kind: str) -> None:
    """The features and logits of a dual encoder are those of the original code."""
    original = expected(kind)
    pixel_values, input_ids = original["pixel_values"], original["input_ids"]
    assert_agrees(clip.get_image_features(pixel_values=pixel_values).pooler_output, original["image_features"])
    assert_agrees(clip.get_text_features(input_ids=input_ids).pooler_output, original["text_features"])
    logits = clip(input_ids=input_ids, pixel_values=pixel_values).logits_per_image
    assert_agrees(logits, original["logits_per_image"])
