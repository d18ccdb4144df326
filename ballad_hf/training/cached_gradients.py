"""The gradients of one step of phase A, whatever the number of processes and however small the device.

A batch that fits is run at once. One that does not is run in pieces:

- a loss that is a mean over images is added up piece by piece, while the class embeddings wait as a leaf, so that
  the prompts are encoded once for the batch and not once for each piece;
- a loss that couples the batch (contrastive, LADE) takes gradient caching (Gao et al., 2021, "Scaling Deep Contrastive
  Learning Batch Size under Memory Limited Setup"): features of all pieces without gradients, the loss and its gradient
  at the features, then each piece again with gradients, from the features' gradient down.

Both give the gradients of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.nn.modules.batchnorm import _BatchNorm
from transformers.utils import logging

from .checkpoints import random_state, restore_random_state
from .collectives import gather_rows
from .losses import ClassificationLoss, contrastive_loss
from .towers import ClassTexts, TextShare, TowerFeatures, class_embeddings


logger = logging.get_logger(__name__)

# A prompt of ten tokens needs a small part of the memory of an image of 200 patches.
PROMPTS_PER_IMAGE = 8


class OutOfMemoryError(RuntimeError):
    """Memory ran out, and a smaller micro-batch is no remedy; the message names one."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch found no memory, on a device or on the CPU.

    Example:

    >>> from ballad_hf.training.cached_gradients import is_out_of_memory
    >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."))
    True
    """
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate" in str(error)


@dataclass
class Objective:
    """A loss of phase A over cosines.

    Args:
        classification: a loss over the prompts of all classes; `None` for the contrastive loss, which compares with
            the classes of the batch.
    """

    classification: ClassificationLoss | None = None

    @property
    def couples_batch(self) -> bool:
        """Whether a image's loss depends on the other images of the global batch."""
        return self.classification is None or self.classification.couples_batch

    def classes(self, batch_labels: torch.Tensor, num_classes: int) -> torch.Tensor:
        """The sorted classes whose prompts are needed for a global batch."""
        return batch_labels.unique() if self.classification is None else torch.arange(num_classes)

    def __call__(self, similarity: torch.Tensor, labels: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """The loss from scaled cosines (images, classes)."""
        if self.classification is None:
            return contrastive_loss(similarity, labels, classes)
        return self.classification(similarity, labels)


class StepGradients:
    """Adds the gradients of a global batch to the parameters.

    Args:
        towers: [`TrainableTowers`] as the accelerator prepared it.
        texts: the prompts; `None` with `frozen_embeds`.
        objective: the loss.
        accelerator: of this run.
        num_classes: of the data.
        micro_batch_size: images of this process in one forward pass; `None` for all.
        frozen_embeds: (classes, dim) class embeddings of a text tower that is not trained.
        image_is_trained: whether image features take gradients.
    """

    def __init__(
        self,
        towers: torch.nn.Module,
        texts: ClassTexts | None,
        objective: Objective,
        accelerator: Accelerator,
        num_classes: int,
        micro_batch_size: int | None = None,
        frozen_embeds: torch.Tensor | None = None,
        image_is_trained: bool = True,
    ):
        self.towers = towers
        self.texts = texts
        self.objective = objective
        self.accelerator = accelerator
        self.num_classes = num_classes
        self.micro_batch_size = micro_batch_size
        self.frozen_embeds = frozen_embeds
        self.image_is_trained = image_is_trained

    def __call__(self, pixel_values: torch.Tensor, batch_labels: torch.Tensor) -> torch.Tensor:
        """Backward passes of one step.

        Args:
            pixel_values: (images of this process, channels, height, width) on the device.
            batch_labels: (images of all processes,) on the CPU, one process after the other.

        Returns:
            The loss, detached: of the global batch where it couples the batch, else of this process's part.

        Where memory runs out, the micro-batch is halved for good and the step is taken again from its start.

        Raises:
            OutOfMemoryError: a micro-batch of one does not fit either, or the batch must not be split.
        """
        state = random_state()
        while True:
            try:
                return self._step(pixel_values, batch_labels)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self._halve(len(pixel_values), error)
            # After the `except`, whose traceback holds the activations.
            self._forget_gradients(pixel_values.device)
            restore_random_state(state)

    def _step(self, pixel_values: torch.Tensor, batch_labels: torch.Tensor) -> torch.Tensor:
        classes = self.objective.classes(batch_labels, self.num_classes)
        share = None if self.texts is None else self.texts.share(classes)
        columns = classes.to(pixel_values.device)
        count = len(pixel_values)
        if self.objective.couples_batch:
            labels = batch_labels.to(pixel_values.device)
        else:
            start = self.accelerator.process_index * count
            labels = batch_labels[start : start + count].to(pixel_values.device)
        at_once = self.micro_batch_size is None or count <= self.micro_batch_size
        if at_once and (share is None or len(share.pieces) == 1):
            return self._at_once(pixel_values, labels, columns, share)
        pieces = pixel_values.split(self.micro_batch_size or count)
        if self.objective.couples_batch:
            return self._cached(pieces, labels, columns, share)
        return self._added_up(pieces, labels, columns, share)

    def _halve(self, count: int, error: RuntimeError) -> None:
        """Halve the micro-batch, and the prompts of a forward pass with it."""
        size = min(count, self.micro_batch_size or count)
        if self.accelerator.num_processes > 1:
            raise OutOfMemoryError(
                f"Memory ran out with {size} images in a forward pass of each process: set --phase_a_micro_batch_size "
                f"(micro_batch_size) to {max(1, size // 2)}."
            ) from error
        if any(isinstance(module, _BatchNorm) and module.training for module in self.towers.modules()):
            raise OutOfMemoryError(
                f"Memory ran out with a batch of {count} images, which batch_norm='train' needs at once: set "
                f"--phase_a_batch_size to {max(1, count // 2)}, or --phase_a_batch_norm to frozen."
            ) from error
        if size == 1:
            raise OutOfMemoryError(
                "Memory ran out with one image in a forward pass: set --phase_a_activation_checkpointing, "
                "--phase_a_train to image or projections, or --preset quick, which leaves phase A out; or free memory."
            ) from error
        self.micro_batch_size = size // 2
        if self.texts is not None:
            self.texts.set_piece(PROMPTS_PER_IMAGE * self.micro_batch_size)
        logger.warning(f"Memory ran out with {size} images in a forward pass: from here on it is {size // 2}.")

    def _forget_gradients(self, device: torch.device) -> None:
        for parameter in self.towers.parameters():
            parameter.grad = None
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def _at_once(self, pixel_values, labels, columns, share: TextShare | None) -> torch.Tensor:
        features = self.towers(pixel_values, **({} if share is None else share.pieces[0]))
        text_embeds = self._text_embeds(features.text, columns, share)
        loss = self._loss(features.image, text_embeds, features.logit_scale, labels, columns)
        self.accelerator.backward(loss)
        return loss.detach()

    def _cached(self, pieces, labels, columns, share: TextShare | None) -> torch.Tensor:
        images, image_states, scale = self._image_features(pieces)
        texts, text_states = self._text_features(share)
        image_leaf = torch.cat(images).requires_grad_()  # (images, dim)
        text_leaf = None if share is None else torch.cat(texts).requires_grad_()  # (prompts of the share, dim)
        loss = self._loss(image_leaf, self._text_embeds(text_leaf, columns, share), scale, labels, columns)
        self._scaled(loss).backward()  # as far as the leaves
        image_gradients = _gradient_at(image_leaf).split([len(piece) for piece in pieces])
        self._again(pieces, image_gradients, image_states, share, text_leaf, text_states, scale)
        return loss.detach()

    def _added_up(self, pieces, labels, columns, share: TextShare | None) -> torch.Tensor:
        count = sum(map(len, pieces))
        texts, text_states = self._text_features(share)
        text_leaf = None if share is None else torch.cat(texts).requires_grad_()
        text_embeds = self._text_embeds(text_leaf, columns, share)
        # The pieces' gradients meet here; the way from here to the share's features is gone once, at the end.
        embeds_leaf = text_embeds.detach().requires_grad_()
        total = torch.zeros((), device=labels.device)

        def add(image_features, scale, piece_labels) -> torch.Tensor:
            """Gradients of a piece's part of the loss at the leaves; returns that at the image features."""
            nonlocal total
            leaf = image_features.detach().requires_grad_()
            part = self._loss(leaf, embeds_leaf, scale, piece_labels, columns) * (len(leaf) / count)
            self._scaled(part).backward()
            total += part.detach()
            return _gradient_at(leaf)

        # The last piece's backward pass goes with that of the prompts, which needs the gradients of every piece.
        (last,), last_states, scale = self._image_features(pieces[-1:])
        *label_pieces, last_labels = labels.split([len(piece) for piece in pieces])
        last_gradient = add(last, scale, last_labels)
        with self.accelerator.no_sync(self.towers):
            for piece, piece_labels in zip(pieces[:-1], label_pieces, strict=True):
                output: Any = self.towers(piece) if self.image_is_trained else self._features(piece)
                gradient = add(output.image, scale, piece_labels)
                if self.image_is_trained:
                    output.image.backward(gradient)
        if text_leaf is not None:
            torch.autograd.backward(text_embeds, _gradient_at(embeds_leaf))
        self._again(pieces[-1:], [last_gradient], last_states, share, text_leaf, text_states, scale)
        return total

    def _again(self, pieces, image_gradients, image_states, share, text_leaf, text_states, scale) -> None:
        """Each piece with gradients, from the features' gradients down; the last images go with the last prompts."""
        after = random_state()
        texts: list = []
        text_gradients: list = []
        if share is not None:
            texts = share.pieces
            text_gradients = list(_gradient_at(text_leaf).split(share.rows))
        with self.accelerator.no_sync(self.towers):
            if self.image_is_trained:
                for piece, gradient, state in zip(pieces[:-1], image_gradients[:-1], image_states[:-1], strict=True):
                    restore_random_state(state)
                    self.towers(piece).image.backward(gradient)
            for tokens, gradient, state in zip(texts[:-1], text_gradients[:-1], text_states[:-1], strict=True):
                restore_random_state(state)
                self.towers(**tokens).text.backward(gradient)
        restore_random_state(image_states[-1])
        features = self.towers(pieces[-1], **(texts[-1] if texts else {}))
        gradients = (image_gradients[-1], text_gradients[-1] if texts else None, scale.grad)
        trained = [
            (output, gradient)
            for output, gradient in zip(features, gradients, strict=True)
            if output is not None and output.requires_grad
        ]
        torch.autograd.backward([output for output, _ in trained], [gradient for _, gradient in trained])
        restore_random_state(after)

    @torch.no_grad()
    def _features(self, *pixel_values, **tokens) -> TowerFeatures:
        return self.towers(*pixel_values, **tokens)

    def _image_features(self, pieces) -> tuple[list[Any], list, torch.Tensor]:
        """Features piece by piece, the random state before each, and the logit scale as a leaf."""
        features, states = [], []
        for piece in pieces:
            states.append(random_state())
            output = self._features(piece)
            features.append(output.image)
        return features, states, output.logit_scale.detach().clone().requires_grad_()

    def _text_features(self, share: TextShare | None) -> tuple[list[Any], list]:
        """Features of this process's prompts piece by piece, and the random state before each."""
        features, states = [], []
        for tokens in [] if share is None else share.pieces:
            states.append(random_state())
            features.append(self._features(**tokens).text)
        return features, states

    def _text_embeds(self, text_features: Any, columns, share: TextShare | None) -> torch.Tensor:
        """(classes, dim) class embeddings in the order of `columns`, from the shares of all processes."""
        if share is None:
            assert self.frozen_embeds is not None
            return self.frozen_embeds[columns]
        return gather_rows(class_embeddings(text_features, share.prompt_counts))[share.pick]

    def _loss(self, image_features, text_embeds, scale, labels, columns) -> torch.Tensor:
        with torch.autocast(text_embeds.device.type, enabled=False):
            image_embeds = F.normalize(image_features.float(), dim=-1)
            if self.objective.couples_batch:
                image_embeds = gather_rows(image_embeds)
            return self.objective(scale.float() * (image_embeds @ text_embeds.T), labels, columns)

    def _scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss as fp16 training scales it, so that small gradients don't vanish."""
        scaler: Callable | None = getattr(self.accelerator.scaler, "scale", None)
        return loss if scaler is None else scaler(loss)


def _gradient_at(leaf: torch.Tensor | None) -> torch.Tensor:
    assert leaf is not None
    assert leaf.grad is not None
    return leaf.grad
