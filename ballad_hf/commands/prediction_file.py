"""The file that `ballad predict` writes: a row for each image, in the order of the images, resumable at any byte."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ..files import read_json, safe_cell, write_json


SUFFIXES = (".csv", ".jsonl")
_DIGITS = 6


class PredictionFile:
    """A CSV or JSON lines file of predictions, and beside it `NAME.settings.json` with what it was made with.

    Args:
        path: ends in `.csv` or `.jsonl`; its folder is made where it does not exist.
        settings: plain values that decide what is written; a file of other settings is not continued.
        ranks: classes per image, which decides the columns of a CSV file.
        overwrite: start again where the file exists.

    Attributes:
        done: how many rows the file has of each image, by the name that it shows.

    Raises:
        FileExistsError: the file was begun with other settings, or is not of this program.

    Example:

    >>> import tempfile
    >>> from ballad_hf.commands.prediction_file import PredictionFile
    >>> path = Path(tempfile.mkdtemp()) / "classes.csv"
    >>> with PredictionFile(path, {"top_k": 1}, ranks=1) as file:
    ...     file.write([("a.png", [{"label": "cat", "score": 0.75}])])
    >>> path.read_text()
    'file,label_1,score_1\\na.png,cat,0.75\\n'
    >>> PredictionFile(path, {"top_k": 1}, ranks=1).done
    Counter({'a.png': 1})
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], ranks: int, overwrite: bool = False):
        self.path = path
        self._is_csv = path.suffix == ".csv"
        record = path.with_name(f"{path.name}.settings.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.done = Counter[str]()
        if path.exists() and not overwrite:
            if not record.is_file():
                raise FileExistsError(
                    f"{path} exists and is not of this program: choose another --output, or replace it with "
                    "--overwrite."
                )
            self.done = _names_in(path)
            before = read_json(record)
            changed = [name for name, value in settings.items() if before.get(name) != value]
            if self.done and changed:
                said = ", ".join(_change(name, before.get(name)) for name in changed)
                raise FileExistsError(
                    f"{path} was begun with other settings ({said}): choose another --output, or start again with "
                    "--overwrite."
                )
        if not self.done:
            write_json(record, dict(settings))
            path.write_text(self._header(ranks), encoding="utf-8", newline="")

    def __enter__(self) -> PredictionFile:
        self._stream = self.path.open("a", newline="", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def write(self, rows: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]) -> None:
        """Append a row for each image: its file, and its classes as `{"label", "score"}`, best first."""
        self._stream.write("".join(self._row(file, classes) for file, classes in rows))
        self._stream.flush()

    def _header(self, ranks: int) -> str:
        columns = [name for rank in range(1, ranks + 1) for name in (f"label_{rank}", f"score_{rank}")]
        return _csv_line(["file", *columns]) if self._is_csv else ""

    def _row(self, file: str, classes: Sequence[Mapping[str, Any]]) -> str:
        scored = [{"label": shown(row["label"]), "score": round(row["score"], _DIGITS)} for row in classes]
        if self._is_csv:
            return _csv_line([shown(file), *(value for row in scored for value in row.values())])
        return json.dumps({"file": shown(file), "classes": scored}, ensure_ascii=False) + "\n"


def shown(text: str) -> str:
    """Text that UTF-8 can encode: bytes of a file name that are not UTF-8 become `\\udc` escapes.

    >>> import os
    >>> print(shown(os.fsdecode(b"caf\\xe9.png")))
    caf\\udce9.png
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def name_in_file(file: str, path: Path) -> str:
    """An image's name as the file at `path` shows it."""
    return str(safe_cell(shown(file))) if path.suffix == ".csv" else shown(file)


def _names_in(path: Path) -> Counter[str]:
    """The names of the whole rows. Half a row, which a run that was stopped left, is removed."""
    content = path.read_bytes()
    is_csv = path.suffix == ".csv"
    end = _end_of_rows(content, is_csv)
    if end < len(content):
        with path.open("rb+") as stream:
            stream.truncate(end)
    text = content[:end].decode("utf-8")
    try:
        if is_csv:
            return Counter(row["file"] for row in csv.DictReader(io.StringIO(text, newline="")))
        return Counter(json.loads(line)["file"] for line in text.split("\n")[:-1])
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(
            f"{path} is not as it was written ({error}): choose another --output, or start again with --overwrite."
        ) from error


def _end_of_rows(content: bytes, is_csv: bool) -> int:
    """Where the last whole row ends: after a line break that is not inside of a quoted cell."""
    end = content.rfind(b"\n") + 1
    while is_csv and content.count(b'"', 0, end) % 2:
        end = content.rfind(b"\n", 0, end - 1) + 1
    return end


def _csv_line(cells: Sequence[object]) -> str:
    line = io.StringIO(newline="")
    # It quotes cells that hold a character of the line terminator.
    csv.writer(line, lineterminator="\r\n").writerow([safe_cell(cell) for cell in cells])
    return line.getvalue().removesuffix("\r\n") + "\n"


def _change(name: str, before: Any) -> str:
    return "the model has changed" if name == "model_digest" else f"{name} was {before!r}"
