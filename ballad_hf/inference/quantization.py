"""8-bit integers for an exported image classifier, by onnxruntime's static quantisation.

Weights get a scale for each channel; activations get one for each tensor, from the range that they have on images like
those to come. A scale that depends on the batch (dynamic quantisation) would make a prediction depend on the images
beside it.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from transformers import BaseImageProcessor

from ..data.image_dataset import as_image_dataset
from ..data.transforms import evaluation_transform


logger = logging.getLogger(__name__)

# Products, which are nearly all of the arithmetic, and the activations that fuse with them. Sums, normalisation and
# softmax are cheap, and lose most by rounding.
_OPERATORS = ["Conv", "Gemm", "MatMul", "Clip", "Relu"]
# The ends of the network stay in float32, where rounding costs most and time least: the first two convolutions (in
# EfficientNet-Lite the second is depthwise) and the last three products (image projection, adapter, class embeddings).
# With them, the loss in log-likelihood is a fifth of that of the whole network in int8; see docs/inference.md.
_FIRST_CONVOLUTIONS, _LAST_PRODUCTS = 2, 3
_BATCH_SIZE = 32
_LEAST_AGREEMENT = 0.9  # with the float32 predictions; below, there is a warning


def calibration_pixels(
    dataset: Any, image_processor: BaseImageProcessor, num_samples: int, seed: int = 0
) -> np.ndarray:
    """Pixel values of images drawn from a dataset.

    Args:
        dataset: anything that `as_image_dataset` takes.
        image_processor: of the model.
        num_samples: how many images; all where there are fewer.
        seed: of the choice.

    Returns:
        (images, 3, height, width) float32.

    Raises:
        ValueError: no images.
        UnreadableImageError: an image that was drawn can't be read.
    """
    images = as_image_dataset(dataset).with_transform(evaluation_transform(image_processor))
    if num_samples < 1 or not len(images):
        raise ValueError(
            f"There are {len(images)} calibration images, and num_calibration_samples is {num_samples}: give at least "
            "one image; a few hundred are enough."
        )
    chosen = np.sort(np.random.default_rng(seed).permutation(len(images))[:num_samples])
    return np.stack([images[index]["pixel_values"].numpy() for index in chosen])  # (images, 3, height, width)


def quantize_int8(file: Path, pixel_values: np.ndarray) -> float:
    """Replace an image classifier in float32 by its quantised form.

    Args:
        file: ONNX, from `pixel_values` to `logits`.
        pixel_values: (images, 3, height, width) float32, to measure the ranges of the activations on.

    Returns:
        Fraction of these images for which both predict the same class.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    expected = _predictions(file, pixel_values)
    with tempfile.TemporaryDirectory() as folder:
        prepared, quantized = Path(folder, "prepared.onnx"), Path(folder, "quantized.onnx")
        # Symbolic shape inference fails on a norm over the features, and the exporter has written all shapes.
        quant_pre_process(file, prepared, skip_symbolic_shape=True)
        nodes = onnx.load(prepared).graph.node
        convolutions = [node.name for node in nodes if node.op_type == "Conv"]
        products = [node.name for node in nodes if node.op_type in ("Gemm", "MatMul")]
        quantize_static(
            prepared,
            quantized,
            _CalibrationReader(pixel_values),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=_OPERATORS,
            nodes_to_exclude=convolutions[:_FIRST_CONVOLUTIONS] + products[-_LAST_PRODUCTS:],
            per_channel=True,
            activation_type=QuantType.QUInt8,  # with signed weights: what x86 and Arm have instructions for
            weight_type=QuantType.QInt8,
        )
        agreement = float(np.mean(_predictions(quantized, pixel_values) == expected))
        shutil.copyfile(quantized, file)
    message = "int8 predicts the float32 model's class for %.1f %% of the %d calibration images."
    if agreement < _LEAST_AGREEMENT:
        message += " Evaluate it before use; more calibration images may help, else export without quantize."
    logger.log(
        logging.WARNING if agreement < _LEAST_AGREEMENT else logging.INFO, message, 100 * agreement, len(expected)
    )
    return agreement


class _CalibrationReader:
    """What onnxruntime reads calibration images from."""

    def __init__(self, pixel_values: np.ndarray):
        self._batches = _batches(pixel_values)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._batches, None)


def _batches(pixel_values: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    for start in range(0, len(pixel_values), _BATCH_SIZE):
        yield {"pixel_values": pixel_values[start : start + _BATCH_SIZE]}


def _predictions(file: Path, pixel_values: np.ndarray) -> np.ndarray:
    """Class indices: (images,)."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(["logits"], batch)[0].argmax(axis=1) for batch in _batches(pixel_values)])
