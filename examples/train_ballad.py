"""Train a BALLAD model: continued pretraining of a CLIP on long-tailed images, then an adapter on balanced samples.

    accelerate launch examples/train_ballad.py
    accelerate launch examples/train_ballad.py path/to/images --output_dir outputs/mine

Without a dataset or a model it trains on built-in images with a small CLIP, offline. `ballad train` does the same from
the installed package; this file is the story, to be copied and changed.
"""

import sys

from accelerate.utils import set_seed

from ballad_hf import BalladForImageClassification, BalladTrainer, load_image_dataset
from ballad_hf.commands.cli import errors_in_one_line
from ballad_hf.commands.train import USE_IT, parse_arguments
from ballad_hf.evaluation.summary import metrics_table, verdict


def main(command_line: list[str]) -> None:
    arguments = parse_arguments(command_line, default_config="digits")
    args = arguments.training
    set_seed(args.seed)

    # The data, and a dual encoder with its classes.
    dataset = load_image_dataset(**vars(arguments.data), seed=args.seed)
    model = BalladForImageClassification.from_clip(
        arguments.model.model, dataset=dataset["train"], seed=args.seed, **arguments.model.from_clip_options()
    )
    trainer = BalladTrainer(
        model, args, dataset["train"], dataset.get("validation"), run_arguments=arguments.to_dict()
    )
    trainer.prepare()  # mistakes in the data or the folder end the run here

    # Both phases, measured on images that neither trains on: the test split, or else those that chose the weights.
    split = "test" if "test" in dataset else "validation"
    if split not in dataset:
        raise ValueError("There is no test split, and validation_fraction 0 leaves no validation split to measure on.")
    stages = {"before training": trainer.predict(dataset[split], split)}
    trainer.train_phase_a()
    stages["phase A"] = trainer.predict(dataset[split], split)
    trainer.train_phase_b()
    stages["phase B"] = trainer.predict(dataset[split], split)

    # Metrics, plots, report, model card and the model, in one folder.
    results = trainer.save_results(stages, dataset[split])
    folder = trainer.save_model()
    if trainer.accelerator.is_main_process:
        print(f"\nAccuracy on {len(dataset[split])} {split} images, in percent\n\n{metrics_table(results)}\n")
        print("\n\n".join([*verdict(results), USE_IT.format(folder=folder)]))
    if args.push_to_hub:
        address = trainer.push_to_hub()
        if address is not None:  # the main process
            print(f"Pushed to {address}")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    with errors_in_one_line(__file__):
        main(sys.argv[1:])
