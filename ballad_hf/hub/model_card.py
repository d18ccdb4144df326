"""The model card, rendered from measured results; and what of a run's arguments may be published."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml

from ..data.image_dataset import as_image_dataset
from ..evaluation.metrics import GROUPS, LongTailMetrics, confidence_intervals
from ..evaluation.summary import ABSENT, COLUMNS, FURTHER, images_of, names_of, percent, verdict
from ..models.modeling_ballad import BalladForImageClassification
from .model_directory import LAYOUT, installed_versions


TEMPLATE = Path(__file__).parent / "model_card_template.md"
HEADLINES = {
    "overall": "Overall accuracy",
    "mean_class": "Mean-class accuracy",
    "many": "Many-shot accuracy",
    "medium": "Medium-shot accuracy",
    "few": "Few-shot accuracy",
    "worst_class": "Worst-class accuracy",
}
# Arguments about the machine and the account of a run say nothing about the weights.
_PRIVATE = re.compile(r"output_dir|resume|cache_dir|image_root|num_workers|report_to|push_to_hub|^hub_|class_names$")
# Arguments whose value is a path or a Hub name.
_PATH_ARGUMENT = re.compile(r"(^|_)(dataset|dir|root|file|path|folder|class_names)$")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Names for `model` that build a model from random weights instead of loading one.
BUILT_IN_MODELS = ("tiny",)
# Licenses of models that come without a card.
_KNOWN_LICENSES = {"lite": "apache-2.0"}
_PLOTS_SHOWN = {
    "accuracy_by_frequency": "Accuracy of each class over its number of training images",
    "gain_by_class": "Change in accuracy of each class, sorted by its number of training images",
}
_MOST_CLASSES_LISTED = 10
_FEW_IMAGES = 10


def render_model_card(
    model: BalladForImageClassification,
    results: Mapping[str, LongTailMetrics],
    *,
    dataset_name: str,
    arguments: Mapping[str, Any],
    datasets: Mapping[str, Any] | None = None,
    seeds: int | Sequence[int],
    model_id: str | None = None,
    base_model: str | None = None,
    base_license: str | None = None,
    dataset_id: str | None = None,
    examples: Mapping[str, str] | None = None,
    plots: Iterable[str | Path] = (),
) -> ModelCard:
    """Render the model card of a trained model.

    Args:
        model: the model; its classes, adapter ratio, templates and training counts go on the card.
        results: metrics by stage on the same images, from the baseline before training to the model that is shared.
            The last is what the card's metadata reports.
        dataset_name: the dataset as people call it.
        arguments: flat names and values of the run; local paths and the like are left out.
        datasets: the data by split (`train`, `validation`, `test`), for sizes and fingerprints.
        seeds: of the runs behind the results.
        model_id: repository that the card is for, such as `owner/name`; default: `hub_model_id`, else the name of
            `output_dir`.
        base_model: Hub name of the dual encoder; default: `model` if that is a Hub name.
        base_license: license identifier of the base model, which then applies to this model; default: that of the
            model card in the base model's local folder, else the card refers to the base model.
        dataset_id: Hub name of the dataset; default: `dataset` if that is a Hub name.
        examples: image URLs, or paths in the repository, by title, for the widget.
        plots: files written by `save_plots` and kept in `plots/`; the PNG files of accuracy by frequency and of the
            gain by class are shown on the card.

    Returns:
        A card whose metadata has a `model-index`; `str(card)` is the README.

    Raises:
        ValueError: no results.

    Example:

    >>> from ballad_hf import BalladForImageClassification, LongTailMetrics
    >>> from ballad_hf.hub.model_card import render_model_card
    >>> from ballad_hf.conversion.tiny_clip import build_tiny_clip
    >>> clip, tokenizer, _ = build_tiny_clip(layers=1)
    >>> model = BalladForImageClassification.from_dual_encoder(clip, ["cat", "dog"], tokenizer)
    >>> metrics = LongTailMetrics.from_logits([[1.0, 0.0], [0.0, 1.0]], [0, 1], train_counts=[500, 7])
    >>> arguments = {"model": "openai/clip-vit-base-patch16", "output_dir": "outputs/pets"}
    >>> card = render_model_card(model, {"phase B": metrics}, dataset_name="Pets", arguments=arguments, seeds=0)
    >>> card.data.base_model, [result.metric_name for result in card.data.eval_results][:2]
    ('openai/clip-vit-base-patch16', ['Overall accuracy', 'Mean-class accuracy'])
    """
    if not results:
        raise ValueError("There are no results for the model card: pass the metrics of at least one stage.")
    final = list(results.values())[-1]
    base = arguments.get("model")
    base_model = base_model or _hub_id(base)
    base_license = base_license or _KNOWN_LICENSES.get(str(base)) or _local_license(base)
    dataset_id = dataset_id or _hub_id(arguments.get("dataset"))
    model_id = _repo_name(model_id or arguments.get("hub_model_id") or Path(str(arguments.get("output_dir", ""))).name)
    split = final.split or "evaluation"
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
        eval_results=_eval_results(final, dataset_name, dataset_id, split),
    )
    seeds = [seeds] if isinstance(seeds, int) else list(seeds)
    recipe = yaml.safe_dump(_public(arguments), sort_keys=False, allow_unicode=True, width=10_000).strip()
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        model_id=model_id,
        loadable_id=model_id if "/" in model_id else f"your-name/{model_id}",
        dataset_name=_escaped(dataset_name),
        base_model=base_model,
        base_license=base_license,
        from_scratch=base in BUILT_IN_MODELS,
        config=model.config,
        is_cosine_head=arguments.get("head") == "auto" and model.config.adapter_ratio == 0,
        images=_escaped(images_of(final)),
        metrics=final,
        stages=len(results),
        plots=_shown_plots(plots),
        results_table=_results_table(results),
        intervals_table=_intervals_table(final),
        further_table=_markdown_table(["metric", "value"], _further_rows(final)),
        classes_table=_classes_table(final),
        class_line=_class_line(model),
        datasets_table=_datasets_table(datasets),
        seeds=", ".join(map(str, seeds)),
        prompts=_prompts(model.config.templates),
        limits=_limits(results, seeds),
        recipe=_fenced(recipe, "yaml"),
        project_url=project_url(),
        versions=", ".join(f"{name} {version}" for name, version in installed_versions().items()),
    )


def project_url(package: str = "ballad_hf") -> str | None:
    """URL of an installed package's source code, by its own metadata, or `None` if that names none.

    Args:
        package: its name.
    """
    try:
        entries = metadata(package).get_all("Project-URL") or []
    except PackageNotFoundError:
        return None
    urls = {label.strip().lower(): url.strip() for label, _, url in (entry.partition(",") for entry in entries)}
    chosen = next((urls[label] for label in ("source", "repository", "homepage") if label in urls), None)
    return chosen or next(iter(urls.values()), None)


def is_local_path(value: str, argument: str = "") -> bool:
    """Whether a text is a path on somebody's disk rather than a Hub name or other text.

    Args:
        value: the text.
        argument: name of the argument that it belongs to; paths may be relative, such as `photos/alice/birds`.

    >>> is_local_path("../home_of_alice/birds"), is_local_path("openai/clip-vit-base-patch16")
    (True, False)
    """
    if value.startswith(("/", "~", "./", ".\\", "\\\\", "file:")) or re.match(r"[A-Za-z]:[\\/]", value):
        return True
    components = re.split(r"[\\/]", value)
    if ".." in components:
        return True
    is_path = bool(_PATH_ARGUMENT.search(argument)) and len(components) > 1 and "://" not in value
    # A Hub name has a single slash.
    return is_path and (len(components) > 2 or os.path.exists(value))


def strip_local_paths(value: Any, found: dict[str, str], argument: str = "") -> Any:
    """Cut the local paths in a value to their last component.

    Args:
        value: text, or a list or dict of such values; anything else is returned as it is.
        found: receives what was cut, path -> last component.
        argument: name of the argument that the value belongs to.
    """
    if isinstance(value, dict):
        return {name: strip_local_paths(entry, found, str(name)) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [strip_local_paths(entry, found, argument) for entry in value]
    if isinstance(value, str) and is_local_path(value, argument):
        found[value] = re.split(r"[\\/]", value.rstrip("\\/"))[-1]
        return found[value]
    return value


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
    """Content of `.eval_results/<name>.yaml`, the Hub's newer form of a result.

    It applies only to datasets registered on the Hub as a benchmark with tasks; any other result belongs in the card's
    `model-index`, which `render_model_card` writes.

    Args:
        metrics: of the shared model on the test split of the benchmark.
        dataset_id: Hub name of the benchmark, `owner/name`.
        task_id: the task within the benchmark.
        metric: the metric that the benchmark ranks, a field of the metrics; written in percent.
        dataset_revision: commit of the dataset.
        date: ISO 8601 date of the evaluation; default: that of the commit.
        notes: about the set-up.

    Raises:
        ValueError: not a Hub name, or a metric that does not exist.

    Example:

    >>> from ballad_hf import LongTailMetrics
    >>> metrics = LongTailMetrics.from_logits([[1.0, 0.0], [1.0, 0.0]], [0, 1], train_counts=[500, 7])
    >>> print(evaluation_result_file(metrics, dataset_id="someone/pets-lt", task_id="default"), end="")
    - dataset:
        id: someone/pets-lt
        task_id: default
      value: 50.0
    """
    if _hub_id(dataset_id) is None:
        raise ValueError(f"dataset_id is {dataset_id!r}: pass the name of a dataset on the Hub, such as owner/name.")
    value = getattr(metrics, metric, None)
    if not isinstance(value, float):
        raise ValueError(f"The metrics have no {metric!r}: choose one that exists, such as 'overall' or 'few'.")
    entry = EvalResultEntry(
        dataset_id=dataset_id,
        task_id=task_id,
        value=round(100 * value, 2),
        dataset_revision=dataset_revision,
        date=date,
        notes=notes,
    )
    return yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)


def _eval_results(metrics: LongTailMetrics, name: str, dataset_id: str | None, split: str) -> list[EvalResult]:
    slug = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-") or "data"
    described: dict[str, Any] = {
        "task_type": "image-classification",
        "task_name": "Image classification",
        "dataset_type": dataset_id or slug,
        "dataset_name": name,
        "dataset_split": split,
    }
    accuracies = [
        EvalResult(**described, metric_type="accuracy", metric_name=title, metric_value=round(value, 4))
        for field, title in HEADLINES.items()
        if (value := getattr(metrics, field)) is not None
    ]
    f1 = EvalResult(**described, metric_type="f1", metric_name="Macro F1", metric_value=round(metrics.macro_f1, 4))
    return [*accuracies, f1]


def _tags(model: BalladForImageClassification) -> list[str]:
    tags = ["ballad", "long-tailed-recognition", "clip", "image-classification"]
    return [*tags, "zero-shot-image-classification"] if model.config.has_text_tower else tags


def _results_table(results: Mapping[str, LongTailMetrics]) -> str:
    rows = [
        [_escaped(name), *(percent(getattr(metrics, field)) for field in COLUMNS)] for name, metrics in results.items()
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
    return _markdown_table(["metric", "value", "95% CI"], rows)


def _further_rows(metrics: LongTailMetrics) -> list[list[str]]:
    rows = [[title, percent(getattr(metrics, field))] for field, title in FURTHER.items()]
    shown = [row for row in rows if row[1] != ABSENT]
    return [*shown, ["Negative log-likelihood (nats)", f"{metrics.negative_log_likelihood:.3f}"]]


def _classes_table(metrics: LongTailMetrics) -> str:
    """The classes with the lowest accuracy."""
    names = names_of(metrics.class_names, len(metrics.class_accuracy))
    counts = metrics.train_counts or (None,) * len(names)
    evaluated = [
        (accuracy, counts[index], names[index], metrics.class_support[index])
        for index, accuracy in enumerate(metrics.class_accuracy)
        if accuracy is not None
    ]
    evaluated.sort(key=lambda row: (row[0], row[1] or 0))
    rows = [
        [_escaped(name), ABSENT if count is None else str(count), str(support), percent(accuracy)]
        for accuracy, count, name, support in evaluated[:_MOST_CLASSES_LISTED]
    ]
    return _markdown_table(["class", "training images", _escaped(images_of(metrics)), "accuracy"], rows)


def _class_line(model: BalladForImageClassification) -> str:
    names = model.config.class_names
    shown = ", ".join(_escaped(name) for name in names[:_MOST_CLASSES_LISTED])
    return (
        shown if len(names) <= _MOST_CLASSES_LISTED else f"{shown}, … ({len(names)} in total, listed in `config.json`)"
    )


def _shown_plots(plots: Iterable[str | Path]) -> list[str]:
    """The plots of the card as Markdown, by their path in the repository."""
    names = {Path(plot).name for plot in plots}
    return [
        f"![{description}]({LAYOUT.plots}/{stem}.png)"
        for stem, description in _PLOTS_SHOWN.items()
        if f"{stem}.png" in names
    ]


def _datasets_table(datasets: Mapping[str, Any] | None) -> str | None:
    if not datasets:
        return None
    images = {split: as_image_dataset(data) for split, data in datasets.items()}
    rows = [[_escaped(split), str(len(data)), f"`{data.fingerprint()}`"] for split, data in images.items()]
    table = _markdown_table(["split", "images", "fingerprint"], rows)
    if "validation" in datasets:
        return table
    return f"{table}\n\nThere was no validation split: each phase kept the weights of its last epoch."


def _prompts(templates: Sequence[str]) -> str:
    shown = ", ".join(_code(template) for template in templates[:5])
    return shown if len(templates) <= 5 else f"{shown} and {len(templates) - 5} more"


def _limits(results: Mapping[str, LongTailMetrics], seeds: Sequence[int]) -> list[str]:
    """What the metrics say against the model, in words."""
    (first_name, first), (_, final) = list(results.items())[0], list(results.items())[-1]
    images = _escaped(images_of(final))
    found = [_escaped(sentence) for sentence in verdict(results)]
    if final.split == "validation":
        found.append(
            "There was no test split: the validation images also selected the weights, so the results are optimistic."
        )
    for group in GROUPS:
        before, after = getattr(first, group), getattr(final, group)
        if before is not None and after is not None and after < before:
            found.append(
                f"On {group}-shot classes it is worse than {_escaped(first_name)}: "
                f"{percent(after)}% against {percent(before)}%."
            )
    never = sum(accuracy == 0 for accuracy in final.class_accuracy)
    if never:
        found.append(f"{never} of {len(final.class_accuracy)} classes were never recognised in the {images}.")
    untested = sum(support == 0 for support in final.class_support)
    if untested:
        found.append(f"Classes without any of the {images}, whose accuracy is unknown: {untested}.")
    scarce = sum(0 < support < _FEW_IMAGES for support in final.class_support)
    if scarce:
        found.append(f"Classes with fewer than {_FEW_IMAGES} of the {images}, whose accuracy is uncertain: {scarce}.")
    if final.train_counts is None:
        found.append("The training counts were not recorded, so there are no metrics by shot group.")
    if final.expected_calibration_error > 0.1:
        found.append(
            f"Its confidence is off by {percent(final.expected_calibration_error)} points on average: calibrate its "
            "scores before using them as probabilities."
        )
    if len(seeds) == 1:
        found.append("The results are of one training run; another seed gives somewhat different ones.")
    return found


def _public(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that belong to the recipe, with local paths cut to their last component."""
    kept = {name: value for name, value in arguments.items() if not _PRIVATE.search(name) and value is not None}
    kept = strip_local_paths({name: _plain(value) for name, value in kept.items()}, {})
    return yaml.safe_load(yaml.safe_dump(kept))


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value if isinstance(value, bool | int | float | str) else str(value)


def _hub_id(name: Any) -> str | None:
    """The name if it can be a Hub name with its owner, and is no file or folder here."""
    if not isinstance(name, str) or not _HUB_ID.fullmatch(name) or is_local_path(name) or Path(name).exists():
        return None
    return name


def _repo_name(name: str) -> str:
    """A name that can stand in Markdown and in Python, such as `owner/name`."""
    return re.sub(r"[^\w./-]+", "-", name, flags=re.ASCII).strip("-./") or "ballad"


def _local_license(base: Any) -> str | None:
    card = Path(str(base)) / "README.md"
    return ModelCard.load(card).data.license if card.is_file() else None


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, on one line and inside a table cell."""
    return re.sub(r"([\\|*_`<>\[\]&~])", r"\\\1", " ".join(str(text).split()))


def _code(text: str) -> str:
    """Inline code that no backticks in the text can end."""
    text = " ".join(text.split())
    fence = "`" * (_longest_run(text) + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"


def _fenced(text: str, language: str) -> str:
    """A code block that no backticks in the text can end."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
