"""`ballad audit`: imbalance, duplicates, leaks, unreadable images and doubtful class names of a dataset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import write_json, write_text
from ..training.arguments import DataArguments
from .options import OptionParser, add_dataclass, build, option


if TYPE_CHECKING:
    from ..data.audit import DataAudit


@dataclass
class AuditArguments:
    """Where the audit goes."""

    output_dir: str = option("folder of audit.txt, audit.json and class_distribution.png", "outputs/audit")
    overwrite_output_dir: bool = option("replace the audit in that folder", False)
    num_threads: int | None = option("threads that read images; default: one per processor")
    seed: int = option("random seed; that of training splits alike", 0)

    def __post_init__(self) -> None:
        if self.num_threads is not None and self.num_threads < 1:
            raise ValueError(f"num_threads is {self.num_threads}: give 1 or more, or leave it out.")


def main(options: Sequence[str]) -> None:
    parser = OptionParser("audit", "Audit a dataset before training on it.")
    parser.add_argument("data", nargs="?", default=None, metavar="DATASET", help="the same as --dataset")
    add_dataclass(parser, AuditArguments, "Audit")
    add_dataclass(parser, DataArguments, "Data")
    parsed = vars(parser.parse_args(options))
    if parsed["data"] is not None:
        parsed["dataset"] = parsed["data"]
    run(build(DataArguments, parsed), build(AuditArguments, parsed))


def run(data: DataArguments, options: AuditArguments) -> None:
    """Audit, print the report and write it beside a plot of the class distribution."""
    from ..data.audit import save_class_distribution

    folder = Path(options.output_dir)
    if (folder / "audit.json").exists() and not options.overwrite_output_dir:
        raise FileExistsError(
            f"{folder} already holds an audit: choose another --output_dir, or allow overwriting with "
            "--overwrite_output_dir."
        )
    audit = _audit(data, options)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "audit.txt", audit.to_text() + "\n")
    write_json(folder / "audit.json", audit.to_dict())
    save_class_distribution(audit, folder / "class_distribution.png")
    print(f"{audit.to_text()}\n\nSaved in {folder}")


def _audit(data: DataArguments, options: AuditArguments) -> DataAudit:
    from ..data.audit import audit_dataset
    from ..data.class_names import UnusableNamesError
    from ..data.sources import load_image_dataset

    left_out: list[str] = []
    collisions: dict[str, list[int]] = {}
    given = {**vars(data), "seed": options.seed}
    try:
        dataset = load_image_dataset(**given, unreadable=left_out)
    except UnusableNamesError as error:
        # Training would stop here; an audit goes on, with names that differ, to find the rest too.
        collisions = error.clashes
        numbered = [f"{name} ({label})" for label, name in enumerate(error.names)]
        left_out.clear()
        dataset = load_image_dataset(**{**given, "class_names": numbered}, unreadable=left_out)
    audit = audit_dataset(dataset, num_threads=options.num_threads, left_out=left_out)
    return replace(audit, colliding_names=collisions)
