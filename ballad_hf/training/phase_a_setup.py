"""Everything that a run of phase A needs before its first step: checks, towers, optimizer, loader, validator."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import DistributedType
from torch import nn
from torch.utils.data import DataLoader
from transformers import BaseImageProcessor, PreTrainedModel
from transformers.utils import logging

from ..data.loaders import train_loader
from ..data.prompts import ClassPrompts
from ..data.samplers import build_sampler
from ..data.transforms import CropSchedule, evaluation_transform, train_transform
from .arguments import PhaseAArguments
from .losses import build_classification_loss
from .optimization import LowRankUpdates, WeightAverage, build_optimizer, freeze_the_rest, tower_of
from .step import PROMPTS_PER_IMAGE, ClassTexts, Objective, StepGradients, TrainableTowers
from .validation import Validator, encode_classes


if TYPE_CHECKING:
    from ..data.image_dataset import ImageDataset
    from ..models.modeling_ballad import BalladForImageClassification

logger = logging.get_logger(__name__)


@dataclass
class PhaseASetup:
    """A run of phase A that is ready for its first step.

    Args:
        clip: the dual encoder that is trained: the model's own, or a copy where it is sharded.
        towers: the same as the accelerator prepared it.
        optimizer: prepared too.
        loader: this process's batches.
        sampler: the global order of rows.
        labels: (rows,) of the training split.
        gradients: adds up a step's gradients.
        validator: `None` without a validation split.
        low_rank: the LoRA updates, or `None`.
        average: the EMA of the weights, or `None`.
        steps_per_epoch: global batches of an epoch.
        total_steps: of the whole training.
        highest_log_scale: where the logarithm of the logit scale is held.
        objective_for: makes the loss for a class distribution, (classes,), of what the sampler draws.
    """

    clip: PreTrainedModel
    towers: nn.Module
    optimizer: Any
    loader: DataLoader
    sampler: Any
    labels: np.ndarray
    gradients: StepGradients
    validator: Validator | None
    low_rank: LowRankUpdates | None
    average: WeightAverage | None
    steps_per_epoch: int
    total_steps: int
    highest_log_scale: float
    objective_for: Callable[[np.ndarray], Objective]

    @property
    def plain_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer without accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def start_epoch(self, epoch: int) -> None:
        """Choose the sampler's epoch, and the loss that goes with what it draws then."""
        self.sampler.set_epoch(epoch)
        self.gradients.objective = self.objective_for(self.sampler.class_distribution(self.gradients.num_classes))

    @torch.no_grad()
    def keep_scale_in_range(self) -> None:
        """Keep the trained scale at 100 or below, as CLIP's own training does (Radford et al., 2021, section 2.5)."""
        scale = self.clip.logit_scale
        if scale.requires_grad:
            scale.clamp_(max=self.highest_log_scale)

    @property
    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.towers.parameters() if parameter.requires_grad]


def set_up_phase_a(
    model: BalladForImageClassification,
    train_dataset: ImageDataset,
    processing_class: Any,
    args: PhaseAArguments,
    accelerator: Accelerator,
    *,
    eval_dataset: ImageDataset | None = None,
    seed: int = 0,
    num_workers: int = 0,
    eval_batch_size: int = 128,
) -> PhaseASetup:
    """Freeze, wrap, group and shard; see [`train_phase_a`] for the args.

    Raises:
        ValueError: a batch size that the processes can't share, an epoch shorter than a batch, nothing to train, what
            sharded towers can't do.
    """
    is_sharded = accelerator.distributed_type == DistributedType.FSDP
    if is_sharded:
        _check_sharding(accelerator, args)
    clip = copy_to_shard(model.clip) if is_sharded else model.clip
    clip.to(accelerator.device)
    low_rank = _choose_what_is_trained(clip, args, model.config.logit_scale)
    if args.activation_checkpointing:
        clip.gradient_checkpointing_enable()
    if args.torch_compile:
        compile_towers(clip)
    _check_batch_size(args.batch_size, accelerator.num_processes)
    sampler = build_sampler(
        args.sampler, train_dataset.labels, epochs=args.epochs, multiple_of=args.batch_size, seed=seed
    )
    loader = _loader(train_dataset, sampler, processing_class.image_processor, args, accelerator, seed, num_workers)
    optimizer = build_optimizer(clip, args)
    towers, optimizer = accelerator.prepare(TrainableTowers(clip, model.config.logit_scale), optimizer)
    if is_sharded:
        # By default what the root holds stays gathered after a forward pass without a backward one: the next pass
        # would use that copy, whatever the average or a checkpoint has put into the shards meanwhile.
        towers.set_reshard_after_forward(True, recurse=False)

    prompts = ClassPrompts(
        train_dataset.class_names,
        model.config.templates,
        processing_class.tokenizer,
        clip.config,
        model.config.class_descriptions,
    )
    texts = ClassTexts(
        prompts,
        accelerator.process_index,
        accelerator.num_processes,
        None if args.micro_batch_size is None else PROMPTS_PER_IMAGE * args.micro_batch_size,
        accelerator.device,
    )
    towers.eval()
    frozen_embeds = None
    with accelerator.autocast():
        if not _takes_gradients(clip, "text"):
            frozen_embeds = encode_classes(towers, texts)
        elif args.train == "projections" and not is_sharded:  # only the whole forward gathers shards
            texts.keep_pooled(clip)
    objective_for = partial(build_objective, args, train_dataset.class_counts, model.logit_scale.item())
    gradients = StepGradients(
        towers,
        None if frozen_embeds is not None else texts,
        objective_for(sampler.class_distribution(len(prompts))),
        accelerator,
        num_classes=len(prompts),
        micro_batch_size=args.micro_batch_size,
        frozen_embeds=frozen_embeds,
        image_is_trained=_takes_gradients(clip, "image"),
    )
    validator = None
    if eval_dataset is not None:
        validator = Validator(
            eval_dataset.with_transform(evaluation_transform(processing_class.image_processor)),
            texts,
            train_dataset.class_counts,
            accelerator,
            frozen_embeds,
            eval_batch_size,
            num_workers,
        )
    steps_per_epoch = len(sampler) // args.batch_size
    total_steps = args.epochs * steps_per_epoch
    setup = PhaseASetup(
        clip=clip,
        towers=towers,
        optimizer=optimizer,
        loader=loader,
        sampler=sampler,
        labels=np.asarray(train_dataset.labels),
        gradients=gradients,
        validator=validator,
        low_rank=low_rank,
        average=None,
        steps_per_epoch=steps_per_epoch,
        total_steps=min(total_steps, args.max_steps or total_steps),
        highest_log_scale=max(math.log(100), model.clip.logit_scale.item()),
        objective_for=objective_for,
    )
    if args.ema_decay is not None:
        setup.average = WeightAverage(setup.trained, args.ema_decay)
    return setup


def copy_to_shard(clip: PreTrainedModel) -> PreTrainedModel:
    """A copy of the dual encoder that FSDP can shard: single numbers become rows of one, all of one dtype."""
    clip = copy.deepcopy(clip)
    dtype = next(clip.vision_model.parameters()).dtype  # the logit scale is float32 beside half precision
    for name, parameter in list(clip.named_parameters(recurse=False)):
        if parameter.numel() == 1:
            setattr(clip, name, nn.Parameter(parameter.detach().reshape(1).to(dtype), parameter.requires_grad))
    return clip


def build_objective(
    args: PhaseAArguments, class_counts: np.ndarray, logit_scale: float, class_distribution: np.ndarray
) -> Objective:
    """The loss that the arguments name, for what the sampler draws.

    LDAM's margins are lengths on the cosine and are subtracted from the logits, so they are multiplied by the logit
    scale: the initial one, where the scale is trained too.

    Args:
        args: `loss` and `label_smoothing`.
        class_counts: (classes,) training images.
        logit_scale: multiplier of the cosines.
        class_distribution: (classes,) share of each class among the draws.
    """
    if args.loss == "contrastive":
        return Objective()
    name = "cross_entropy" if args.loss == "class_prompt" else args.loss
    return Objective(
        build_classification_loss(
            name,
            torch.as_tensor(np.asarray(class_counts)),
            class_distribution=torch.as_tensor(class_distribution),
            label_smoothing=args.label_smoothing,
            ldam_scale=logit_scale,
        )
    )


def set_training_mode(setup: PhaseASetup, args: PhaseAArguments) -> None:
    """Training mode for what is trained: dropout is off in a frozen tower, and BatchNorm obeys `args.batch_norm`."""
    setup.towers.train()
    for tower in ("image", "text"):
        if not _takes_gradients(setup.clip, tower):
            for name, module in setup.clip.named_children():
                if tower_of(f"{name}.") == tower:
                    module.eval()
    for module in setup.clip.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train(args.batch_norm == "train" and module.weight.requires_grad)


def compile_towers(clip: PreTrainedModel) -> None:
    """Compile both towers in place. Prompts differ in number and length from batch to batch, so theirs is dynamic."""
    clip.vision_model.compile()
    clip.text_model.compile(dynamic=True)


def make_plain(clip: PreTrainedModel, args: PhaseAArguments) -> None:
    """Take back what training put on the dual encoder, weights aside."""
    if args.activation_checkpointing:
        clip.gradient_checkpointing_disable()
    if args.torch_compile:
        for tower in (clip.vision_model, clip.text_model):
            tower._compiled_call_impl = None
    clip.requires_grad_(True)
    clip.eval()


def _check_batch_size(batch_size: int, processes: int) -> None:
    if batch_size % processes:
        raise ValueError(
            f"batch_size is {batch_size}, which is not a multiple of the {processes} processes: choose one, such as "
            f"{max(1, batch_size // processes) * processes}."
        )


def _check_sharding(accelerator: Accelerator, args: PhaseAArguments) -> None:
    if not accelerator.is_fsdp2:
        raise ValueError("FSDP of version 1 can't share the towers: set fsdp_version: 2 in the accelerate config.")
    if args.lora_rank:
        raise ValueError(
            f"lora_rank is {args.lora_rank}, but updates of sharded weights can't be merged: use lora_rank=0, "
            "or several devices without FSDP, where low-rank updates need little memory."
        )
    if args.torch_compile:
        raise ValueError("torch_compile is not known to work on sharded towers: leave it out, or FSDP.")


def _choose_what_is_trained(
    clip: PreTrainedModel, args: PhaseAArguments, fixed_logit_scale: float | None
) -> LowRankUpdates | None:
    train_logit_scale = args.train_logit_scale and fixed_logit_scale is None
    if not args.lora_rank:
        freeze_the_rest(clip, args.train, train_logit_scale)
        return None
    assert args.train != "projections"  # refused by PhaseAArguments
    low_rank = LowRankUpdates(clip, args.train, args.lora_rank, args.lora_alpha, args.lora_dropout)
    clip.logit_scale.requires_grad_(train_logit_scale)
    return low_rank


def _takes_gradients(clip: nn.Module, tower: str) -> bool:
    return any(parameter.requires_grad for name, parameter in clip.named_parameters() if tower_of(name) == tower)


def _loader(
    dataset: ImageDataset,
    sampler: Any,
    image_processor: Any,
    args: PhaseAArguments,
    accelerator: Accelerator,
    seed: int,
    num_workers: int,
) -> DataLoader:
    schedule = args.crop_schedule
    transform = train_transform(
        image_processor,
        scale=(args.crop_scale, 1.0),
        horizontal_flip=args.horizontal_flip,
        color_jitter=args.color_jitter,
        crop_schedule=None if schedule == "none" else CropSchedule(args.epochs, schedule),
    )
    loader = train_loader(
        dataset.with_transform(transform),
        sampler,
        args.batch_size // accelerator.num_processes,
        num_workers=num_workers,
        seed=seed,
    )
    # Whole batches in turn, whatever the accelerator is configured to split; labels and indices stay on the CPU.
    return prepare_data_loader(
        loader, num_processes=accelerator.num_processes, process_index=accelerator.process_index, rng_types=[]
    )


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
