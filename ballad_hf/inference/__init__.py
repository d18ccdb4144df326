"""Inference. Importing this package registers its pipeline with `transformers.pipeline`."""

from transformers import AutoModelForZeroShotImageClassification
from transformers.pipelines import PIPELINE_REGISTRY

from .pipelines import CachedZeroShotImageClassificationPipeline


TASK = "cached-zero-shot-image-classification"

if TASK not in PIPELINE_REGISTRY.supported_tasks:
    PIPELINE_REGISTRY.register_pipeline(
        TASK,
        pipeline_class=CachedZeroShotImageClassificationPipeline,
        pt_model=AutoModelForZeroShotImageClassification,
        type="multimodal",
    )
