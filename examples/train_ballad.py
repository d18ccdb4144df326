"""Train a Ballad: continued pretraining of a CLIP on long-tailed pictures, then a linear adapter on balanced samples.

    accelerate launch examples/train_ballad.py
    accelerate launch examples/train_ballad.py --dataset path/to/pictures --output_dir outputs/mine

Without a data set or a model it runs on built-in pictures with a small CLIP, offline (examples/recipes/digits.yaml).
"""

import sys
from pathlib import Path
from types import SimpleNamespace

from accelerate import Accelerator
from accelerate.utils import set_seed

from ballad_hf import (
    BalladForImageClassification,
    LongTailMetrics,
    extract_features,
    load_splits,
    push_model_directory,
    train_phase_a,
    train_phase_b,
)
from ballad_hf.command_errors import errors_in_one_line
from ballad_hf.conversion.dual_encoders import load_dual_encoder, load_image_processor, load_tokenizer
from ballad_hf.conversion.tiny_clip import build_tiny_clip
from ballad_hf.data.transforms import train_transform
from ballad_hf.data.unreadable import check_pictures
from ballad_hf.evaluation.evaluate import predict
from ballad_hf.evaluation.report import write_results
from ballad_hf.evaluation.summary import metrics_table, verdict
from ballad_hf.hub.model_card import render_model_card
from ballad_hf.hub.model_directory import save_model_directory
from ballad_hf.hub.push import CheckpointPusher, PushError, check_push
from ballad_hf.training.command_line import parse_arguments
from ballad_hf.training.preflight import check_before_training
from ballad_hf.training.run_folder import claim_run_folder


BUILT_IN = Path(__file__).parent / "recipes" / "digits.yaml"
USE_IT = """\
Saved in {folder}. To use it, in Python:

    import ballad_hf
    from transformers import pipeline
    pipeline("image-classification", model="{folder}")("picture.png")
"""


def main(command_line: list[str]) -> None:
    # Mistakes in the arguments, the folder or the data end the run before anything is trained.
    arguments = parse_arguments(command_line, default_config=BUILT_IN, description=__doc__.split("\n")[0])
    phase_a, phase_b, run = arguments.phase_a, arguments.phase_b, arguments.run
    output_dir = Path(run.output_dir)
    accelerator = Accelerator(
        mixed_precision=run.mixed_precision, log_with=run.report_to, project_dir=output_dir / "logs"
    )
    set_seed(run.seed)
    if accelerator.is_main_process:
        claim_run_folder(
            output_dir, arguments.to_dict(), resume=run.resume == "auto", overwrite=run.overwrite_output_dir
        )
        if run.push_to_hub:
            check_push(repository_of(run))
    with accelerator.main_process_first():
        splits = load_splits(**vars(arguments.data), seed=run.seed)
    test = splits.validation if splits.test is None else splits.test
    if test is None:
        raise ValueError(
            f"{splits.name} has no test split, and validation_fraction 0 holds nothing out, so no accuracy could be "
            "measured: give test_split, or a validation_fraction above 0."
        )
    if accelerator.is_main_process and arguments.data.on_unreadable == "raise":
        check_pictures(splits)
    model, tokenizer, image_processor = load_model(arguments.model, splits.class_names, run.seed)
    model.config.class_counts = splits.class_counts.tolist()
    batch_size = phase_a.batch_size if phase_a.epochs else None
    check_before_training(model.clip, splits, image_processor, batch_size)
    model.to(accelerator.device)

    split = "validation" if splits.test is None else "test"
    reading = {"num_workers": run.num_workers, "accelerator": accelerator}
    evaluation = {"split": split, "batch_size": run.eval_batch_size, **reading}
    predictions = {"before training": predict(model, test, image_processor, **evaluation)}

    # Phase A: both towers on the data as it is.
    pusher = None
    if run.push_to_hub and run.hub_strategy == "checkpoint" and accelerator.is_main_process:
        pusher = CheckpointPusher(repository_of(run), private=run.hub_private or None)
    first = train_phase_a(
        model,
        splits,
        tokenizer,
        image_processor,
        phase_a,
        accelerator=accelerator,
        output_dir=output_dir,
        seed=run.seed,
        resume=run.resume,
        num_workers=run.num_workers,
        eval_batch_size=run.eval_batch_size,
        on_checkpoint=pusher and pusher.submit,
    )
    if pusher is not None:
        pusher.close()
    predictions["phase A"] = predict(model, test, image_processor, **evaluation)

    # Phase B: the adapter on balanced samples of what the towers, frozen now, see.
    extraction = {"batch_size": run.eval_batch_size, "seed": run.seed, "cache_dir": run.feature_cache_dir, **reading}
    extraction["image_processor"] = image_processor
    augmentation = train_transform(
        image_processor, (phase_a.crop_scale, 1.0), phase_a.horizontal_flip, phase_a.color_jitter
    )
    train_table = extract_features(
        model,
        splits.train,
        views=phase_b.views,
        transform=augmentation if phase_b.views > 1 else None,
        **extraction,
    )
    validation_table = extract_features(model, splits.validation, **extraction)
    second = train_phase_b(model, train_table, phase_b, validation=validation_table, seed=run.seed)
    predictions["phase B"] = predict(model, test, image_processor, **evaluation)

    if accelerator.is_main_process:
        processor = SimpleNamespace(tokenizer=tokenizer, image_processor=image_processor)
        histories = {"phase A": first.history, "phase B": second.history}
        share(model, processor, splits, predictions, histories, arguments)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def load_model(options, class_names, seed):
    """The dual encoder under an adapter, and what feeds it: a tokenizer and an image processor."""
    values = vars(options).copy()
    name, revision = values.pop("model_name_or_path"), values.pop("model_revision")
    if name == "tiny":
        words = " ".join([*options.templates, *class_names]).replace(".", " ").replace("{}", " ").split()
        clip, tokenizer, image_processor = build_tiny_clip(patch_size=4, projection_dim=64, words=words, seed=seed)
    else:
        hub = {} if revision is None else {"revision": revision}
        clip = load_dual_encoder(name, **hub)
        tokenizer = load_tokenizer(name, clip.config, **hub)
        image_processor = load_image_processor(name, clip.config, **hub)
    model = BalladForImageClassification.from_dual_encoder(clip, class_names, tokenizer, **values)
    return model, tokenizer, image_processor


def repository_of(run):
    """The Hub repository that the run is pushed to."""
    return run.hub_model_id or Path(run.output_dir).name


def share(model, processor, splits, predictions, histories, arguments):
    """Save everything in one folder, print the results and how to use the model, and push it if requested."""
    run, flat = arguments.run, arguments.to_dict()
    test = splits.validation if splits.test is None else splits.test
    results = {
        stage: LongTailMetrics.from_predictions(rows, splits.class_counts, splits.class_names)
        for stage, rows in predictions.items()
    }
    plots = write_results(
        run.output_dir,
        results,
        predictions,
        title=splits.name,
        dataset=test,
        histories=histories,
        arguments=flat,
        overwrite=True,
    )
    data = dict(splits.items())
    card = render_model_card(
        model, results, dataset_name=splits.name, arguments=flat, datasets=data, seeds=run.seed, plots=plots
    )
    folder = save_model_directory(model, run.output_dir, processor, card=card, arguments=flat, overwrite=True)
    images = "validation images, which also selected the weights" if splits.test is None else "test images"
    if splits.validation is None:
        images += " after the last epoch (no validation split)"
    print(f"\n{splits.name}: accuracy on {len(test)} {images}, in percent\n")
    print("\n\n".join([metrics_table(results), *verdict(results), USE_IT.format(folder=folder)]))
    if run.push_to_hub:
        try:
            print(f"Pushed to {push_model_directory(folder, repository_of(run), private=run.hub_private or None)}")
        except PushError as error:  # the result is safe, and the message says how to push it later
            raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    with errors_in_one_line(__file__):
        main(sys.argv[1:])
