"""An exported ONNX folder as a classifier: onnxruntime, NumPy and Pillow, without torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..data.images import UnreadableImageError, open_image
from ..files import read_json


NETWORK, CLASSES, PREPROCESSING = "image_classifier.onnx", "classes.json", "preprocessor_config.json"


def is_onnx_folder(name: str) -> bool:
    """Whether a name is a folder of `export_onnx`, and no model directory."""
    return (Path(name) / NETWORK).is_file() and not (Path(name) / "config.json").is_file()


class OnnxClassifier:
    """Classifies image files with an exported model.

    Args:
        folder: written by `export_onnx`.

    Raises:
        ImportError: onnxruntime is not installed.
        FileNotFoundError: a file of the folder is missing.
        ValueError: a file of it is damaged.
    """

    def __init__(self, folder: str | Path):
        try:
            import onnxruntime
        except ImportError:
            raise ImportError("An ONNX model needs onnxruntime: pip install 'ballad_hf[onnx]'") from None
        folder = Path(folder)
        self.class_names: list[str] = read_json(folder / CLASSES).get("class_names", [])
        self._rules = read_json(folder / PREPROCESSING)
        try:
            available = onnxruntime.get_available_providers()
            providers = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in available]
            self._session = onnxruntime.InferenceSession(str(folder / NETWORK), providers=providers)
        # onnxruntime's errors share no base class.
        except Exception as error:
            raise ValueError(f"{folder / NETWORK} can't be loaded: {error}") from error
        classes = self._session.get_outputs()[0].shape[-1]
        if len(self.class_names) != classes:
            raise ValueError(
                f"{folder / CLASSES} holds {len(self.class_names)} class names for {classes} logits: export the model "
                "again."
            )

    def __call__(
        self, files: Sequence[str], *, batch_size: int, top_k: int, num_threads: int = 1
    ) -> Iterator[list[dict[str, Any]]]:
        """The best classes of each image as `{"label", "score"}`, in order; none for an image that can't be read."""
        with ThreadPoolExecutor(max(1, num_threads)) as threads:
            for start in range(0, len(files), batch_size):
                yield from self._batch(list(threads.map(self._read, files[start : start + batch_size])), top_k)

    def _read(self, file: str) -> np.ndarray | None:
        try:
            return pixel_values(open_image(file), self._rules)
        except UnreadableImageError:
            return None

    def _batch(self, images: list[np.ndarray | None], top_k: int) -> Iterator[list[dict[str, Any]]]:
        readable = [image for image in images if image is not None]
        if not readable:
            yield from ([] for _ in images)
            return
        # Unreadable images keep their row, so that every batch has the same size.
        batch = np.stack([np.zeros_like(readable[0]) if image is None else image for image in images])
        (logits,) = self._session.run(["logits"], {"pixel_values": batch})  # (batch, classes)
        if not np.isfinite(logits).all():
            raise ValueError("The model's logits hold NaN or infinity: export it again from finite weights.")
        scores = np.exp(logits - logits.max(axis=1, keepdims=True))
        scores /= scores.sum(axis=1, keepdims=True)
        for image, row in zip(images, scores, strict=True):
            best: list[int] = [] if image is None else np.argsort(-row, kind="stable")[:top_k].tolist()
            yield [{"label": self.class_names[index], "score": float(row[index])} for index in best]


def pixel_values(image: Image.Image, rules: dict[str, Any]) -> np.ndarray:
    """An image as the network takes it: resized, cropped at the centre and normalised.

    Args:
        image: RGB.
        rules: content of `preprocessor_config.json`.

    Returns:
        (3, height, width) float32.
    """
    if rules.get("do_resize", True):
        size = rules["size"]
        if "shortest_edge" in size:
            # The longer side is rounded down to whole pixels, as in transformers.
            short, (width, height) = size["shortest_edge"], image.size
            sides = (int(short * width / min(image.size)), int(short * height / min(image.size)))
        else:
            sides = (size["width"], size["height"])
        image = image.resize(sides, rules.get("resample", Image.Resampling.BICUBIC))
    if rules.get("do_center_crop", "crop_size" in rules):
        crop = rules["crop_size"]
        left, top = (image.width - crop["width"]) // 2, (image.height - crop["height"]) // 2
        image = image.crop((left, top, left + crop["width"], top + crop["height"]))
    pixels = np.asarray(image, dtype=np.float32)  # (height, width, 3)
    if rules.get("do_rescale", True):
        pixels = pixels * np.float32(rules.get("rescale_factor", 1 / 255))
    if rules.get("do_normalize", True):
        pixels = (pixels - np.asarray(rules["image_mean"])) / np.asarray(rules["image_std"])
    return pixels.astype(np.float32).transpose(2, 0, 1)
