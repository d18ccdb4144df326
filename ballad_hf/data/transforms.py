"""Transforms from images to pixel values, with the numbers of the checkpoint's image processor.

Every transform is a frozen dataclass of plain values, so that a cache can distinguish transforms, and a function
`transform(image, rng)` that draws from the given generator alone. Each resizes once; the training transform crops in
the same step, so that only the pixels it keeps are computed.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageEnhance


# As in torchvision's RandomResizedCrop: width over height, and the attempts before it takes the centre.
_ASPECT_RATIOS = (3 / 4, 4 / 3)
_LOG_ASPECT_RATIOS = (math.log(3 / 4), math.log(4 / 3))
_ATTEMPTS = 10

# A JPEG is decoded to at least this many times the side that the crop is resized to: the resize would average away the
# detail that the decoder leaves out.
_REDUCING_GAP = 2.0

CropShape = Literal["convex", "linear", "concave"]


@dataclass(frozen=True)
class PixelFormat:
    """The input that an image tower takes, as its image processor makes it.

    Args:
        height, width: of the input, in pixels.
        resize: size before the centre crop: of the shorter side, or (height, width), or `None` for no resize.
        resample: Pillow's number of the filter.
        rescale_factor: multiplies the grey levels.
        mean, std: of each channel, for normalising the rescaled values.
    """

    height: int
    width: int
    resize: int | tuple[int, int] | None
    resample: int
    rescale_factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, image_processor: Any) -> PixelFormat:
        """Read the numbers of an image processor.

        Raises:
            ValueError: its output varies in size, or it has a step that is not supported here.
        """
        for step in ("do_pad", "do_flip_channel_order", "do_reduce_labels", "do_thumbnail", "do_align_long_axis"):
            if getattr(image_processor, step, None):
                raise ValueError(
                    f"The image processor {type(image_processor).__name__} has {step} set, which is not supported: "
                    "unset it, or give a transform of your own."
                )
        resized = _size(image_processor, "size") if _does(image_processor, "do_resize") else {}
        cropped = _size(image_processor, "crop_size") if _does(image_processor, "do_center_crop") else {}
        exact = {"height", "width"}
        if not (exact <= set(cropped) or exact <= set(resized)) or not (
            not resized or set(resized) == {"shortest_edge"} or exact <= set(resized)
        ):
            raise ValueError(
                f"The image processor resizes to {resized or 'nothing'} and crops to {cropped or 'nothing'}, so "
                "images differ in size: set crop_size to a height and a width, and size to the same or to a "
                "shortest_edge."
            )
        target = cropped if cropped else resized
        if exact <= set(resized) and cropped and resized != cropped:
            raise ValueError(
                f"The image processor resizes to {resized} whatever the shape, then crops to {cropped}: set size to a "
                "shortest_edge, or both to the same."
            )
        normalises = _does(image_processor, "do_normalize")
        return cls(
            height=target["height"],
            width=target["width"],
            resize=resized.get("shortest_edge") or ((resized["height"], resized["width"]) if resized else None),
            resample=int(_filter_of(image_processor)),
            rescale_factor=float(image_processor.rescale_factor) if _does(image_processor, "do_rescale") else 1.0,
            mean=_channels(image_processor.image_mean) if normalises else (0.0, 0.0, 0.0),
            std=_channels(image_processor.image_std) if normalises else (1.0, 1.0, 1.0),
        )

    def tensor(self, image: Image.Image) -> torch.Tensor:
        """Pixel values of an image of the right size: (3, height, width) float32."""
        grey_levels = np.asarray(image)  # (height, width, 3) uint8
        scale = np.array([self.rescale_factor / std for std in self.std], dtype=np.float32)
        shift = np.array([mean / std for mean, std in zip(self.mean, self.std, strict=True)], dtype=np.float32)
        pixel_values = np.empty((3, *grey_levels.shape[:2]), dtype=np.float32)  # (3, height, width)
        np.multiply(grey_levels.transpose(2, 0, 1), scale[:, None, None], out=pixel_values)
        pixel_values -= shift[:, None, None]
        return torch.from_numpy(pixel_values)


@dataclass(frozen=True)
class EvaluationTransform:
    """The transform of the image processor: resize, centre crop, normalise."""

    pixel_format: PixelFormat

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> torch.Tensor:
        """Pixel values: (3, height, width) float32; `rng` is not used."""
        pixel_format = self.pixel_format
        width, height = image.size
        resized_height, resized_width = _resized(height, width, pixel_format.resize)
        # Resized whole, then cropped: a box in one step would differ by rounding from the processor's pixels.
        resized = image.resize((resized_width, resized_height), Image.Resampling(pixel_format.resample))
        left, top = _start(resized_width, pixel_format.width), _start(resized_height, pixel_format.height)
        return pixel_format.tensor(resized.crop((left, top, left + pixel_format.width, top + pixel_format.height)))


@dataclass(frozen=True)
class FiveCropTransform:
    """Crops of the centre and the four corners of a slightly larger image, for averaging over views."""

    pixel_format: PixelFormat
    expand: int

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> torch.Tensor:
        """Pixel values: (5, 3, height, width) float32, centre first; `rng` is not used."""
        pixel_format = self.pixel_format
        if isinstance(pixel_format.resize, int):
            target: int | tuple[int, int] = max(pixel_format.height, pixel_format.width) + self.expand
        else:
            target = (pixel_format.height + self.expand, pixel_format.width + self.expand)
        height, width = _resized(image.height, image.width, target)
        resized = image.resize((width, height), Image.Resampling(pixel_format.resample))
        right, bottom = width - pixel_format.width, height - pixel_format.height
        # torchvision's `five_crop`, which LIFT uses, rounds the centre's odd half pixels to even.
        corners = [(round(right / 2), round(bottom / 2)), (0, 0), (right, 0), (0, bottom), (right, bottom)]
        crops = [
            resized.crop((left, top, left + pixel_format.width, top + pixel_format.height)) for left, top in corners
        ]
        return torch.stack([pixel_format.tensor(crop) for crop in crops])


@dataclass(frozen=True)
class CropSchedule:
    """Square crops that grow over the epochs (Shi et al., 2025, "LIFT+", minimalist data augmentation).

    With `t` from 0 in the first epoch to 1 in the last, the smallest share of the area goes from its given value to
    the largest one by `s(t)`: `t` itself (linear), `1 - sqrt(1 - t ** 2)` (convex) or `sqrt(1 - (1 - t) ** 2)`
    (concave). A single epoch has `t = 0`, and epochs after the last stay at 1.

    As in LIFT+, crops have the shape of the tower's input, so that nothing is squeezed, and never exceed the largest
    such crop of the image: in the last epoch, that one at a random position. LIFT+ has neither flips nor colour
    jitter and starts at a share of 0.08.

    Args:
        epochs: number of epochs, 1 or more.
        shape: `"convex"`, `"linear"` or `"concave"`.

    Example:

    >>> from ballad_hf.data.transforms import CropSchedule
    >>> [CropSchedule(3, "linear").at_epoch((0.5, 1.0), epoch) for epoch in range(3)]
    [(0.5, 1.0), (0.75, 1.0), (1.0, 1.0)]
    """

    epochs: int
    shape: CropShape = "convex"

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs is {self.epochs}: give 1 or more.")
        if self.shape not in get_args(CropShape):
            raise ValueError(f"shape is {self.shape!r}: choose one of {', '.join(get_args(CropShape))}.")

    def at_epoch(self, scale: tuple[float, float], epoch: int) -> tuple[float, float]:
        """Smallest and largest share of the area in an epoch, from those of the first."""
        t = min(epoch / max(self.epochs - 1, 1), 1.0)
        if self.shape == "convex":
            progress = 1 - math.sqrt(1 - t**2)
        elif self.shape == "concave":
            progress = math.sqrt(1 - (1 - t) ** 2)
        else:
            progress = t
        low, high = scale
        return low + progress * (high - low), high


@dataclass(frozen=True)
class TrainTransform:
    """Random resized crop, random flip and colour jitter, then normalise."""

    pixel_format: PixelFormat
    scale: tuple[float, float]
    horizontal_flip: float
    color_jitter: float
    crop_schedule: CropSchedule | None = None
    keeps_shape: bool = False  # crops have the shape of the tower's input, as under a crop schedule

    @property
    def min_size(self) -> int:
        """Pixels per side of the whole image beyond which nothing is gained."""
        pixel_format = self.pixel_format
        return math.ceil(_REDUCING_GAP * max(pixel_format.height, pixel_format.width) / math.sqrt(self.scale[0]))

    def at_epoch(self, epoch: int) -> TrainTransform:
        """The transform of one epoch, where crops follow a schedule."""
        if self.crop_schedule is None:
            return self
        scale = self.crop_schedule.at_epoch(self.scale, epoch)
        return dataclasses.replace(self, scale=scale, crop_schedule=None)

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> torch.Tensor:
        """Pixel values: (3, height, width) float32, drawn with `rng`."""
        pixel_format = self.pixel_format
        if self.keeps_shape:
            box = _random_box_of_shape(*image.size, pixel_format.width, pixel_format.height, self.scale, rng)
        else:
            box = _random_box(*image.size, self.scale, rng)
        image = image.resize(
            (pixel_format.width, pixel_format.height), Image.Resampling(pixel_format.resample), box=box
        )
        if rng.random() < self.horizontal_flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.color_jitter:
            image = _jittered(image, self.color_jitter, rng)
        return pixel_format.tensor(image)


def evaluation_transform(image_processor: Any) -> EvaluationTransform:
    """The preprocessing of an image processor, as a transform of a dataset.

    Args:
        image_processor: such as CLIP's; its size, crop, filter, mean and standard deviation are used.

    Returns:
        A transform whose pixels differ from the processor's by at most one grey level.

    Example:

    >>> from PIL import Image
    >>> from ballad_hf.data.transforms import evaluation_transform
    >>> from ballad_hf.conversion.tiny_clip import build_tiny_clip
    >>> evaluation_transform(build_tiny_clip().image_processor)(Image.new("RGB", (60, 40))).shape
    torch.Size([3, 32, 32])
    """
    return EvaluationTransform(PixelFormat.of(image_processor))


def train_transform(
    image_processor: Any,
    scale: tuple[float, float] = (0.5, 1.0),
    horizontal_flip: float = 0.5,
    color_jitter: float = 0.4,
    crop_schedule: CropSchedule | None = None,
) -> TrainTransform:
    """The augmentation of BALLAD's training, with the pixels that the image processor's tower takes.

    Args:
        image_processor: its size, filter, mean and standard deviation are used.
        scale: smallest and largest fraction of the image's area that a crop keeps.
        horizontal_flip: probability of a flip; 0 where left and right differ in meaning, as in digits.
        color_jitter: brightness, contrast and saturation are each multiplied by a factor of 1 - this to 1 + this, in
            random order; 0 for none.
        crop_schedule: lets `scale` narrow to its largest share over the epochs, with crops of the shape of the
            tower's input; default: every epoch has `scale`, and crops vary in shape.

    Returns:
        A transform that draws everything from the generator it is called with.

    Raises:
        ValueError: a share outside 0 to 1, a probability outside 0 to 1, a negative strength.

    Example:

    >>> import numpy as np
    >>> from PIL import Image
    >>> from ballad_hf.data.transforms import train_transform
    >>> from ballad_hf.conversion.tiny_clip import build_tiny_clip
    >>> transform = train_transform(build_tiny_clip().image_processor)
    >>> image = Image.linear_gradient("L").convert("RGB")
    >>> views = [transform(image, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    >>> bool((views[0] == views[1]).all()), bool((views[0] == views[2]).all())
    (True, False)
    """
    low, high = scale
    if not 0 < low <= high <= 1:
        raise ValueError(f"scale is {scale}: give a smallest and a largest share of the area, such as (0.5, 1.0).")
    if not 0 <= horizontal_flip <= 1:
        raise ValueError(f"horizontal_flip is {horizontal_flip}: give a probability, 0 to 1.")
    if not 0 <= color_jitter < math.inf:
        raise ValueError(f"color_jitter is {color_jitter}: give 0 (colours as they are) or more, such as 0.4.")
    return TrainTransform(
        PixelFormat.of(image_processor),
        (float(low), float(high)),
        float(horizontal_flip),
        float(color_jitter),
        crop_schedule,
        keeps_shape=crop_schedule is not None,
    )


def five_crop_transform(image_processor: Any, expand: int | None = None) -> FiveCropTransform:
    """Five views of each image for test-time ensembling, as LIFT (Shi et al., 2024) evaluates with.

    The image is resized to `expand` pixels more than the tower takes, then cropped at the centre and the corners.
    `extract_features(..., transform=..., views=5)` keeps a feature of each view; `evaluate` averages their logits.

    Args:
        image_processor: its size, crop, filter, mean and standard deviation are used.
        expand: additional pixels per side, 1 or more; default: 24 for towers of 224, as in the paper, and in
            proportion for others.

    Example:

    >>> from PIL import Image
    >>> from ballad_hf.data.transforms import five_crop_transform
    >>> from ballad_hf.conversion.tiny_clip import build_tiny_clip
    >>> five_crop_transform(build_tiny_clip().image_processor, expand=4)(Image.new("RGB", (60, 40))).shape
    torch.Size([5, 3, 32, 32])
    """
    pixel_format = PixelFormat.of(image_processor)
    if expand is None:
        expand = max(1, round(24 / 224 * max(pixel_format.height, pixel_format.width)))
    if expand < 1:
        raise ValueError(f"expand is {expand}: give 1 or more, as all five views would be the same with less.")
    return FiveCropTransform(pixel_format, int(expand))


def _does(image_processor: Any, step: str) -> bool:
    return bool(getattr(image_processor, step, False))


def _size(image_processor: Any, name: str) -> dict[str, int]:
    """A size of an image processor, without what is not set in it."""
    size = getattr(image_processor, name)
    if isinstance(size, int):
        return {"height": size, "width": size} if name == "crop_size" else {"shortest_edge": size}
    if dataclasses.is_dataclass(size):
        size = {option.name: getattr(size, option.name) for option in dataclasses.fields(size)}
    return {key: int(value) for key, value in dict(size).items() if value is not None}


def _filter_of(image_processor: Any) -> int:
    resample = image_processor.resample
    return Image.Resampling.BILINEAR if resample is None else int(resample)


def _channels(values: Any) -> tuple[float, ...]:
    values = [values] * 3 if isinstance(values, int | float) else list(values)
    return tuple(float(value) for value in values)


def _resized(height: int, width: int, target: int | tuple[int, int] | None) -> tuple[int, int]:
    """Height and width after the resize."""
    if target is None:
        return height, width
    if isinstance(target, tuple):
        return target
    # Cut off, not rounded, as the processors do.
    longest = int(target * max(height, width) / min(height, width))
    return (longest, target) if width <= height else (target, longest)


def _start(resized: int, wanted: int) -> int:
    """First pixel of the centre along one side; negative where the image is too small and black surrounds it."""
    return (resized - wanted) // 2 if wanted <= resized else -math.ceil((wanted - resized) / 2)


def _random_box(
    width: int, height: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """A random part of an image: left, top, right, bottom."""
    areas = width * height * rng.uniform(*scale, _ATTEMPTS)
    ratios = np.exp(rng.uniform(*_LOG_ASPECT_RATIOS, _ATTEMPTS))
    widths, heights = np.rint(np.sqrt(areas * ratios)), np.rint(np.sqrt(areas / ratios))
    at_x, at_y = rng.random(2)
    fitting = np.flatnonzero((widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height))
    if not len(fitting):
        return _central_box(width, height)
    box_width, box_height = int(widths[fitting[0]]), int(heights[fitting[0]])
    left, top = int(at_x * (width - box_width + 1)), int(at_y * (height - box_height + 1))
    return left, top, left + box_width, top + box_height


def _random_box_of_shape(
    width: int, height: int, to_width: int, to_height: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """A random box of the shape `to_width : to_height`, no larger than fits: left, top, right, bottom."""
    largest = min(width / to_width, height / to_height)
    whole = width * height / (to_width * to_height)
    low, high = (min(share, largest**2 / whole) for share in scale)
    factor = math.sqrt(rng.uniform(low, high) * whole)
    box_width, box_height = max(1, round(to_width * factor)), max(1, round(to_height * factor))
    at_x, at_y = rng.random(2)
    left, top = int(at_x * (width - box_width + 1)), int(at_y * (height - box_height + 1))
    return left, top, left + box_width, top + box_height


def _central_box(width: int, height: int) -> tuple[float, float, float, float]:
    """The largest centre of a shape that a random box may have."""
    narrowest, widest = _ASPECT_RATIOS
    box_width = min(width, round(height * widest))
    box_height = min(height, round(width / narrowest))
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return left, top, left + box_width, top + box_height


def _jittered(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    factors = rng.uniform(max(0.0, 1 - strength), 1 + strength, 3)
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for which in rng.permutation(3):
        image = enhancers[which](image).enhance(factors[which])
    return image
