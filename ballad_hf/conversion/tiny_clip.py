"""A tiny CLIP with random weights and its own tokenizer, for tests and for the built-in example without downloads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil


class DualEncoder(NamedTuple):
    """A dual encoder with its tokenizer and image processor."""

    clip: CLIPModel
    tokenizer: CLIPTokenizer
    image_processor: CLIPImageProcessorPil


def build_tiny_clip(
    image_size: int = 32,
    patch_size: int = 8,
    width: int = 64,
    layers: int = 2,
    projection_dim: int = 32,
    words: Sequence[str] = (),
    seed: int = 0,
) -> DualEncoder:
    """Build a `CLIPModel` from random weights, its tokenizer and its image processor.

    Args:
        image_size: side of the square images, in pixels.
        patch_size: side of a patch, in pixels.
        width: hidden size of both towers; 32 a head.
        layers: transformer layers of each tower.
        projection_dim: width of the joint space.
        words: words that become one token each, such as those of the class names; others are spelt in bytes.
        seed: of the weights. The global random state is restored.

    Returns:
        The model in evaluation mode, the tokenizer and the image processor.

    Example:

    >>> from ballad_hf.conversion.tiny_clip import build_tiny_clip
    >>> clip, tokenizer, image_processor = build_tiny_clip(words=["photo", "cat"])
    >>> tokenizer("a photo of a cat.")["input_ids"] == tokenizer("A photo of a CAT.")["input_ids"]
    True
    """
    tokenizer = _spelling_tokenizer(words)
    tower = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 32),
    }
    text_config = {
        **tower,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision_config = {**tower, "image_size": image_size, "patch_size": patch_size}
    config = CLIPConfig(text_config=text_config, vision_config=vision_config, projection_dim=projection_dim)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip = CLIPModel(config).eval()
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
    )
    return DualEncoder(clip, tokenizer, image_processor)


def tiny_clip_for(texts: Sequence[str], seed: int = 0) -> tuple[CLIPModel, CLIPProcessor]:
    """The small CLIP of the built-in example, with a token for each word of some texts.

    Args:
        texts: templates and class names.
        seed: of the weights.

    Returns:
        The model and its processor.
    """
    words = " ".join(texts).replace(".", " ").replace("{}", " ").split()
    built = build_tiny_clip(patch_size=4, projection_dim=64, words=words, seed=seed)
    return built.clip, CLIPProcessor(built.image_processor, built.tokenizer)


def _spelling_tokenizer(words: Sequence[str]) -> CLIPTokenizer:
    """CLIP's byte-level BPE whose merges build each given word letter by letter; any other text is spelt in bytes."""
    letters = sorted(ByteLevel.alphabet())
    tokens = letters + [letter + "</w>" for letter in letters]
    merges: list[tuple[str, str]] = []
    for word in sorted({word.lower() for word in words if word.isascii() and word.isalpha()}):
        prefix = word[0] if len(word) > 1 else ""
        for position in range(1, len(word)):
            letter = word[position] + ("</w>" if position == len(word) - 1 else "")
            if (prefix, letter) not in merges:
                merges.append((prefix, letter))
                tokens.append(prefix + letter)
            prefix += letter
    # The end token comes last: CLIP's text tower may look for the highest id.
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)
