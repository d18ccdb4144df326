"""Tiny models, built once a session and handed out as copies."""

import contextlib
import copy
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores, and so do the processes that they start
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from transformers import CLIPProcessor

from ballad_hf import BalladForImageClassification, as_image_dataset, load_image_dataset
from ballad_hf.conversion.tiny_clip import DualEncoder, build_tiny_clip


CLASS_NAMES = ["cat", "dog", "owl", "red fox", "zebra"]


def example_module(name: str) -> ModuleType:
    """`examples/<name>.py`, imported; the examples are no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_splits(dataset="digits", **options) -> SimpleNamespace:
    """`load_image_dataset` as image datasets, with the classes of the training split; an absent split is `None`.

    No test split is held out unless a test asks for it, so that counts of few images are easy to follow.
    """
    loaded = load_image_dataset(dataset, **{"test_fraction": 0.0} | options)
    splits = dict.fromkeys(("train", "validation", "test")) | {
        split: as_image_dataset(images) for split, images in loaded.items()
    }
    train = splits["train"]
    name = loaded["train"].info.dataset_name
    return SimpleNamespace(
        **splits, dataset=loaded, name=name, class_names=train.class_names, class_counts=train.class_counts
    )


@contextlib.contextmanager
def files_up_to(size: int):
    """Let this process write no file beyond `size` bytes, as a full disk does."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    """No test hands its accelerator on: a forked process would take over that there is one process."""
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def _tiny_clip() -> DualEncoder:
    torch.set_num_threads(1)
    return build_tiny_clip(width=32, layers=1, projection_dim=16, patch_size=16, words=["photo", "cat", "dog", "owl"])


@pytest.fixture
def tiny_clip(_tiny_clip: DualEncoder) -> DualEncoder:
    """A CLIP for 32 x 32 images with 16-wide features: (clip, tokenizer, image_processor)."""
    return DualEncoder(copy.deepcopy(_tiny_clip.clip), _tiny_clip.tokenizer, _tiny_clip.image_processor)


@pytest.fixture
def tiny_processor(tiny_clip: DualEncoder) -> CLIPProcessor:
    """The processor of `tiny_clip`."""
    return CLIPProcessor(image_processor=tiny_clip.image_processor, tokenizer=tiny_clip.tokenizer)


@pytest.fixture
def tiny_ballad(tiny_clip: DualEncoder) -> BalladForImageClassification:
    """A BALLAD model over `tiny_clip` with five classes and an adapter that is no identity."""
    model = BalladForImageClassification.from_dual_encoder(tiny_clip.clip, CLASS_NAMES, tiny_clip.tokenizer)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        weight = model.adapter.linear.weight
        weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    return model


@pytest.fixture
def clip_folder(tiny_clip: DualEncoder, tmp_path):
    """A folder that looks like a CLIP checkpoint on the Hub."""
    folder = tmp_path / "tiny-clip"
    for part in tiny_clip:
        part.save_pretrained(folder)
    return folder
