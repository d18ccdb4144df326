"""Find mistakes in data and settings before anything is trained."""

from __future__ import annotations

import numpy as np
import torch
from transformers import BaseImageProcessor, PreTrainedModel

from ..data.image_dataset import ImageDataset
from ..data.transforms import evaluation_transform


def check_before_training(
    clip: PreTrainedModel,
    train_dataset: ImageDataset,
    image_processor: BaseImageProcessor,
    batch_size: int | None = None,
) -> None:
    """Refuse data that no classifier can be trained on, and images of a size that the tower can't take.

    Args:
        clip: the dual encoder.
        train_dataset: the training images.
        image_processor: defines the size of the pixel values.
        batch_size: of phase A, over all processes; `None` if phase A is skipped.

    Raises:
        ValueError: fewer than two classes, a class without a training image, a batch larger than the training split,
            a size that does not fit the tower.
    """
    class_names = list(train_dataset.class_names)
    if len(class_names) < 2:
        raise ValueError(
            f"The data has one class only ({', '.join(class_names)}): a classifier needs two or more. "
            "If the images of each class are in a folder of their own, name the folder above them."
        )
    empty = [class_names[index] for index in np.flatnonzero(np.asarray(train_dataset.class_counts) == 0)]
    if empty:
        raise ValueError(
            f"{len(empty)} classes have no training image: {', '.join(empty)}. Add some, or take these classes out; "
            "classes without images can be added to a trained model by model.add_classes(...)."
        )
    images = int(np.sum(train_dataset.class_counts))
    if batch_size is not None and batch_size > images:
        raise ValueError(
            f"phase_a_batch_size is {batch_size}, but there are {images} training images: choose a smaller one, "
            f"such as {max(1, min(64, images // 4))}."
        )
    pixel_values = evaluation_transform(image_processor)(train_dataset.image(0)).unsqueeze(0)  # (1, 3, H, W)
    try:
        with torch.no_grad():
            clip.get_image_features(pixel_values=pixel_values.to(clip.device, clip.dtype))
    except (ValueError, RuntimeError) as error:
        height, width = pixel_values.shape[-2:]
        raise ValueError(
            f"The image tower can't take images of {height} x {width} pixels, as the image processor makes them: "
            f"{error} Use the checkpoint's own image processor, or set its size and crop_size to the tower's."
        ) from error
