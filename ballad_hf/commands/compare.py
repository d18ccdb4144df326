"""`ballad compare`: a table and a plot of several runs, and whether their differences are more than noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..files import explain_full_disk, write_json
from .options import OptionParser, add_dataclass, build, option


@dataclass
class ComparisonArguments:
    """What to compare, and where the comparison goes."""

    runs: list[str]
    output_dir: str = option("folder of the plot and the metrics", "outputs/comparison")
    overwrite_output_dir: bool = option("replace the comparison in that folder", False)
    seed: int = option("seed of the resampling behind intervals and p-values", 0)


def main(options: Sequence[str]) -> None:
    parser = OptionParser("compare", "Compare runs: a table, a plot, and whether the differences are significant.")
    help = "output folder of a run, or FOLDER:STAGE; of a single folder all stages are compared"
    parser.add_argument("runs", nargs="+", metavar="RUN", help=help)
    add_dataclass(parser, ComparisonArguments, "Comparison")
    parsed = vars(parser.parse_args(options))
    run(build(ComparisonArguments, parsed, runs=parsed["runs"]))


def run(options: ComparisonArguments) -> None:
    """Compare every run with the first, print the differences and save the plot."""
    from ..evaluation.compare import COMPARISON_FILE, compare, comparison_text, plot_comparison, read_runs
    from ..evaluation.plots import save_figure

    folder = Path(options.output_dir)
    if (folder / COMPARISON_FILE).exists() and not options.overwrite_output_dir:
        raise FileExistsError(
            f"{folder} already holds a comparison: choose another --output_dir, or allow overwriting with "
            "--overwrite_output_dir."
        )
    runs = read_runs(options.runs)
    differences = compare(runs, options.seed)
    folder.mkdir(parents=True, exist_ok=True)
    with explain_full_disk(folder):
        files = save_figure(plot_comparison(runs), folder / "comparison")
    content = {
        "runs": {name: result.metrics.to_dict() for name, result in runs.items()},
        "differences": {
            name: {metric: asdict(gain) for metric, gain in gains.items()} for name, gains in differences.items()
        },
    }
    write_json(folder / COMPARISON_FILE, content)
    print(comparison_text(runs, differences))
    print(f"\nSaved the plot in {files[0]}")
