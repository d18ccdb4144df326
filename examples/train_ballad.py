"""Train a Ballad: continued pretraining of a CLIP on long-tailed pictures, then a linear adapter on balanced samples.

    accelerate launch examples/train_ballad.py
    accelerate launch examples/train_ballad.py --dataset path/to/pictures --output_dir outputs/mine

Without a data set or a model it runs on built-in pictures with a small CLIP, offline (examples/recipes/digits.yaml).
"""

import sys
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import set_seed

from ballad_hf import (
    BalladForImageClassification,
    LongTailMetrics,
    as_image_dataset,
    extract_features,
    load_image_dataset,
    push_bundle,
    save_bundle,
    train_phase_a,
    train_phase_b,
)
from ballad_hf.command_errors import errors_in_one_line
from ballad_hf.data.images import check_images
from ballad_hf.data.transforms import train_transform
from ballad_hf.evaluation.evaluate import predict
from ballad_hf.evaluation.results import write_results
from ballad_hf.evaluation.table import metrics_table
from ballad_hf.hub.model_card import render_model_card
from ballad_hf.hub.push import CheckpointPusher, PushError, check_push
from ballad_hf.models.dual_encoders import load_dual_encoder, load_image_processor, load_tokenizer
from ballad_hf.models.tiny_clip import build_tiny_clip
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
        dataset = load_image_dataset(**vars(arguments.data), seed=run.seed)
    name = dataset["train"].info.dataset_name
    splits = {split: as_image_dataset(images) for split, images in dataset.items()}
    train, validation = splits["train"], splits.get("validation")
    test = splits.get("test", validation)
    if test is None:
        raise ValueError(
            f"{name} has no test split, and validation_fraction 0 holds nothing out, so no accuracy could be "
            "measured: give test_split, or a validation_fraction above 0."
        )
    if accelerator.is_main_process and arguments.data.on_unreadable == "raise":
        check_images(splits)
    model, tokenizer, image_processor = load_model(arguments.model, train.class_names, run.seed)
    model.config.class_counts = train.class_counts.tolist()
    batch_size = phase_a.batch_size if phase_a.epochs else None
    check_before_training(model.clip, train, image_processor, batch_size)
    model.to(accelerator.device)

    reading = {"image_processor": image_processor, "num_workers": run.num_workers, "accelerator": accelerator}
    predictions = {"before training": predict(model, test, batch_size=run.eval_batch_size, **reading)}

    # Phase A: both towers on the data as it is.
    pusher = None
    if run.push_to_hub and run.hub_strategy == "checkpoint" and accelerator.is_main_process:
        pusher = CheckpointPusher(repository_of(run), private=run.hub_private or None)
    train_phase_a(
        model,
        train,
        tokenizer,
        image_processor,
        phase_a,
        eval_dataset=validation,
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
    predictions["phase A"] = predict(model, test, batch_size=run.eval_batch_size, **reading)

    # Phase B: the adapter on balanced samples of what the towers, frozen now, see.
    extraction = {"batch_size": run.eval_batch_size, "seed": run.seed, "cache_dir": run.feature_cache_dir, **reading}
    augmentation = train_transform(
        image_processor, (phase_a.crop_scale, 1.0), phase_a.horizontal_flip, phase_a.color_jitter
    )
    train_table = extract_features(
        model,
        train,
        views=phase_b.views,
        transform=augmentation if phase_b.views > 1 else None,
        **extraction,
    )
    validation_table = None if validation is None else extract_features(model, validation, **extraction)
    train_phase_b(model, train_table, phase_b, validation=validation_table, seed=run.seed)
    predictions["phase B"] = predict(model, test, batch_size=run.eval_batch_size, **reading)

    if accelerator.is_main_process:
        share(model, tokenizer, image_processor, dataset, predictions, arguments)
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


def share(model, tokenizer, image_processor, dataset, predictions, arguments):
    """Save everything in one folder, say what came of it and how to use it, and push it where that was asked for."""
    run, told = arguments.run, arguments.to_dict()
    name, train = dataset["train"].info.dataset_name, as_image_dataset(dataset["train"])
    test = as_image_dataset(dataset["test" if "test" in dataset else "validation"])
    results = {
        stage: LongTailMetrics.from_predictions(said, train.class_counts, train.class_names)
        for stage, said in predictions.items()
    }
    plots = write_results(run.output_dir, results, predictions, title=name, split=test, arguments=told)
    card = render_model_card(
        model, results, dataset_name=name, arguments=told, dataset=dataset, seeds=run.seed, plots=plots
    )
    folder = save_bundle(run.output_dir, model, tokenizer, image_processor, card=card, arguments=told, overwrite=True)
    part = "test images" if "test" in dataset else "validation images, which chose the weights too"
    if "validation" not in dataset:
        part += " after the last epoch (no validation split)"
    print(f"\n{name}: accuracy on {len(test)} {part}, in percent\n")
    print(f"{metrics_table(results)}\n\n{USE_IT.format(folder=folder)}")
    if run.push_to_hub:
        try:
            print(f"Pushed to {push_bundle(folder, repository_of(run), private=run.hub_private or None)}")
        except PushError as error:  # the result is safe, and the message says how to push it later
            raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    with errors_in_one_line(__file__):
        main(sys.argv[1:])
