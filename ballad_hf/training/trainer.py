"""`BalladTrainer`: both phases, evaluation, saving and pushing behind the interface of transformers' `Trainer`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import EvalPrediction, TrainerCallback, TrainerState
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import logging

from ..conversion.dual_encoders import processor_of
from ..data.image_dataset import ImageDataset, as_image_dataset, match_classes
from ..data.images import check_images
from ..data.transforms import train_transform
from ..evaluation.evaluate import predict
from ..evaluation.metrics import LongTailMetrics
from ..evaluation.predictions import Predictions
from ..evaluation.report import write_results
from ..features.extraction import extract_features
from ..features.table import FeatureTable
from ..hub.model_card import render_model_card
from ..hub.model_directory import save_model_directory
from ..hub.push import CheckpointPusher, check_push, push_model_directory
from .arguments import BalladTrainingArguments, PhaseAArguments
from .callbacks import TrainingEvents
from .checkpoints import PhaseAResult
from .heads import HeadChoice, choose_head
from .phase_a import train_phase_a
from .phase_a_setup import check_before_training
from .phase_b import PhaseBResult, train_phase_b, views_per_image
from .run_directory import claim_run_directory
from .validation import METRIC_NAMES


if TYPE_CHECKING:
    from ..models.modeling_ballad import BalladForImageClassification

logger = logging.get_logger(__name__)

_SCRATCH_RATE = 1e-3  # of SGD: less is for pretrained weights


class BalladTrainOutput(NamedTuple):
    """What `BalladTrainer.train` returns."""

    phase_a: PhaseAResult
    phase_b: PhaseBResult


class BalladTrainer:
    """Trains a BALLAD model: phase A on the data as it is, then phase B on balanced samples.

    Args:
        model: a [`BalladForImageClassification`] with the classes of the data.
        args: see [`BalladTrainingArguments`].
        train_dataset: a `datasets.Dataset` with an image and a label column, or any map-style dataset of image and
            label. Labels that are names are matched with the model's classes.
        eval_dataset: the validation split, which chooses what each phase keeps. Without one the last epoch is kept.
        processing_class: the processor of the dual encoder; default: the model's own.
        model_init: makes the model instead of `model`.
        callbacks: `TrainerCallback`s of transformers, added to those of `args.report_to`.
        compute_metrics: takes an `EvalPrediction` of logits and labels and returns further metrics for `evaluate`.
        accelerator: default: one with the mixed precision of `args`.
        run_arguments: flat names and values to record beside the results; default: those of `args`.

    Raises:
        ValueError: neither or both of `model` and `model_init`.
        ImportError: a tracker in `args.report_to` is not installed.

    Example:

    >>> import tempfile
    >>> from ballad_hf import BalladForImageClassification, BalladTrainer, BalladTrainingArguments, load_image_dataset
    >>> dataset = load_image_dataset("digits")
    >>> model = BalladForImageClassification.from_clip("tiny", dataset=dataset["train"])
    >>> args = BalladTrainingArguments(tempfile.mkdtemp(), phase_a={"epochs": 1, "batch_size": 64, "max_steps": 2})
    >>> trainer = BalladTrainer(model, args, dataset["train"], dataset["validation"])
    >>> output = trainer.train()
    >>> output.phase_a.steps, 0 <= trainer.evaluate(dataset["test"])["eval_overall"] <= 1
    (2, True)
    """

    def __init__(
        self,
        model: BalladForImageClassification | None = None,
        args: BalladTrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        model_init: Callable[[], BalladForImageClassification] | None = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] | None = None,
        compute_metrics: Callable[[Any], Mapping[str, float]] | None = None,
        accelerator: Accelerator | None = None,
        run_arguments: Mapping[str, Any] | None = None,
    ):
        if (model is None) == (model_init is None):
            raise ValueError("Give either model or model_init.")
        self.model = model_init() if model is None else model  # type: ignore[misc]
        self.args = args or BalladTrainingArguments()
        class_names = self.model.config.class_names
        self.train_dataset = None if train_dataset is None else match_classes(train_dataset, class_names)
        self.eval_dataset = None if eval_dataset is None else match_classes(eval_dataset, class_names)
        self.processing_class = processing_class or processor_of(self.model)
        self.compute_metrics = compute_metrics
        self.accelerator = accelerator or Accelerator(mixed_precision=self.args.mixed_precision)
        self.run_arguments = dict(run_arguments or self.args.to_dict())
        self.events = TrainingEvents(
            [*_reporting_callbacks(self.args.report_to), *(callbacks or ())],
            self.args,
            self.accelerator,
            self.model,
            self.processing_class,
        )
        self.phase_a: PhaseAResult | None = None
        self.phase_b: PhaseBResult | None = None
        self.head_choice: HeadChoice | None = None
        self._card: Any = None
        self._is_prepared = False
        self._in_train = False

    @property
    def state(self) -> TrainerState:
        """The `TrainerState` of transformers."""
        return self.events.state

    @property
    def log_history(self) -> list[dict[str, Any]]:
        """Everything that was logged: losses, learning rates and validation metrics."""
        return self.events.state.log_history

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Add a callback, or an instance of a callback class."""
        self.events.callbacks.append(callback() if isinstance(callback, type) else callback)

    def prepare(self, resume_from_checkpoint: bool | str | Path | None = None) -> None:
        """Claim `args.output_dir` and look for mistakes in data and settings; training does so on its own.

        Raises:
            FileExistsError, RuntimeError: the output directory holds another run, or is in use.
            ValueError: data that no classifier can be trained on, images that can't be read, sizes that don't fit.
            PushError: a push at the end would fail.
        """
        if self._is_prepared:
            return
        args, train_dataset = self.args, self._train_dataset()
        if args.head == "auto":
            _check_head_can_be_chosen(args.phase_b.views, self.eval_dataset)
        resume = bool(resume_from_checkpoint) or args.resume == "auto"
        if self.accelerator.is_main_process:
            claim_run_directory(
                args.output_dir, self.run_arguments, resume=resume, overwrite=args.overwrite_output_dir
            )
            if args.push_to_hub:
                check_push(args.repo_id)
            check_images(self._splits())
        self.accelerator.wait_for_everyone()
        check_before_training(
            self.model.clip,
            train_dataset,
            self.processing_class.image_processor,
            batch_size=args.phase_a.batch_size if args.phase_a.epochs else None,
        )
        _warn_of_gentle_settings(self.model, args.phase_a)
        self._is_prepared = True

    def train(self, resume_from_checkpoint: bool | str | Path | None = None) -> BalladTrainOutput:
        """Phase A, then phase B.

        Args:
            resume_from_checkpoint: `True` continues the interrupted run in `args.output_dir`, or starts where there is
                none; a path names a checkpoint of phase A. Default: what `args.resume` says.

        Returns:
            The outcome of both phases. The model is trained in place.

        Raises:
            FileExistsError: the output directory holds another run.
            ValueError: settings or data that can't be trained on.
            NonFiniteLossError: a loss became NaN or infinite.
            TrainingInterrupted: SIGTERM or Ctrl-C arrived, and the state is saved.
        """
        self._in_train = True
        try:
            output = BalladTrainOutput(self.train_phase_a(resume_from_checkpoint), self.train_phase_b())
        finally:
            self._in_train = False
        self.events.end()
        return output

    def train_phase_a(self, resume_from_checkpoint: bool | str | Path | None = None) -> PhaseAResult:
        """Continued pretraining of the towers; see [`train_phase_a`] of the package."""
        self.prepare(resume_from_checkpoint)
        args = self.args
        pusher = None
        if args.push_to_hub and args.hub_strategy == "checkpoint" and self.accelerator.is_main_process:
            pusher = CheckpointPusher(args.repo_id, private=args.hub_private or None)
            push_checkpoints = _PushCheckpoints(pusher)
            self.add_callback(push_checkpoints)
        try:
            self.phase_a = train_phase_a(
                self.model,
                self._train_dataset(),
                self.processing_class,
                args.phase_a,
                eval_dataset=self.eval_dataset,
                accelerator=self.accelerator,
                output_dir=args.output_dir,
                seed=args.seed,
                resume_from_checkpoint=resume_from_checkpoint or args.resume == "auto",
                callbacks=self.events,
                num_workers=args.num_workers,
                eval_batch_size=args.eval_batch_size,
            )
        finally:
            if pusher is not None:
                self.events.callbacks.remove(push_checkpoints)
                pusher.close()
        self._end_unless_in_train()
        return self.phase_a

    def train_phase_b(self) -> PhaseBResult:
        """Features of the frozen towers, then the adapter on balanced samples; see [`train_phase_b`].

        With `args.head="auto"` the best head follows, see [`choose_head`]; `head_choice` says which and why.
        """
        self.prepare()
        args = self.args
        table = self.extract_features(self._train_dataset(), train=True)
        eval_table = None if self.eval_dataset is None else self.extract_features(self.eval_dataset)
        start = self.model.adapter.linear.weight.detach().clone()  # (dim, dim)
        self.phase_b = train_phase_b(
            self.model, table, args.phase_b, eval_table=eval_table, seed=args.seed, callbacks=self.events
        )
        if args.head == "auto" and eval_table is not None:
            self.head_choice = choose_head(self.model, table, eval_table, start, seed=args.seed)
            logger.info(self.head_choice.to_text())
        self._end_unless_in_train()
        return self.phase_b

    def extract_features(self, dataset: Any, train: bool = False) -> FeatureTable:
        """Image features of a dataset from the towers as they are now.

        Args:
            dataset: as `train_dataset`.
            train: make the augmented views that `args.phase_b.views` asks for.
        """
        args, dataset = self.args, match_classes(dataset, self.model.config.class_names)
        options: dict[str, Any] = {}
        if train and args.phase_b.views != 1:
            options = {
                "views": views_per_image(dataset.labels, args.phase_b, args.seed),
                "transform": train_transform(
                    self.processing_class.image_processor,
                    (args.phase_a.crop_scale, 1.0),
                    args.phase_a.horizontal_flip,
                    args.phase_a.color_jitter,
                ),
            }
        return extract_features(
            self.model,
            dataset,
            self.processing_class,
            batch_size=args.eval_batch_size,
            num_workers=args.num_workers,
            cache_dir=args.feature_cache_dir,
            seed=args.seed,
            accelerator=self.accelerator,
            **options,
        )

    def evaluate(self, dataset: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Metrics of the model on a dataset.

        Args:
            dataset: as `train_dataset`; default: `eval_dataset`.
            metric_key_prefix: put before each name, with an underscore.

        Returns:
            Name -> value, as fractions: `eval_overall`, `eval_mean_class`, `eval_many`, `eval_medium`, `eval_few`,
            `eval_worst_class`, ..., and those of `compute_metrics`. Shot groups without a class are absent.

        Raises:
            ValueError: no dataset.
        """
        dataset = self.eval_dataset if dataset is None else dataset
        if dataset is None:
            raise ValueError("There is nothing to evaluate: pass a dataset, or give the trainer an eval_dataset.")
        batches: list[tuple[torch.Tensor, torch.Tensor]] = []
        keep = None
        if self.compute_metrics is not None:

            def keep(logits: torch.Tensor, rows: torch.Tensor) -> None:
                batches.append((rows, logits.float().cpu()))

        predictions = self.predict(dataset, on_logits=keep)
        metrics = self._metrics(predictions)
        values: dict[str, Any] = {name: getattr(metrics, name) for name in METRIC_NAMES}
        if self.compute_metrics is not None:
            logits = self._in_order(batches, len(predictions))
            values |= self.compute_metrics(EvalPrediction(predictions=logits, label_ids=predictions.labels))
        named = {f"{metric_key_prefix}_{name}": value for name, value in values.items() if value is not None}
        self.events.log(named)
        return named

    def predict(self, dataset: Any, split: str | None = None, **options: Any) -> Predictions:
        """The model's prediction for every image of a dataset, in its order.

        Args:
            dataset: as `train_dataset`.
            split: name of the split, such as `"test"`; reports and plots show it.
            options: of [`predict`] in `ballad_hf.evaluation.evaluate`.
        """
        return predict(
            self.model,
            as_image_dataset(dataset),
            self.processing_class,
            split=split,
            batch_size=self.args.eval_batch_size,
            num_workers=self.args.num_workers,
            accelerator=self.accelerator,
            **options,
        )

    def save_results(
        self, predictions: Mapping[str, Predictions], dataset: Any = None, title: str | None = None
    ) -> dict[str, LongTailMetrics]:
        """Write metrics, plots, `report.html` and the model card of some stages to `args.output_dir`.

        Args:
            predictions: of each stage on the same images, in order, such as those before training and of each phase.
            dataset: these images, for the report's mistakes.
            title: default: the dataset's name in `run_arguments`.

        Returns:
            The metrics of each stage; on every process, which must all call this.
        """
        results = {stage: self._metrics(rows) for stage, rows in predictions.items()}
        title = title or str(self.run_arguments.get("dataset", Path(self.args.output_dir).name))
        if self.accelerator.is_main_process:
            histories = {
                name: phase.history
                for name, phase in (("phase A", self.phase_a), ("phase B", self.phase_b))
                if phase is not None
            }
            plots = write_results(
                self.args.output_dir,
                results,
                predictions,
                title=title,
                dataset=None if dataset is None else as_image_dataset(dataset),
                histories=histories,
                arguments=self.run_arguments,
                overwrite=True,
            )
            self._card = self.create_model_card(results, dataset_name=title, plots=plots)
        self.accelerator.wait_for_everyone()
        return results

    def save_model(self, output_dir: str | Path | None = None) -> Path:
        """Save a model directory: weights, config, processor and model card. Every process must call this.

        Args:
            output_dir: default: `args.output_dir`.

        Returns:
            The folder.
        """
        folder = Path(output_dir or self.args.output_dir)
        if self.accelerator.is_main_process:
            save_model_directory(
                self.model,
                folder,
                self.processing_class,
                card=self._card,
                arguments=self.run_arguments,
                overwrite=True,
            )
        self.accelerator.wait_for_everyone()
        return folder

    def create_model_card(self, results: Mapping[str, LongTailMetrics], **details: Any) -> Any:
        """A model card from measured results.

        Args:
            results: metrics by stage on the same images; the last is what the card reports.
            details: of [`render_model_card`].
        """
        options: dict[str, Any] = {
            "dataset_name": str(self.run_arguments.get("dataset", "images")),
            "arguments": self.run_arguments,
            "datasets": self._splits(),
            "seeds": self.args.seed,
        }
        return render_model_card(self.model, results, **options | details)

    def push_to_hub(self, repo_id: str | None = None, **options: Any) -> str | None:
        """Save the model directory and push it to the Hub. Every process must call this.

        Args:
            repo_id: `owner/name`; default: `args.repo_id`.
            options: of [`push_model_directory`].

        Returns:
            The repository's address on the main process, `None` on the others.
        """
        folder = self.save_model()
        if not self.accelerator.is_main_process:
            return None
        options.setdefault("private", self.args.hub_private or None)
        return str(push_model_directory(folder, repo_id or self.args.repo_id, **options))

    def _train_dataset(self) -> ImageDataset:
        if self.train_dataset is None:
            raise ValueError("There is nothing to train on: give the trainer a train_dataset.")
        return self.train_dataset

    def _splits(self) -> dict[str, ImageDataset]:
        splits = {"train": self.train_dataset, "validation": self.eval_dataset}
        return {name: split for name, split in splits.items() if split is not None}

    def _metrics(self, predictions: Predictions) -> LongTailMetrics:
        config = self.model.config
        return LongTailMetrics.from_predictions(predictions, config.class_counts, config.class_names)

    def _in_order(self, batches: list[tuple[torch.Tensor, torch.Tensor]], images: int) -> np.ndarray:
        """Logits (images, classes) from the batches of all processes, which hold rows in any order."""
        if self.accelerator.num_processes > 1:
            batches = gather_object(batches)
        logits = torch.empty(images, self.model.config.num_labels)
        for rows, values in batches:
            logits[rows] = values
        return logits.numpy()

    def _end_unless_in_train(self) -> None:
        if not self._in_train:
            self.events.end()


class _PushCheckpoints(TrainerCallback):
    """Uploads each checkpoint in the background."""

    def __init__(self, pusher: CheckpointPusher):
        self.pusher = pusher

    def on_save(self, args: Any, state: Any, control: Any, checkpoint: Path, **kwargs: Any) -> None:
        self.pusher.submit(checkpoint)


def _check_head_can_be_chosen(views: int | str, eval_dataset: ImageDataset | None) -> None:
    if eval_dataset is None:
        raise ValueError(
            "head is 'auto', but there is no validation split to choose on: give an eval_dataset "
            "(--validation_fraction above 0), or set head to 'adapter'."
        )
    if views == "balanced":
        raise ValueError(
            "head is 'auto', but phase_b_views is 'balanced', which fits the draws of phase B alone: give a number of "
            "views, or set head to 'adapter'."
        )


def _warn_of_gentle_settings(model: BalladForImageClassification, args: PhaseAArguments) -> None:
    """Random weights do not learn at a learning rate that is meant to preserve a pretraining."""
    is_gentle = args.optimizer == "sgd" and args.learning_rate < _SCRATCH_RATE
    if model.pretrained is False and args.epochs and is_gentle:
        logger.warning(
            f"The towers have random weights, and SGD at a learning rate of {args.learning_rate:g} hardly changes "
            "them: use optimizer='adamw' with learning_rate=1.5e-3, as plan_training and the recipe 'digits' do."
        )


def _reporting_callbacks(report_to: Sequence[str]) -> list[TrainerCallback]:
    """The tracker callbacks of transformers, made now so that one that is not installed is known at once."""
    callbacks = []
    for tracker in report_to:
        try:
            callbacks += [callback() for callback in get_reporting_integration_callbacks([tracker])]
        except RuntimeError as error:
            raise ImportError(f"report_to names {tracker!r}, which is not installed: {error}") from error
        except ValueError as error:
            raise ValueError(f"report_to is {tracker!r}: {error}") from error
    return callbacks
