"""The model card, rendered from measured results: nothing on it is typed by hand."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml

from ..data.image_dataset import as_image_dataset
from ..evaluation.intervals import confidence_intervals
from ..evaluation.metrics import GROUPS, LongTailMetrics
from ..evaluation.table import ABSENT, COLUMNS, FURTHER, percent
from ..models.modeling_ballad import BalladForImageClassification
from ..training.run_folder import installed_versions
from .layout import LAYOUT


if TYPE_CHECKING:
    from datasets import DatasetDict

TEMPLATE = Path(__file__).parent / "model_card_template.md"
HEADLINES = {
    "overall": "Overall accuracy",
    "mean_class": "Mean-class accuracy",
    "many": "Many-shot accuracy",
    "medium": "Medium-shot accuracy",
    "few": "Few-shot accuracy",
    "worst_class": "Worst-class accuracy",
}
# Where a run lives and how it talks says nothing about the weights, and may say too much about its owner.
_PRIVATE = re.compile(r"output_dir|resume|cache_dir|image_root|num_workers|report_to|push_to_hub|^hub_|class_names$")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Names for `model_name_or_path` that build a model from random weights instead of loading one.
BUILT_IN_MODELS = ("tiny",)
_PLOTS_SHOWN = {
    "accuracy_by_frequency": "Accuracy of each class over its number of training pictures",
    "gain_by_class": "What training changed for each class, sorted by its number of training pictures",
}
_MOST_CLASSES_LISTED = 10
_FEW_TEST_PICTURES = 10


def render_model_card(
    model: BalladForImageClassification,
    results: Mapping[str, LongTailMetrics],
    *,
    dataset_name: str,
    arguments: Mapping[str, Any],
    dataset: DatasetDict | None = None,
    seeds: int | Sequence[int],
    model_id: str | None = None,
    base_model: str | None = None,
    base_license: str | None = None,
    dataset_id: str | None = None,
    examples: Mapping[str, str] | None = None,
    plots: Iterable[str | Path] = (),
) -> ModelCard:
    """Render the card of a trained model.

    Args:
        model: the model; its classes, ratio, templates and training counts go on the card.
        results: the metrics of every stage on the same pictures, from the baseline before training to the model that
            is shared. The last is what the card's metadata claims.
        dataset_name: as people call the data.
        arguments: flat names and values of the run; paths and the like are left out of the card.
        dataset: the splits, for their sizes and fingerprints.
        seeds: of the runs behind the figures.
        model_id: repository the card is for, such as `owner/name`; default: `hub_model_id`, else the name of
            `output_dir`.
        base_model: Hub name of the dual encoder; default: `model_name_or_path` where that is a Hub name.
        base_license: identifier of the base model's licence, which then holds for this model; default: what the card
            in the base model's local folder says, else the card points to the base model.
        dataset_id: Hub name of the data set; default: `dataset` where that is a Hub name.
        examples: title of a picture -> its address or its path in the repository, for the widget.
        plots: files that `save_plots` wrote and the bundle keeps in `plots/`; the PNG pictures of class frequency and
            of what training gained are shown on the card.

    Returns:
        A card whose metadata carries `model-index`; `str(card)` is the README.

    Raises:
        ValueError: no result.

    Example:

    >>> from ballad_hf import BalladForImageClassification, LongTailMetrics
    >>> from ballad_hf.hub.model_card import render_model_card
    >>> from ballad_hf.models.tiny_clip import build_tiny_clip
    >>> clip, tokenizer, _ = build_tiny_clip(layers=1)
    >>> model = BalladForImageClassification.from_dual_encoder(clip, ["cat", "dog"], tokenizer)
    >>> metrics = LongTailMetrics.from_logits([[1.0, 0.0], [0.0, 1.0]], [0, 1], train_counts=[500, 7])
    >>> arguments = {"model_name_or_path": "openai/clip-vit-base-patch16", "output_dir": "outputs/pets"}
    >>> card = render_model_card(model, {"phase B": metrics}, dataset_name="Pets", arguments=arguments, seeds=0)
    >>> card.data.base_model, [result.metric_name for result in card.data.eval_results][:2]
    ('openai/clip-vit-base-patch16', ['Overall accuracy', 'Mean-class accuracy'])
    """
    if not results:
        raise ValueError("There is no result to put on the card: give the metrics of at least one stage.")
    final = list(results.values())[-1]
    base = arguments.get("model_name_or_path")
    base_model = base_model or _hub_id(base)
    base_license = base_license or _local_license(base)
    dataset_id = dataset_id or _hub_id(arguments.get("dataset"), needs_owner=True)
    model_id = model_id or arguments.get("hub_model_id") or Path(str(arguments.get("output_dir", "ballad"))).name
    part = "validation" if dataset is not None and "test" not in dataset else "test"
    data = ModelCardData(
        model_name=model_id.split("/")[-1],
        library_name="transformers",
        pipeline_tag="image-classification",
        license=base_license,
        base_model=base_model,
        datasets=[dataset_id] if dataset_id else None,
        metrics=["accuracy", "f1"],
        tags=_tags(model),
        widget=[{"src": source, "example_title": title} for title, source in (examples or {}).items()] or None,
        eval_results=_eval_results(final, dataset_name, dataset_id, part),
    )
    seeds = [seeds] if isinstance(seeds, int) else list(seeds)
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        model_id=model_id,
        loadable_id=model_id if "/" in model_id else f"your-name/{model_id}",
        dataset_name=dataset_name,
        dataset_id=dataset_id,
        base_model=base_model,
        base_license=base_license,
        from_scratch=base in BUILT_IN_MODELS,
        config=model.config,
        part=part,
        metrics=final,
        stages=len(results),
        pictures=_shown_plots(plots),
        results_table=_results_table(results),
        intervals_table=_intervals_table(final),
        further_table=_markdown_table(["figure", "value"], _further_rows(final)),
        classes_table=_classes_table(final, part),
        class_line=_class_line(model),
        parts_table=_parts_table(dataset),
        seeds=", ".join(map(str, seeds)),
        limits=_limits(results, seeds, part),
        recipe=yaml.safe_dump(_public(arguments), sort_keys=False, allow_unicode=True).strip(),
        versions=", ".join(f"{name} {version}" for name, version in installed_versions().items()),
    )


def evaluation_result_file(
    metrics: LongTailMetrics,
    *,
    dataset_id: str,
    task_id: str,
    metric: str = "overall",
    dataset_revision: str | None = None,
    date: str | None = None,
    notes: str | None = None,
) -> str:
    """The Hub's newer form of a result, for `.eval_results/<name>.yaml` beside the card.

    It fits only where the data set is registered on the Hub as a benchmark with tasks; any other result belongs in the
    card's `model-index`, which `render_model_card` writes.

    Args:
        metrics: of the shared model on the benchmark's test part.
        dataset_id: the benchmark's Hub name, `owner/name`.
        task_id: the task within the benchmark.
        metric: the figure that the benchmark ranks, a field of the metrics; written in percent.
        dataset_revision: commit of the data set.
        date: ISO 8601 date of the evaluation; default: that of the commit.
        notes: about the set-up.

    Raises:
        ValueError: a name that is no Hub id, a figure that does not exist.

    Example:

    >>> from ballad_hf import LongTailMetrics
    >>> metrics = LongTailMetrics.from_logits([[1.0, 0.0], [1.0, 0.0]], [0, 1], train_counts=[500, 7])
    >>> print(evaluation_result_file(metrics, dataset_id="someone/pets-lt", task_id="default"), end="")
    - dataset:
        id: someone/pets-lt
        task_id: default
      value: 50.0
    """
    if _hub_id(dataset_id, needs_owner=True) is None:
        raise ValueError(f"dataset_id is {dataset_id!r}: give a data set's name on the Hub, such as owner/name.")
    value = getattr(metrics, metric, None)
    if not isinstance(value, float):
        raise ValueError(f"There is no figure {metric!r} in these metrics: choose one such as 'overall' or 'few'.")
    entry = EvalResultEntry(
        dataset_id=dataset_id,
        task_id=task_id,
        value=round(100 * value, 2),
        dataset_revision=dataset_revision,
        date=date,
        notes=notes,
    )
    return yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)


def _eval_results(metrics: LongTailMetrics, name: str, dataset_id: str | None, part: str) -> list[EvalResult]:
    slug = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-") or "data"
    described: dict[str, Any] = {
        "task_type": "image-classification",
        "task_name": "Image classification",
        "dataset_type": dataset_id or slug,
        "dataset_name": name,
        "dataset_split": part,
    }
    figures = [
        EvalResult(**described, metric_type="accuracy", metric_name=title, metric_value=round(value, 4))
        for field, title in HEADLINES.items()
        if (value := getattr(metrics, field)) is not None
    ]
    f1 = EvalResult(**described, metric_type="f1", metric_name="Macro F1", metric_value=round(metrics.macro_f1, 4))
    return [*figures, f1]


def _tags(model: BalladForImageClassification) -> list[str]:
    tags = ["ballad", "long-tailed-recognition", "clip", "image-classification"]
    return [*tags, "zero-shot-image-classification"] if model.config.has_text_tower else tags


def _results_table(results: Mapping[str, LongTailMetrics]) -> str:
    rows = [
        [_cell(name), *(percent(getattr(metrics, field)) for field in COLUMNS)] for name, metrics in results.items()
    ]
    rows[-1] = [f"**{cell}**" for cell in rows[-1]]
    return _markdown_table(["", *COLUMNS.values()], rows)


def _intervals_table(metrics: LongTailMetrics) -> str:
    intervals = confidence_intervals(metrics)
    rows = [
        [
            title,
            percent(getattr(metrics, field)),
            f"{percent(intervals[field].low)} to {percent(intervals[field].high)}",
        ]
        for field, title in HEADLINES.items()
        if field in intervals
    ]
    return _markdown_table(["figure", "value", "95 % interval"], rows)


def _further_rows(metrics: LongTailMetrics) -> list[list[str]]:
    rows = [[title, percent(getattr(metrics, field))] for field, title in FURTHER.items()]
    shown = [row for row in rows if row[1] != ABSENT]
    return [*shown, ["Negative log-likelihood (nats)", f"{metrics.negative_log_likelihood:.3f}"]]


def _classes_table(metrics: LongTailMetrics, part: str) -> str:
    """The classes that do worst, so that nobody has to look for them."""
    names = metrics.class_names or tuple(map(str, range(len(metrics.class_accuracy))))
    counts = metrics.train_counts or (None,) * len(names)
    seen = [
        (accuracy, counts[index], names[index], metrics.class_support[index])
        for index, accuracy in enumerate(metrics.class_accuracy)
        if accuracy is not None
    ]
    seen.sort(key=lambda row: (row[0], row[1] or 0))
    rows = [
        [_cell(name), ABSENT if count is None else str(count), str(support), percent(accuracy)]
        for accuracy, count, name, support in seen[:_MOST_CLASSES_LISTED]
    ]
    return _markdown_table(["class", "training pictures", f"{part} pictures", "accuracy"], rows)


def _class_line(model: BalladForImageClassification) -> str:
    names = model.config.class_names
    shown = ", ".join(_cell(name) for name in names[:_MOST_CLASSES_LISTED])
    return shown if len(names) <= _MOST_CLASSES_LISTED else f"{shown}, … ({len(names)} in all, in `config.json`)"


def _shown_plots(plots: Iterable[str | Path]) -> list[str]:
    """Pictures for the card, as Markdown; addressed inside the bundle."""
    names = {Path(plot).name for plot in plots}
    return [
        f"![{description}]({LAYOUT.plots}/{stem}.png)"
        for stem, description in _PLOTS_SHOWN.items()
        if f"{stem}.png" in names
    ]


def _parts_table(dataset: DatasetDict | None) -> str | None:
    if dataset is None:
        return None
    splits = {name: as_image_dataset(images) for name, images in dataset.items()}
    rows = [[name, str(len(images)), f"`{images.fingerprint()}`"] for name, images in splits.items()]
    table = _markdown_table(["split", "images", "fingerprint"], rows)
    if "validation" in splits:
        return table
    return f"{table}\n\nThere was no validation split: each phase kept the weights of its last epoch."


def _limits(results: Mapping[str, LongTailMetrics], seeds: Sequence[int], part: str) -> list[str]:
    """What the figures themselves say against the model, in words."""
    (first_name, first), (_, final) = list(results.items())[0], list(results.items())[-1]
    found = []
    if part == "validation":
        found.append(
            "There was no test part: the figures are of the pictures that also chose which weights are kept, so they "
            "flatter the model."
        )
    for group in GROUPS:
        before, after = getattr(first, group), getattr(final, group)
        if before is not None and after is not None and after < before:
            found.append(
                f"On {group}-shot classes it does worse than the stage “{first_name}”: "
                f"{percent(after)} % against {percent(before)} %."
            )
    never = sum(accuracy == 0 for accuracy in final.class_accuracy)
    if never:
        found.append(f"{never} of {len(final.class_accuracy)} classes were never recognised in the {part} pictures.")
    untested = sum(support == 0 for support in final.class_support)
    if untested:
        found.append(f"Classes without a {part} picture, of which nothing is known: {untested}.")
    scarce = sum(0 < support < _FEW_TEST_PICTURES for support in final.class_support)
    if scarce:
        found.append(
            f"Classes with fewer than {_FEW_TEST_PICTURES} {part} pictures, whose own figures are uncertain: {scarce}."
        )
    if final.train_counts is None:
        found.append("The training counts were not recorded, so there are no figures for head and tail.")
    if final.expected_calibration_error > 0.1:
        found.append(
            f"Its confidence is off by {percent(final.expected_calibration_error)} points on average: "
            "do not read its scores as probabilities without calibrating them."
        )
    if len(seeds) == 1:
        found.append("The figures are of one training run; another seed gives somewhat different ones.")
    return found


def _public(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that belong to the recipe, with local paths cut to their last part."""
    kept = {name: value for name, value in arguments.items() if not _PRIVATE.search(name) and value is not None}
    for name in ("dataset", "model_name_or_path"):
        value = kept.get(name)
        if isinstance(value, str) and (Path(value).is_absolute() or Path(value).exists()):
            kept[name] = Path(value).name
    return yaml.safe_load(yaml.safe_dump({name: _plain(value) for name, value in kept.items()}))


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value if isinstance(value, bool | int | float | str) else str(value)


def _hub_id(name: Any, needs_owner: bool = False) -> str | None:
    """The name where it can be a Hub id, and is no file or folder here."""
    if not isinstance(name, str) or not _HUB_ID.fullmatch(name) or Path(name).exists():
        return None
    return name if "/" in name else None


def _local_license(base: Any) -> str | None:
    card = Path(str(base)) / "README.md"
    return ModelCard.load(card).data.license if card.is_file() else None


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    """Text that cannot break out of a table's cell or be taken for mark-up."""
    flat = " ".join(str(text).split())
    return re.sub(r"([\\|*_`<>\[\]])", r"\\\1", flat)
