"""Low-rank updates of the towers (LoRA, Hu et al., 2022), through `peft`, merged into plain weights at the end."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Linear layers of attention and of the transformer's MLP, by the names of transformers' dual encoders.
_LAYERS = r"(?:q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
_TOWERS = {"both": r"(?:vision_model|text_model)", "image": "vision_model", "text": "text_model"}


class LowRankUpdates:
    """Puts low-rank updates on a dual encoder's towers, in place, and takes them off again.

    Args:
        clip: the dual encoder. Its own weights are frozen; the updates take gradients.
        towers: which towers get updates.
        rank: of the updates, 1 or more.
        alpha: the updates are scaled by `alpha / rank`.
        dropout: before the updates.

    Raises:
        ImportError: `peft` is not installed.
        ValueError: a tower without linear layers to update, such as a ResNet's convolutions.
    """

    def __init__(
        self,
        clip: nn.Module,
        towers: Literal["both", "image", "text"],
        rank: int,
        alpha: float = 16.0,
        dropout: float = 0.0,
    ):
        try:
            from peft import LoraConfig
            from peft.tuners.lora import LoraModel
        except ImportError as error:
            raise ImportError("lora_rank needs the package peft: pip install 'ballad_hf[peft]'.") from error
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]  # peft takes any number
            lora_dropout=dropout,
            target_modules=rf".*{_TOWERS[towers]}\..*encoder.*\.{_LAYERS}|{_TOWERS[towers]}\..*encoder.*\.{_LAYERS}",
        )
        try:
            self._updated: Any = LoraModel(clip, config, "default")
        except ValueError as error:
            raise ValueError(
                f"The {towers!r} tower(s) of this {type(clip).__name__} have no attention and MLP layers that "
                "low-rank updates are known for: train the weights themselves (lora_rank=0), or another tower."
            ) from error
        updated = {name.split(".")[0] for name, _ in clip.named_parameters() if is_low_rank(name)}
        missing = {"vision_model", "text_model"} - updated
        if towers == "both" and missing:
            logger.warning(
                f"The {missing.pop()} of this {type(clip).__name__} has no layers that low-rank updates are known "
                "for, so only the other tower is trained: choose lora_rank=0 to train the weights of both."
            )

    def merge(self) -> None:
        """Add the updates to the weights, and make the dual encoder plain again."""
        self._updated.merge_and_unload()


def is_low_rank(name: str) -> bool:
    """Whether a parameter of this name is a low-rank update."""
    return ".lora_" in name
