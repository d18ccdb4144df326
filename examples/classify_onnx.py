"""Classify a folder of pictures from ONNX files alone: onnxruntime, numpy and Pillow, no torch.

    python examples/classify_onnx.py outputs/digits/onnx path/to/pictures > classes.jsonl

The first folder is what `ballad_hf.inference.export.export_onnx` wrote.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def main(command_line):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="folder with image_classifier.onnx")
    parser.add_argument("pictures", type=Path, help="a picture, or a folder that is searched through")
    parser.add_argument("--top_k", type=int, default=5, help="classes to write for each picture")
    parser.add_argument("--batch_size", type=int, default=16)
    arguments = parser.parse_args(command_line)
    for name in ("image_classifier.onnx", "classes.json", "preprocessor_config.json"):
        if not (arguments.model / name).is_file():
            raise SystemExit(f"error: {arguments.model / name} is missing: make the folder by export_onnx.")
    if arguments.top_k < 1 or arguments.batch_size < 1:
        raise SystemExit("error: top_k and batch_size must be 1 or more.")

    session = onnxruntime.InferenceSession(arguments.model / "image_classifier.onnx")
    names = json.loads((arguments.model / "classes.json").read_text(encoding="utf-8"))["class_names"]
    rules = json.loads((arguments.model / "preprocessor_config.json").read_text(encoding="utf-8"))
    files = [arguments.pictures]
    if arguments.pictures.is_dir():
        files = sorted(file for file in arguments.pictures.rglob("*") if file.suffix.lower() in SUFFIXES)
    if not files:
        raise SystemExit(f"error: no picture under {arguments.pictures}: it must be one of {sorted(SUFFIXES)}.")

    unreadable = []
    for start in range(0, len(files), arguments.batch_size):
        batch = []
        for file in files[start : start + arguments.batch_size]:
            try:
                batch.append((file, to_pixels(file, rules)))
            except Exception as error:  # Pillow reports a damaged file in many ways
                unreadable.append(f"{file}: {error}")
        if batch:
            (logits,) = session.run(["logits"], {"pixel_values": np.stack([pixels for _, pixels in batch])})
            for (file, _), row in zip(batch, softmax(logits), strict=True):
                best = np.argsort(-row, kind="stable")[: arguments.top_k]
                classes = [{"label": names[index], "score": round(float(row[index]), 6)} for index in best]
                print(json.dumps({"file": str(file), "classes": classes}, ensure_ascii=False), flush=True)
    if unreadable:
        print(f"{len(unreadable)} of {len(files)} pictures can't be read:", *unreadable, sep="\n  ", file=sys.stderr)
        raise SystemExit(1)


def to_pixels(file, rules):
    """The picture as the network takes it (3, height, width): resized, cropped from the centre, normalised."""
    picture = ImageOps.exif_transpose(Image.open(file))
    if picture.mode.startswith("I;16"):  # which Pillow would cut off at white
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    picture = picture.convert("RGB")
    if rules.get("do_resize", True):
        size = rules["size"]
        if "shortest_edge" in size:
            # The longer side is cut down to whole pixels, as transformers does.
            short, (width, height) = size["shortest_edge"], picture.size
            sides = (int(short * width / min(picture.size)), int(short * height / min(picture.size)))
        else:
            sides = (size["width"], size["height"])
        picture = picture.resize(sides, rules.get("resample", Image.Resampling.BICUBIC))
    if rules.get("do_center_crop", True):
        crop = rules["crop_size"]
        left, top = (picture.width - crop["width"]) // 2, (picture.height - crop["height"]) // 2
        picture = picture.crop((left, top, left + crop["width"], top + crop["height"]))
    pixels = np.asarray(picture, dtype=np.float32)  # (height, width, 3)
    if rules.get("do_rescale", True):
        pixels = pixels * rules.get("rescale_factor", 1 / 255)
    if rules.get("do_normalize", True):
        pixels = (pixels - np.asarray(rules["image_mean"])) / np.asarray(rules["image_std"])
    return pixels.astype(np.float32).transpose(2, 0, 1)


def softmax(logits):
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


if __name__ == "__main__":
    main(sys.argv[1:])
