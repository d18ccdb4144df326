"""Milliseconds an image over the number of labels: the stock zero-shot pipeline, ours, and the bare image tower.

    python benchmarks/inference.py --labels 1 100 1000 10000

A CLIP of ViT-B/32's size from random weights; all three take the same image in turns, in the same process.
"""

import argparse
import statistics
import time

import numpy as np
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.pipelines import ZeroShotImageClassificationPipeline

from ballad_hf.conversion.tiny_clip import build_tiny_clip
from ballad_hf.inference import CachedZeroShotImageClassificationPipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--labels", type=int, nargs="+", default=[1, 100, 1000, 10000])
    parser.add_argument("--repeats", type=int, default=7, help="of the image tower and our pipeline")
    parser.add_argument("--stock_up_to", type=int, default=1000, help="labels; above it stock is left out")
    arguments = parser.parse_args()

    tokenizer = build_tiny_clip().tokenizer
    torch.manual_seed(0)
    text = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id}
    text |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = CLIPModel(CLIPConfig(text_config=text)).eval()
    image_processor = CLIPImageProcessorPil()
    feeds = {"model": model, "tokenizer": tokenizer, "image_processor": image_processor}
    stock, ours = ZeroShotImageClassificationPipeline(**feeds), CachedZeroShotImageClassificationPipeline(**feeds)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (375, 500, 3), dtype=np.uint8))

    @torch.no_grad()
    def bare() -> None:
        pixel_values = image_processor(images=[image], return_tensors="pt")["pixel_values"]
        model.get_image_features(pixel_values=pixel_values)

    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; ms an image, median")
    print("| labels | image tower | ours | ours / tower | labels encoded once (s) | stock | stock / ours |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for count in arguments.labels:
        labels = [f"a thing {index}" for index in range(count)]
        start = time.perf_counter()
        ours(image, candidate_labels=labels, top_k=5)
        encoding = time.perf_counter() - start
        tower, kept = [], []
        bare()
        for _ in range(arguments.repeats):  # in turns, so that a busy machine slows both alike
            tower.append(milliseconds(bare))
            kept.append(milliseconds(lambda labels=labels: ours(image, candidate_labels=labels, top_k=5)))
        row = [str(count), f"{statistics.median(tower):.0f}", f"{statistics.median(kept):.0f}"]
        ratios = [mine / its for mine, its in zip(kept, tower, strict=True)]
        row += [f"{statistics.median(ratios):.2f}", f"{encoding:.1f}"]
        if count <= arguments.stock_up_to:
            slow = milliseconds(lambda labels=labels: stock(image, candidate_labels=labels))
            row += [f"{slow:.0f}", f"{slow / statistics.median(kept):.1f}"]
        else:
            row += ["", ""]
        print(f"| {' | '.join(row)} |", flush=True)


def milliseconds(work) -> float:
    start = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - start)


if __name__ == "__main__":
    main()
