"""`ballad convert`: checkpoints of other libraries to folders of transformers, and trained models to other forms."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..training.arguments import DataArguments
from .options import OptionParser, add_dataclass, build, load_model, option, parse_for_model


KINDS = {
    "openai": "an OpenAI CLIP file or its state dict, to a folder of transformers",
    "open-clip": "an open_clip repository or folder, to a folder of transformers",
    "official": "a checkpoint of the official BALLAD code, to a BALLAD model",
    "fold": "a BALLAD model, to a plain dual encoder with the adapter folded in",
    "vision-only": "a BALLAD model, to the same without its text tower",
    "onnx": "a BALLAD model, to ONNX files for onnxruntime",
}


@dataclass
class QuantizationArguments:
    """Whether to export in 8-bit integers, and what the ranges of the activations are measured on."""

    quantize: Literal["int8"] | None = option("compute in 8-bit integers; default: float32")
    num_calibration_samples: int = option("training images to measure the activations on", 256)
    seed: int = option("of their choice, and of a held-out validation split; default: that of the run", 0)


def main(options: Sequence[str]) -> None:
    if not options or options[0] in ("-h", "--help"):
        print(_help())
        return
    kind, *rest = options
    if kind not in KINDS:
        close = difflib.get_close_matches(kind, KINDS, n=1)
        suggestion = f"Did you mean {close[0]!r}?" if close else f"Choose one of {', '.join(KINDS)}."
        OptionParser("convert", "").error(f"there is no conversion {kind!r}. {suggestion}")
    parser = parser_of(kind)
    run(kind, **(_onnx_options(parser, rest) if kind == "onnx" else vars(parser.parse_args(rest))))


def parser_of(kind: str) -> OptionParser:
    """The options of one conversion."""
    parser = OptionParser(f"convert {kind}", f"Convert {KINDS[kind]}.")
    parser.add_argument("source", metavar="SOURCE", help="file, folder or Hub name")
    parser.add_argument("output_dir", metavar="FOLDER", help="the folder to make")
    if kind in ("openai", "open-clip", "official"):
        parser.add_argument("--tokenizer", help="folder, Hub name or bpe_simple_vocab_16e6.txt.gz, if not OpenAI's")
        parser.add_argument("--no_tokenizer", action="store_true", help="write no tokenizer")
    if kind in ("openai", "official"):
        parser.add_argument("--text_attention_heads", type=int, help="if the heads are not 64 wide")
    if kind == "open-clip":
        parser.add_argument("--revision", help="branch, tag or commit of the Hub repository")
    if kind == "official":
        parser.add_argument("--class_names", metavar="FILE", help="one class name per line, in label order")
        parser.add_argument("--templates", nargs="+", metavar="TEMPLATE", help="prompts with {} for the class name")
        parser.add_argument("--adapter_ratio", type=float, help="if not 0.2, that of the official code")
        parser.add_argument("--logit_scale", type=float, help="if not 100, that of the official code")
    if kind == "onnx":
        add_dataclass(parser, QuantizationArguments, "Quantisation")
        add_dataclass(
            parser, DataArguments, "Training images to calibrate on; default: the dataset of the model's run"
        )
    return parser


def _onnx_options(parser: OptionParser, options: Sequence[str]) -> dict[str, Any]:
    """The options of an export; a dataset only where it is to be quantised."""
    parser.set_defaults(dataset=None)
    parsed = vars(parser.parse_args(options))
    if parsed["quantize"] is not None:
        parsed = parse_for_model(parser, options, "source")
    elif parsed["dataset"] is not None:
        raise ValueError("--dataset is what to calibrate on: add --quantize int8, or leave it out.")
    settings = build(QuantizationArguments, parsed)
    data = None if settings.quantize is None else build(DataArguments, parsed)
    return {"source": parsed["source"], "output_dir": parsed["output_dir"], "settings": settings, "data": data}


def run(kind: str, source: str, output_dir: str, **options: Any) -> None:
    """Convert, and print the sizes."""
    from transformers.utils import logging

    from ..files import read_text

    logging.disable_progress_bar()
    if options.pop("no_tokenizer", False):
        options["tokenizer"] = False
    if options.get("class_names") is not None:
        options["class_names"] = read_text(options["class_names"]).splitlines()
    given = {name: value for name, value in options.items() if value is not None}
    _converter(kind)(source, output_dir, **given)
    before = f" (from {_megabytes(source)})" if Path(source).is_dir() else ""
    print(f"{output_dir}: {_megabytes(output_dir)}{before}")


def _converter(kind: str) -> Callable[..., Any]:
    from ..conversion import convert

    converters: dict[str, Callable[..., Any]] = {
        "openai": convert.convert_openai_clip,
        "open-clip": convert.convert_open_clip,
        "official": convert.convert_official_ballad,
        "fold": convert.convert_to_clip,
        "vision-only": convert.convert_to_vision_only,
        "onnx": _export_onnx,
    }
    return converters[kind]


def _export_onnx(
    source: str, output_dir: str, settings: QuantizationArguments, data: DataArguments | None = None
) -> None:
    from ..data.sources import load_image_dataset
    from ..inference.export import export_onnx

    model, processor = load_model(source)
    dataset = None if data is None else load_image_dataset(**vars(data), seed=settings.seed)["train"]
    image_processor = getattr(processor, "image_processor", processor)
    export_onnx(model, output_dir, image_processor, calibration_dataset=dataset, **vars(settings))


def _megabytes(folder: str) -> str:
    return f"{sum(file.stat().st_size for file in Path(folder).rglob('*') if file.is_file()) / 1e6:.1f} MB"


def _help() -> str:
    width = max(map(len, KINDS))
    lines = [f"  {kind:<{width}}  {summary}" for kind, summary in KINDS.items()]
    return "\n".join(
        ["usage: ballad convert KIND SOURCE FOLDER [options]", "", "kinds:", *lines, ""]
        + ["`ballad convert KIND --help` lists the options of a kind."]
    )
