"""Train a Ballad: continued pretraining of a CLIP on long-tailed pictures, then a linear adapter on balanced samples.

    accelerate launch examples/train_ballad.py
    accelerate launch examples/train_ballad.py --dataset path/to/pictures --output_dir outputs/mine

Without a data set or a model it runs on built-in pictures with a small CLIP, offline (examples/recipes/digits.yaml).
"""

import sys
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import AutoImageProcessor, AutoTokenizer

from ballad_hf import (
    BalladForImageClassification,
    LongTailMetrics,
    extract_features,
    load_splits,
    push_bundle,
    save_bundle,
    train_phase_a,
    train_phase_b,
)
from ballad_hf.evaluation.evaluate import predict
from ballad_hf.evaluation.table import metrics_table
from ballad_hf.hub.model_card import render_model_card
from ballad_hf.models.tiny_clip import build_tiny_clip
from ballad_hf.training.command_line import parse_arguments
from ballad_hf.training.preflight import check_before_training
from ballad_hf.training.run_folder import claim_run_folder


BUILT_IN = Path(__file__).parent / "recipes" / "digits.yaml"


def main(command_line: list[str]) -> None:
    # Mistakes in the arguments, the folder or the data end the run before anything is trained.
    arguments = parse_arguments(command_line, default_config=BUILT_IN, description=__doc__.split("\n")[0])
    run = arguments.run
    accelerator = Accelerator(
        mixed_precision=run.mixed_precision, log_with=run.report_to, project_dir=Path(run.output_dir) / "logs"
    )
    set_seed(run.seed)
    if accelerator.is_main_process:
        claim_run_folder(
            run.output_dir, arguments.to_dict(), resume=run.resume == "auto", overwrite=run.overwrite_output_dir
        )
    accelerator.wait_for_everyone()
    output_dir = Path(run.output_dir)

    # The pictures, and the dual encoder with what feeds it.
    with accelerator.main_process_first():
        splits = load_splits(**vars(arguments.data), seed=run.seed)
    options = vars(arguments.model).copy()
    name, revision = options.pop("model_name_or_path"), options.pop("model_revision")
    if name == "tiny":
        words = " ".join([*options["templates"], *splits.class_names]).replace(".", " ").split()
        clip, tokenizer, image_processor = build_tiny_clip(words=words, seed=run.seed)
        model = BalladForImageClassification.from_dual_encoder(clip, splits.class_names, tokenizer, **options)
    else:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        image_processor = AutoImageProcessor.from_pretrained(name, revision=revision)
        model = BalladForImageClassification.from_clip(
            name, splits.class_names, tokenizer, revision=revision, **options
        )
    model.config.class_counts = splits.class_counts.tolist()
    check_before_training(model.clip, splits, image_processor)
    model.to(accelerator.device)

    # The method: both towers on the data as it is, then the adapter on balanced samples of the frozen features.
    reading = {"image_processor": image_processor, "num_workers": run.num_workers, "accelerator": accelerator}
    test = splits.test if splits.test is not None else splits.validation
    predictions = {"before training": predict(model, test, batch_size=run.eval_batch_size, **reading)}
    train_phase_a(
        model,
        splits,
        tokenizer,
        image_processor,
        arguments.phase_a,
        accelerator=accelerator,
        output_dir=output_dir,
        seed=run.seed,
        resume=run.resume,
    )
    predictions["phase A"] = predict(model, test, batch_size=run.eval_batch_size, **reading)
    features = {"batch_size": run.eval_batch_size, "seed": run.seed, "cache_dir": run.feature_cache_dir, **reading}
    train_table = extract_features(model, splits.train, views=arguments.phase_b.views, **features)
    validation_table = extract_features(model, splits.validation, **features)
    train_phase_b(model, train_table, arguments.phase_b, validation=validation_table, seed=run.seed)
    predictions["phase B"] = predict(model, test, batch_size=run.eval_batch_size, **reading)

    # What came of it.
    if not accelerator.is_main_process:
        return
    results = {
        stage: LongTailMetrics.from_predictions(said, splits.class_counts, splits.class_names)
        for stage, said in predictions.items()
    }
    print(f"\n{splits.name}: {len(test)} test pictures, accuracy in percent\n\n{metrics_table(results)}\n")
    save_bundle(output_dir, model, tokenizer, image_processor, metrics=results, arguments=arguments.to_dict())


if __name__ == "__main__":
    main(sys.argv[1:])
