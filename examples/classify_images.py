"""Classify pictures into a CSV or JSON-lines file: folders, files or patterns, by the model's classes or your own.

    python examples/classify_images.py outputs/digits path/to/pictures --output classes.csv
    python examples/classify_images.py outputs/digits "scans/*.png" --labels "a cat" "a dog" --output classes.jsonl

Stopped, it goes on where it was when it is called again. Pictures that can't be read are listed at the end.
"""

import argparse
import csv
import glob
import json
import logging
import os
import sys
from pathlib import Path

import torch
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import pipeline

from ballad_hf.commands.errors import errors_in_one_line
from ballad_hf.data.images import open_image
from ballad_hf.inference import TASK


SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def main(command_line: list[str]) -> int:
    arguments = parse(command_line)
    output = Path(arguments.output)
    settings = {name: getattr(arguments, name) for name in ("model", "labels", "template", "target_prior", "top_k")}
    found = find_pictures(arguments.pictures)
    logging.getLogger("ballad_hf").setLevel(logging.ERROR)  # a warning a picture would drown the list at the end
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    try:
        classify = pipeline(TASK, model=arguments.model, device=device)
    except OSError as error:
        raise SystemExit(f"error: the model {arguments.model} can't be loaded: {error}") from error
    labels = arguments.labels or getattr(classify.model.config, "class_names", [])
    done = claim(output, settings, arguments.overwrite, columns=min(arguments.top_k, len(labels)))
    files = [file for file in found if file not in done]
    if done:
        print(f"{len(done)} pictures are in {output} already; {len(files)} are left.")
    wanted = {
        "candidate_labels": arguments.labels,
        "hypothesis_template": arguments.template,
        "target_prior": arguments.target_prior,
        "top_k": arguments.top_k,
    }
    results = classify(
        Paths(files),
        batch_size=arguments.batch_size,
        num_workers=arguments.num_workers,
        on_unreadable="skip",
        **{name: value for name, value in wanted.items() if value is not None},
    )
    unreadable = []
    with output.open("a", newline="", encoding="utf-8") as sink:
        for file, classes in zip(files, tqdm(results, total=len(files), unit="picture", mininterval=1), strict=True):
            if not classes:
                unreadable.append(file)
                continue
            sink.write(row_of(file, classes, output.suffix))
            sink.flush()
    print(f"{len(done) + len(files) - len(unreadable)} pictures are classified in {output}")
    if unreadable:
        print(f"{len(unreadable)} pictures can't be read, and are tried again by the next call:", file=sys.stderr)
        for file in unreadable:
            print(f"  {why_unreadable(file)}", file=sys.stderr)
    return 1 if unreadable else 0


def parse(command_line: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a folder that was trained or saved, or a name on the Hub")
    parser.add_argument("pictures", nargs="+", help="folders, files, or patterns in quotes")
    parser.add_argument("--output", required=True, help="a file that ends in .csv or .jsonl")
    parser.add_argument("--labels", nargs="+", help="classes of your own; default: those of the model")
    parser.add_argument("--template", help="a prompt with {} for the label, for classes of your own")
    parser.add_argument("--target_prior", help="how common the classes are: uniform, train, or a power of the counts")
    parser.add_argument("--top_k", type=int, default=1, help="classes to write for each picture")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--num_workers", type=int, default=0, help="processes that read pictures")
    parser.add_argument("--device", help="such as cuda:1; default: a GPU where there is one")
    parser.add_argument("--overwrite", action="store_true", help="start anew where the output exists")
    arguments = parser.parse_args(command_line)
    if Path(arguments.output).suffix not in (".csv", ".jsonl"):
        parser.error(f"--output is {arguments.output!r}: it must end in .csv or .jsonl.")
    for name in ("top_k", "batch_size"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} is {getattr(arguments, name)}: give 1 or more.")
    if arguments.num_workers < 0:
        parser.error(f"--num_workers is {arguments.num_workers}: give 0 (read in this process) or more.")
    if arguments.target_prior not in (None, "uniform", "train"):
        try:
            arguments.target_prior = float(arguments.target_prior)
        except ValueError:
            parser.error(f"--target_prior is {arguments.target_prior!r}: give uniform, train or a number.")
    return arguments


def check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise SystemExit(f"error: --device is {device}, which can't be used here: {reason} Try cpu.") from error


class Paths(Dataset):
    """The pipeline reads from a data set with as many processes as it is told to."""

    def __init__(self, files: list[str]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> str:
        return self.files[index]


def find_pictures(given: list[str]) -> list[str]:
    """Every picture once, in an order that does not change from call to call."""
    found: dict[str, None] = {}
    for name in given:
        matches = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
        if not matches:
            raise SystemExit(f"error: there is no {name}: give folders, files, or a pattern in quotes.")
        for match in matches:
            found.update(dict.fromkeys(pictures_under(match) if os.path.isdir(match) else [match]))
    if not found:
        raise SystemExit(f"error: no picture in {', '.join(given)}: looked for {', '.join(sorted(SUFFIXES))}.")
    return list(found)


def pictures_under(folder: str) -> list[str]:
    found = []
    for where, folders, names in os.walk(folder):
        folders.sort()
        found += [os.path.join(where, name) for name in sorted(names) if Path(name).suffix.lower() in SUFFIXES]
    return found


def claim(output: Path, settings: dict, overwrite: bool, columns: int) -> set[str]:
    """Make the output this run's, and say which pictures are in it already. One without a row is begun anew."""
    record = output.with_name(output.name + ".settings.json")
    if overwrite:
        output.unlink(missing_ok=True)
    if output.exists() and record.exists():
        before = json.loads(record.read_text(encoding="utf-8"))
        changed = [f"{name} was {before.get(name)!r}" for name in settings if before.get(name) != settings[name]]
        done = finished(output)
        if done and changed:
            raise SystemExit(f"error: {output} was begun otherwise ({', '.join(changed)}): use --overwrite.")
        if done:
            return done
    elif output.exists():
        raise SystemExit(f"error: {output} exists and is not of this program: choose another name, or --overwrite.")
    output.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    header = [name for rank in range(1, columns + 1) for name in (f"label_{rank}", f"score_{rank}")]
    output.write_text(",".join(["file", *header]) + "\n" if output.suffix == ".csv" else "", encoding="utf-8")
    return set()


def finished(output: Path) -> set[str]:
    """The pictures of the whole rows; half a row, left by a stop in the middle, is cut off."""
    with output.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
    with output.open(newline="", encoding="utf-8") as file:
        if output.suffix == ".csv":
            return {row["file"] for row in csv.DictReader(file)}
        return {json.loads(line)["file"] for line in file}


def row_of(file: str, classes: list[dict], suffix: str) -> str:
    scored = [{"label": entry["label"], "score": round(entry["score"], 6)} for entry in classes]
    if suffix == ".jsonl":
        return json.dumps({"file": file, "classes": scored}, ensure_ascii=False) + "\n"
    cells = [file, *(str(value) for entry in scored for value in entry.values())]
    return ",".join(quoted(cell) for cell in cells) + "\n"


def quoted(cell: str) -> str:
    needs_quotes = any(character in cell for character in ',"\r\n')
    return '"' + cell.replace('"', '""') + '"' if needs_quotes else cell


def why_unreadable(file: str) -> str:
    try:
        open_image(file)
    except ValueError as error:
        return str(error)
    return f"{file} could not be read before, and can be now."


if __name__ == "__main__":
    with errors_in_one_line(__file__):
        raise SystemExit(main(sys.argv[1:]))
