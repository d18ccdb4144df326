"""Images per second and accuracy of a model's ONNX files, in float32 and int8, against its image tower in torch.

    python benchmarks/int8.py MODEL --split validation

The dataset is that of the model's run unless `--dataset` names another; int8 is calibrated on its training split. The
tower stops at its features, the files go on to logits. They take turns on the same images, on one thread each, and
what is counted are seconds of the CPU, so that what else the machine does matters little. Both files need
`pip install 'ballad_hf[onnx]'`.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from ballad_hf import as_image_dataset, load_image_dataset
from ballad_hf.commands.options import OptionParser, add_dataclass, build, load_model, parse_for_model
from ballad_hf.data.transforms import evaluation_transform
from ballad_hf.evaluation.evaluate import align_labels
from ballad_hf.inference.export import IMAGE_FILE, export_onnx
from ballad_hf.training.arguments import DataArguments


BATCH_SIZES = (1, 32)
Runtime = Callable[[np.ndarray], np.ndarray]  # pixel values -> logits, or features of the bare tower


def main() -> None:
    parser = OptionParser("int8", __doc__.split("\n")[0])
    parser.prog = "int8.py"
    parser.add_argument("model", metavar="MODEL", help="model directory")
    parser.add_argument("--split", default="validation", help="of the accuracy")
    parser.add_argument("--repeats", type=int, default=25, help="turns per batch size")
    parser.add_argument("--num_calibration_samples", type=int, default=256, help="training images")
    parser.add_argument("--seed", type=int, default=0, help="of the run's splits, and of the calibration images")
    add_dataclass(parser, DataArguments, "Data; default: the dataset of the model's run")
    options = parse_for_model(parser, None)
    torch.set_num_threads(1)

    model, processor = load_model(options["model"])
    image_processor = getattr(processor, "image_processor", processor)
    splits = load_image_dataset(**vars(build(DataArguments, options)), seed=options["seed"])
    images = align_labels(as_image_dataset(splits[options["split"]]), model.config.class_names)
    images = images.with_transform(evaluation_transform(image_processor))

    @torch.no_grad()
    def tower(pixel_values: np.ndarray) -> np.ndarray:
        return model.clip.get_image_features(pixel_values=torch.from_numpy(pixel_values)).pooler_output.numpy()

    @torch.no_grad()
    def whole(pixel_values: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(pixel_values)).logits.numpy()

    with tempfile.TemporaryDirectory() as folder:
        float32, int8 = Path(folder, "float32"), Path(folder, "int8")
        export_onnx(model, float32, image_processor)
        calibration = {"num_calibration_samples": options["num_calibration_samples"], "seed": options["seed"]}
        export_onnx(model, int8, image_processor, quantize="int8", calibration_dataset=splits["train"], **calibration)
        sizes = ["", *(f"{(file / IMAGE_FILE).stat().st_size / 1e6:.1f}" for file in (float32, int8))]
        files = [session(float32), session(int8)]
        print(f"1 thread, torch {torch.__version__}, onnxruntime {onnxruntime.__version__}")
        pixel_values = next(batches(images, max(BATCH_SIZES)))
        speeds = [speed([tower, *files], pixel_values[:size], options["repeats"]) for size in BATCH_SIZES]
        accuracies = accuracy([whole, *files], images)
    heads = [f"images/s, batch {size} | against torch (quartiles)" for size in BATCH_SIZES]
    print(f"| runtime | MB | {' | '.join(heads)} | accuracy | same class |")
    print(f"| --- {'| ---: ' * 7}|")
    names = ["torch float32", "ONNX float32", "ONNX int8"]
    for name, size, *timed, scored in zip(names, sizes, *speeds, accuracies, strict=True):
        print(f"| {' | '.join([name, size, *timed, scored])} |")


def session(folder: Path) -> Runtime:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    loaded = onnxruntime.InferenceSession(folder / IMAGE_FILE, options, providers=["CPUExecutionProvider"])
    return lambda pixel_values: loaded.run(["logits"], {"pixel_values": pixel_values})[0]


def speed(runtimes: list[Runtime], pixel_values: np.ndarray, repeats: int) -> list[str]:
    """Images per second of each, and the ratio to the first: median and quartiles over the turns."""
    passes = -(-max(BATCH_SIZES) // len(pixel_values))  # so that a turn is long enough for the clock
    seconds = np.empty((repeats + 1, len(runtimes)))
    for turn in range(repeats + 1):
        for place, run in enumerate(runtimes):
            start = time.process_time()
            for _ in range(passes):
                run(pixel_values)
            seconds[turn, place] = time.process_time() - start
    seconds = seconds[1:]  # the first turn warms up
    cells = []
    for place in range(len(runtimes)):
        rate = passes * len(pixel_values) / statistics.median(seconds[:, place])
        low, median, high = np.quantile(seconds[:, 0] / seconds[:, place], [0.25, 0.5, 0.75])
        cells.append(f"{rate:.0f} | " + (f"{median:.2f} ({low:.2f} to {high:.2f})" if place else "1"))
    return cells


def accuracy(runtimes: list[Runtime], images) -> list[str]:
    """Accuracy of each, and how often it predicts what the first predicts."""
    predicted = [[run(pixel_values).argmax(axis=1) for run in runtimes] for pixel_values in batches(images)]
    classes = [np.concatenate(column) for column in zip(*predicted, strict=True)]
    return [
        f"{100 * np.mean(found == images.labels):.2f} | {100 * np.mean(found == classes[0]):.2f}" for found in classes
    ]


def batches(images, size: int = 50) -> Iterator[np.ndarray]:
    for start in range(0, len(images), size):
        chosen = range(start, min(start + size, len(images)))
        yield np.stack([images[index]["pixel_values"].numpy() for index in chosen])


if __name__ == "__main__":
    main()
