"""One optimisation step of phase A, whatever the number of processes and however small the device.

Both towers run in one module, because DDP and FSDP count on one forward for one backward; so images and prompts go in
together. A batch that fits is run at once. One that does not is run in pieces:

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
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel
from transformers.utils import logging

from ..data.prompts import ClassPrompts
from .checkpoints import random_state, restore_random_state
from .losses import ClassificationLoss, contrastive_loss


logger = logging.get_logger(__name__)

# A prompt of ten tokens needs a small part of the memory of an image of 200 patches.
PROMPTS_PER_IMAGE = 8


class OutOfMemoryError(RuntimeError):
    """Memory ran out, and a smaller micro-batch is no remedy; the message names one."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch found no memory, on a device or on the CPU.

    Example:

    >>> from ballad_hf.training.step import is_out_of_memory
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
        """Whether an image's loss depends on the other images of the global batch."""
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

    def _at_once(self, pixel_values: Any, labels: Any, columns: Any, share: TextShare | None) -> torch.Tensor:
        features = self.towers(pixel_values, **({} if share is None else share.pieces[0]))
        text_embeds = self._text_embeds(features.text, columns, share)
        loss = self._loss(features.image, text_embeds, features.logit_scale, labels, columns)
        self.accelerator.backward(loss)
        return loss.detach()

    def _cached(self, pieces: Any, labels: Any, columns: Any, share: TextShare | None) -> torch.Tensor:
        images, image_states, scale = self._image_features(pieces)
        texts, text_states = self._text_features(share)
        image_leaf = torch.cat(images).requires_grad_()  # (images, dim)
        text_leaf = None if share is None else torch.cat(texts).requires_grad_()  # (prompts of the share, dim)
        loss = self._loss(image_leaf, self._text_embeds(text_leaf, columns, share), scale, labels, columns)
        self._scaled(loss).backward()  # as far as the leaves
        image_gradients = _gradient_at(image_leaf).split([len(piece) for piece in pieces])
        self._again(pieces, image_gradients, image_states, share, text_leaf, text_states, scale)
        return loss.detach()

    def _added_up(self, pieces: Any, labels: Any, columns: Any, share: TextShare | None) -> torch.Tensor:
        count = sum(map(len, pieces))
        texts, text_states = self._text_features(share)
        text_leaf = None if share is None else torch.cat(texts).requires_grad_()
        text_embeds = self._text_embeds(text_leaf, columns, share)
        # The pieces' gradients meet here; the way from here to the share's features is gone once, at the end.
        embeds_leaf = text_embeds.detach().requires_grad_()
        total = torch.zeros((), device=labels.device)

        def add(image_features: Any, scale: Any, piece_labels: Any) -> torch.Tensor:
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

    def _again(
        self,
        pieces: Any,
        image_gradients: Any,
        image_states: Any,
        share: TextShare | None,
        text_leaf: Any,
        text_states: Any,
        scale: Any,
    ) -> None:
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
    def _features(self, *pixel_values: Any, **tokens: Any) -> TowerFeatures:
        return self.towers(*pixel_values, **tokens)

    def _image_features(self, pieces: Any) -> tuple[list[Any], list, torch.Tensor]:
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

    def _text_embeds(self, text_features: Any, columns: Any, share: TextShare | None) -> torch.Tensor:
        """(classes, dim) class embeddings in the order of `columns`, from the shares of all processes."""
        if share is None:
            assert self.frozen_embeds is not None
            return self.frozen_embeds[columns]
        return gather_rows(class_embeddings(text_features, share.prompt_counts))[share.pick]

    def _loss(self, image_features: Any, text_embeds: Any, scale: Any, labels: Any, columns: Any) -> torch.Tensor:
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


class TowerFeatures(NamedTuple):
    """Features before normalisation, float32 after autocast; `None` for a tower that was given nothing."""

    image: torch.Tensor | None  # (batch, dim)
    text: torch.Tensor | None  # (prompts, dim)
    logit_scale: torch.Tensor  # ()


class TrainableTowers(nn.Module):
    """Both towers of a dual encoder and its logit scale.

    Args:
        clip: the dual encoder; not copied.
        fixed_logit_scale: the multiplier of the cosines, or `None` for the dual encoder's own.
    """

    def __init__(self, clip: PreTrainedModel, fixed_logit_scale: float | None = None):
        super().__init__()
        self.clip = clip
        self.fixed_logit_scale = fixed_logit_scale

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pooled_text: torch.Tensor | None = None,
    ) -> TowerFeatures:
        """Run what is given.

        Args:
            pixel_values: (batch, channels, height, width).
            input_ids: (prompts, length).
            attention_mask: (prompts, length).
            pooled_text: (prompts, hidden) output of a frozen text tower, which only the projection is left to run on.
        """
        image = text = None
        if pixel_values is not None:
            image = self.clip.get_image_features(pixel_values=pixel_values).pooler_output
        if input_ids is not None:
            text = self.clip.get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        elif pooled_text is not None:
            text = text_projection(self.clip)(pooled_text)
        return TowerFeatures(image, text, self._logit_scale())

    def _logit_scale(self) -> torch.Tensor:
        if self.fixed_logit_scale is not None:
            return torch.tensor(float(self.fixed_logit_scale), device=self.clip.device)
        return self.clip.logit_scale.float().reshape(()).exp()  # (1,) in some families, and where it is sharded


def class_embeddings(text_features: torch.Tensor, prompt_counts: torch.Tensor) -> torch.Tensor:
    """Normalised mean of the normalised features of each class's prompts.

    Args:
        text_features: (prompts, dim), a class's prompts side by side.
        prompt_counts: (classes,) prompts of each class, at least 1, on the same device.

    Returns:
        (classes, dim) float32.
    """
    embeds = F.normalize(text_features.float(), dim=-1)
    classes = len(prompt_counts)
    if len(embeds) == classes:  # one prompt each
        return embeds
    owner = torch.repeat_interleave(prompt_counts, output_size=len(embeds))  # (prompts,) class of each
    sums = embeds.new_zeros(classes, embeds.shape[1]).index_add(0, owner, embeds)
    return F.normalize(sums, dim=-1)  # the mean has the same direction


def text_projection(clip: PreTrainedModel) -> nn.Module:
    """The last linear map of the text side; SigLIP's is the head of its text tower."""
    projection = getattr(clip, "text_projection", None)
    return clip.text_model.head if projection is None else projection


class TextShare(NamedTuple):
    """This process's share of some classes' prompts, and how the shares of all go together again."""

    pieces: list[dict[str, torch.Tensor]]  # arguments of the towers' forward, a piece at a time
    rows: list[int]  # prompts of each piece
    prompt_counts: torch.Tensor  # (classes of the share,) prompts of each
    pick: torch.Tensor  # (classes,) row of the gathered shares for each class, in the order asked for


class ClassTexts:
    """Hands out the prompts of classes, shared evenly over processes, in pieces that fit a device.

    Args:
        prompts: the tokenised prompts.
        process_index: of this process.
        num_processes: of all.
        piece: prompts in one forward pass at most, but never less than a class's; `None` for all at once.
        device: where the tokens go.
    """

    def __init__(
        self, prompts: ClassPrompts, process_index: int, num_processes: int, piece: int | None, device: torch.device
    ):
        self.prompts = prompts
        self.process_index = process_index
        self.num_processes = num_processes
        self.piece = piece
        self.device = device
        self._pooled: torch.Tensor | None = None
        self._all: TextShare | None = None

    def share(self, classes: torch.Tensor) -> TextShare:
        """The share for `classes`, (n,) distinct indices on the CPU."""
        every_class = len(classes) == len(self.prompts)
        if every_class and self._all is not None:
            return self._all
        order = self.prompts.by_length(classes)
        missing = -len(order) % self.num_processes
        # Shares must be of one length to be gathered; a repeated class is never picked, so it has no gradient.
        padded = torch.cat([order, order[:1].expand(missing)])
        shares = padded.view(-1, self.num_processes).T  # (processes, share): all of like lengths of prompts
        row_of_class = torch.empty(len(self.prompts), dtype=torch.long)
        row_of_class[shares.flatten()] = torch.arange(len(padded))
        mine = shares[self.process_index]
        pieces = mine.split(self._cuts(shares))
        share = TextShare(
            [self._arguments(piece) for piece in pieces],
            [int(self.prompts.counts[piece].sum()) for piece in pieces],
            self.prompts.counts[mine].to(self.device),
            row_of_class[classes].to(self.device),
        )
        if every_class:
            self._all = share
        return share

    def set_piece(self, piece: int) -> None:
        """Change the number of prompts in one forward pass."""
        self.piece = piece
        self._all = None

    @torch.no_grad()
    def keep_pooled(self, clip: PreTrainedModel) -> None:
        """Run the text tower over all prompts once and keep what its projection takes; for a frozen tower."""
        pooled: list[torch.Tensor] = []
        # What the projection is called with, as families pool differently: at the end token, the first or the last.
        hook = text_projection(clip).register_forward_pre_hook(lambda _, given: pooled.append(given[0]))
        every_class = torch.arange(len(self.prompts))
        for classes in every_class.split(_cuts(self.prompts.counts, self.piece or 256)):
            tokens = {name: value.to(self.device) for name, value in self.prompts.batch(classes).items()}
            clip.get_text_features(**tokens)
        hook.remove()
        self._pooled = torch.cat(pooled)  # (prompts, hidden)

    def _cuts(self, shares: torch.Tensor) -> list[int]:
        """Classes of each piece, the same for every process: a sharded tower's forward is a collective."""
        if self.piece is None:
            return [shares.shape[1]]
        return _cuts(self.prompts.counts[shares].amax(dim=0), self.piece)

    def _arguments(self, classes: torch.Tensor) -> dict[str, torch.Tensor]:
        if self._pooled is not None:
            return {"pooled_text": self._pooled[self.prompts.rows(classes).to(self.device)]}
        return {name: value.to(self.device) for name, value in self.prompts.batch(classes).items()}


def _cuts(counts: torch.Tensor, most: int) -> list[int]:
    """Lengths of the parts of `counts`, (classes,), whose sums are `most` or less where a class alone is not more."""
    cuts, held = [0], 0
    for count in counts.tolist():
        if cuts[-1] and held + count > most:
            cuts.append(0)
            held = 0
        cuts[-1] += 1
        held += count
    return cuts


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """The rows of every process, one process after the other; the same on each.

    The gradient of a row is the sum of its gradients on all processes. Where each computes the same global loss, or
    its own part of a mean, averaging parameter gradients over processes (as DDP and FSDP do) gives those of one.

    Args:
        rows: (rows, ...), as many on every process.

    Returns:
        (processes * rows, ...); `rows` itself without other processes.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    return _GatherRows.apply(rows)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        rows = rows.contiguous()
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows)
        ctx.rows = len(rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        start = dist.get_rank() * ctx.rows
        return gradient[start : start + ctx.rows]


@dataclass
class StepReport:
    """A finished step, as every process sees it.

    Args:
        step: steps done before this one.
        loss: mean over processes.
        signalled: whether a process received a signal to stop.
        clock: whether the main process finds a checkpoint due by the clock.
    """

    step: int
    loss: float
    signalled: bool
    clock: bool


class StepStatus:
    """Reads the loss of each step one step later, so that the device need not wait for the host.

    With several processes one small reduction per step carries the loss, signals, and the main process's clock.

    Args:
        accelerator: of this run.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self._waiting: tuple[int, torch.Tensor] | None = None

    def post(self, step: int, loss: torch.Tensor, signalled: bool, clock: bool) -> StepReport | None:
        """Hand in a step; returns the report of the one before."""
        before = self.read()
        values = loss.detach().float().reshape(1)
        processes = self.accelerator.num_processes
        flags = torch.tensor([float(signalled), float(clock and self.accelerator.is_main_process)])
        values = torch.cat([values / processes, flags.to(values.device)])  # (3,): loss, signalled, clock
        if processes > 1:
            dist.all_reduce(values)  # a flag of any process is above 0 in the sum
        self._waiting = (step, values)
        return before

    def read(self) -> StepReport | None:
        """The report of the step that waits, if one does."""
        if self._waiting is None:
            return None
        step, values = self._waiting
        self._waiting = None
        loss, signalled, clock = values.tolist()
        return StepReport(step, loss, signalled > 0, clock > 0)
