"""The model card states what was measured, in the form that the Hub and its client read."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image

from ballad_hf import LongTailMetrics
from ballad_hf.commands.train import parse_arguments
from ballad_hf.data.image_dataset import ImageDataset
from ballad_hf.evaluation.predictions import Predictions
from ballad_hf.hub import model_card
from ballad_hf.hub.model_card import evaluation_result_file, project_url, render_model_card

from .conftest import load_splits


COUNTS = [500, 120, 50, 19, 3]
ARGUMENTS = {
    "model": "openai/clip-vit-base-patch16",
    "dataset": "someone/pets-lt",
    "output_dir": "/home/me/secret/pets",
    "phase_a_epochs": 50,
    "templates": ["a photo of a {}."],
    "seed": 3,
}


def _metrics(correct, names=None, counts=COUNTS, images=10, split="test"):
    """`correct[c]` of the images of class c are classified correctly, the others as the next class."""
    labels = np.repeat(np.arange(5), images)
    predicted = np.where(np.tile(np.arange(images), 5) < np.repeat(correct, images), labels, (labels + 1) % 5)
    predictions = Predictions.from_logits(20 * np.eye(5)[predicted], labels).of_split("pets", split)
    return LongTailMetrics.from_predictions(predictions, counts, names)


@pytest.fixture
def results(tiny_ballad):
    names = tiny_ballad.config.class_names
    return {"before training": _metrics([5, 5, 5, 5, 2], names), "phase B": _metrics([4, 9, 8, 7, 0], names)}


def _card(model, results, **options):
    options = {"dataset_name": "Pets", "arguments": ARGUMENTS, "seeds": 3} | options
    return render_model_card(model, results, **options)


def test_metadata_claims_the_last_stage_and_nothing_else(tiny_ballad, results, tmp_path):
    card = _card(tiny_ballad, results, base_license="mit", examples={"A cat": "cat.jpg"})
    card.save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.license, data.base_model, data.datasets) == ("mit", ARGUMENTS["model"], [
        "someone/pets-lt"
    ])  # fmt: skip
    assert (data.library_name, data.pipeline_tag, data.model_name) == ("transformers", "image-classification", "pets")
    assert data.widget == [{"src": "cat.jpg", "example_title": "A cat"}]
    claimed = {result.metric_name: result.metric_value for result in data.eval_results}
    # Class accuracies 0.4, 0.9, 0.8, 0.7, 0: many are the first two, medium the third, few the rest.
    assert claimed == {
        "Overall accuracy": 0.56,
        "Mean-class accuracy": 0.56,
        "Many-shot accuracy": 0.65,
        "Medium-shot accuracy": 0.8,
        "Few-shot accuracy": 0.35,
        "Worst-class accuracy": 0.0,
        "Macro F1": round(results["phase B"].macro_f1, 4),
    }
    assert {result.dataset_type for result in data.eval_results} == {"someone/pets-lt"}
    assert {result.dataset_split for result in data.eval_results} == {"test"}


def test_every_stage_and_its_uncertainty_can_be_read(tiny_ballad, results):
    text = str(_card(tiny_ballad, results))
    assert "| before training | 44.0 | 44.0 | 50.0 | 50.0 | 35.0 | 20.0 |" in text
    assert "| **phase B** | **56.0** | **56.0** | **65.0** | **80.0** | **35.0** | **0.0** |" in text
    # Wilson's interval of 28 right among 50, by hand: centre 0.5557, half-width 0.1325.
    assert "| Overall accuracy | 56.0 | 42.3 to 68.8 |" in text
    assert "| zebra | 3 | 10 | 0.0 |" in text
    assert "Seeds: 3." in text


def test_limits_follow_from_the_metrics(tiny_ballad, results):
    text = str(_card(tiny_ballad, {"phase A": _metrics([9, 9, 9, 9, 5]), "phase B": _metrics([4, 9, 9, 9, 0])}))
    assert "On many-shot classes it is worse than phase A: 65.0% against 90.0%." in text
    assert "On few-shot classes it is worse than phase A: 45.0% against 70.0%." in text
    assert "On medium-shot classes" not in text
    assert "1 of 5 classes were never recognised" in text
    assert "points on average" in text  # confidence of 1 at 62 % accuracy
    better = str(_card(tiny_ballad, {"before": _metrics([5] * 5), "after": _metrics([10] * 5)}, seeds=[0, 1, 2]))
    assert "it is worse" not in better
    assert "never recognised" not in better
    assert "one training run" not in better
    assert "Seeds: 0, 1, 2." in better


def test_results_on_validation_images_are_called_that(tiny_ballad):
    uneven = {"phase B": _metrics([4, 9, 9, 9, 0], images=9, split="validation")}
    card = _card(tiny_ballad, uneven)
    text = str(card)
    assert "on 45 validation images" in text
    assert "so the results are optimistic" in text
    assert "never recognised in the validation images" in text
    assert "Classes with fewer than 10 of the validation images, whose accuracy is uncertain: 5." in text
    assert "test images" not in text
    assert {result.dataset_split for result in card.data.eval_results} == {"validation"}
    assert "optimistic" not in str(_card(tiny_ballad, {"phase B": _metrics([4, 9, 9, 9, 0])}))


def test_a_result_below_zero_shot_or_at_chance_is_reported(tiny_ballad, results):
    worse = str(_card(tiny_ballad, {"zero-shot": _metrics([9] * 5), "phase B": _metrics([5] * 5)}))
    assert "- Below zero-shot: phase B has a mean-class accuracy of 50.0% on the test images" in worse
    assert "- Not above chance: phase B" in str(_card(tiny_ballad, {"phase B": _metrics([10, 0, 0, 0, 0])}))
    assert "Not above chance" not in str(_card(tiny_ballad, results))


@pytest.mark.parametrize(
    "name",
    [
        "`code` *bold* [x](http:x) <img src=x>",
        "a|b",
        "x\n```\n# heading",
        "a & b",
        "```",
        "x" * 100 + " ``` " + "y" * 90,
    ],
)
def test_the_name_of_the_data_can_not_break_the_page(tiny_ballad, results, name):
    arguments = ARGUMENTS | {"dataset": f"/home/me/{name}", "templates": [f"{name} {{}}"], "output_dir": f"out/{name}"}
    tiny_ballad.config.templates = [f"{name} {{}}"]
    text = str(_card(tiny_ballad, results, dataset_name=name, arguments=arguments))
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(text.split("---\n", 2)[2])
    inline = [child for token in tokens for child in token.children or []]
    assert not [child for child in inline if child.type == "html_inline"]
    assert "http:x" not in [child.attrGet("href") for child in inline if child.type == "link_open"]
    plain = " ".join(name.split())
    assert any(plain in "".join(child.content for child in token.children or []) for token in tokens)
    recipe = next(token.content for token in tokens if token.type == "fence" and token.info == "yaml")
    assert yaml.safe_load(recipe)["dataset"] == name
    headings = [tokens[place + 1].content for place, token in enumerate(tokens) if token.type == "heading_open"]
    assert headings[1:] == ["Use", "Results", "Intended use", "Limits", "Training", "License", "Citation"]
    for token in tokens:
        if token.type == "fence" and token.info == "python":
            compile(token.content, "snippet", "exec")


def test_relative_paths_stay_private(tiny_ballad, results):
    arguments = ARGUMENTS | {"dataset": "../home_of_alice/birds", "model": "../home_of_alice/clip"}
    card = _card(tiny_ballad, results, arguments=arguments)
    assert "alice" not in str(card)
    assert "dataset: birds" in str(card)
    assert (card.data.datasets, card.data.base_model) == (None, None)


def test_the_card_links_the_project_of_the_metadata_and_no_package_index(tiny_ballad, results, tmp_path, monkeypatch):
    found = tmp_path / "named-1.0.dist-info"
    found.mkdir()
    (found / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: named\nVersion: 1.0\n"
        "Project-URL: Documentation, https://example.org/docs\nProject-URL: Source, https://example.org/named\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert project_url("named") == "https://example.org/named"
    assert project_url("no-such-package") is None
    monkeypatch.setattr(model_card, "project_url", lambda: None)
    without = str(_card(tiny_ballad, results))
    assert "pip install ballad_hf\n" in without
    assert "pypi" not in without
    monkeypatch.setattr(model_card, "project_url", lambda: "https://example.org/ballad")
    text = str(_card(tiny_ballad, results))
    assert "[ballad_hf](https://example.org/ballad)" in text
    assert "pip install git+https://example.org/ballad\n" in text


def test_a_run_without_validation_says_so(tiny_ballad, results):
    data = dict(load_splits("digits").dataset)
    note = "no validation split: each phase kept the weights of its last epoch"
    assert note not in str(_card(tiny_ballad, results, datasets=data))
    del data["validation"]
    assert note in str(_card(tiny_ballad, results, datasets=data))


def test_private_paths_stay_private(tiny_ballad, results, tmp_path):
    folder = tmp_path / "private-name" / "birds"
    folder.mkdir(parents=True)
    arguments = ARGUMENTS | {"dataset": str(folder), "image_root": str(folder), "feature_cache_dir": str(folder)}
    card = _card(tiny_ballad, results, arguments=arguments, dataset_name="Birds")
    assert "private-name" not in str(card)
    assert "secret" not in str(card)
    assert "dataset: birds" in str(card)
    assert card.data.datasets is None
    assert card.data.eval_results[0].dataset_type == "birds"


def test_the_recipe_on_the_card_trains_again(tiny_ballad, results, tmp_path):
    arguments = parse_arguments(
        ["--dataset", "digits", "--seed", "7", "--phase_a_loss", "class_prompt", "--templates", "a {}.", "one {}."]
    )
    text = str(_card(tiny_ballad, results, arguments=arguments.to_dict()))
    recipe = text.split("```yaml\n")[1].split("```")[0]
    (tmp_path / "recipe.yaml").write_text(recipe)
    again = parse_arguments(["--config", str(tmp_path / "recipe.yaml")])
    assert again.training.phase_a == arguments.training.phase_a
    assert again.training.phase_b == arguments.training.phase_b
    assert again.model == arguments.model
    assert again.training.seed == 7


def test_class_names_cannot_break_the_page(tiny_ballad):
    names = ["a|b", "<script>alert(1)</script>", "c\nd", "*e*", "`f`"]
    text = str(_card(tiny_ballad, {"phase B": _metrics([1, 2, 3, 4, 5], names)}))
    row = next(line for line in text.splitlines() if line.startswith("| a"))
    assert row == r"| a\|b | 500 | 10 | 10.0 |"
    assert "<script>" not in text
    assert "| c d | 50 | 10 | 30.0 |" in text


def test_thresholds_splits_and_plots_are_those_of_the_run(tiny_ballad):
    data = ImageDataset([Image.new("L", (2, 2))] * 7, [0] * 7, ["cat"])
    base = _metrics([1, 2, 3, 4, 5])
    metrics = LongTailMetrics.from_dict(base.to_dict() | {"many_above": 200, "few_below": 5})
    plots = ["out/accuracy_by_frequency.png", "out/accuracy_by_frequency.svg", "out/reliability.png"]
    text = str(_card(tiny_ballad, {"phase B": metrics}, datasets={"train": data, "validation": data}, plots=plots))
    assert "more than 200, 5 to 200, and fewer than 5 training images" in text
    assert f"| validation | 7 | `{data.fingerprint()}` |" in text
    assert "| test |" not in text
    assert "](plots/accuracy_by_frequency.png)" in text
    assert ".svg" not in text
    assert "reliability" not in text


def test_from_random_weights_there_is_no_other_license(tiny_ballad, results):
    text = str(_card(tiny_ballad, results, arguments={"model": "tiny"}))
    assert "no other model's license applies" in text
    assert "from the web" not in text
    assert "whose license applies to them too" in str(_card(tiny_ballad, results))


def test_license_of_a_local_base_model_is_read_from_its_card(tiny_ballad, results, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# base\n")
    card = _card(tiny_ballad, results, arguments={"model": str(tmp_path)})
    assert card.data.license == "apache-2.0"
    assert "keep its license, `apache-2.0`" in str(card)


def test_a_vision_only_model_offers_no_zero_shot(tiny_ballad, results):
    assert "zero-shot-image-classification" in str(_card(tiny_ballad, results))
    tiny_ballad.remove_text_tower()
    assert "zero-shot-image-classification" not in str(_card(tiny_ballad, results))


def test_the_usage_snippet_is_python(tiny_ballad, results):
    tiny_ballad.config.templates = ['a "nice" photo of a {}.']
    for block in str(_card(tiny_ballad, results)).split("```python\n")[1:]:
        compile(block.split("```")[0], "snippet", "exec")


def test_nothing_measured_nothing_claimed(tiny_ballad):
    with pytest.raises(ValueError, match="no results for the model card"):
        _card(tiny_ballad, {})
    metrics = _metrics([1, 2, 3, 4, 5], counts=None)
    text = str(_card(tiny_ballad, {"phase B": metrics}))
    assert "Few-shot accuracy" not in text
    assert "no metrics by shot group" in text


def test_newer_result_file():
    metrics = _metrics([4, 9, 8, 7, 0])
    (entry,) = yaml.safe_load(
        evaluation_result_file(metrics, dataset_id="owner/bench", task_id="few", metric="few", notes="5 crops")
    )
    assert entry["dataset"] == {"id": "owner/bench", "task_id": "few"}
    assert entry["value"] == 35.0
    assert entry["notes"] == "5 crops"
    with pytest.raises(ValueError, match="dataset on the Hub"):
        evaluation_result_file(metrics, dataset_id="bench", task_id="few")
    with pytest.raises(ValueError, match="no 'top_5'"):
        evaluation_result_file(metrics, dataset_id="owner/bench", task_id="few", metric="top_5")


class _Validator(BaseHTTPRequestHandler):
    """Stands in for the Hub's `/api/validate-yaml`: the rules of its documentation for model cards."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        errors = self.errors(yaml.safe_load(body["content"].split("---\n")[1]), body["repoType"])
        self.send_response(400 if errors else 200)
        self.end_headers()
        self.wfile.write(json.dumps({"errors": errors, "warnings": []}).encode())

    @staticmethod
    def errors(data, repo_type):
        found = [] if repo_type == "model" else ["not a model"]
        for name in ("tags", "datasets", "metrics"):
            if not all(isinstance(entry, str) for entry in data.get(name, [])):
                found.append(f"{name} must be a list of strings")
        for model in data.get("model-index", []):
            found += [] if model.get("name") else ["model-index without a name"]
            for result in model["results"]:
                found += [f"no {key}" for key in ("task", "dataset", "metrics") if not result.get(key)]
                found += [] if result["task"].get("type") else ["no task type"]
                found += [f"no dataset {key}" for key in ("type", "name") if not result["dataset"].get(key)]
                found += ["metric"] * sum({"type", "value"} - set(metric) != set() for metric in result["metrics"])
        return found

    def log_message(self, *arguments):
        pass


def test_the_hubs_client_validates_the_card(tiny_ballad, results, tmp_path):
    good = tmp_path / "good.md"
    _card(tiny_ballad, results).save(good)
    (tmp_path / "bad.md").write_text("---\ntags: [1]\n---\n# x\n")
    server = HTTPServer(("127.0.0.1", 0), _Validator)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = (
        "import sys; from huggingface_hub import ModelCard; ModelCard.load(sys.argv[1]).validate(); print('valid')\n"
        "try: ModelCard.load(sys.argv[2]).validate()\n"
        "except ValueError: print('refused')"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, str(good), str(tmp_path / "bad.md")],
            capture_output=True, text=True, env=environment,
        )  # fmt: skip
    finally:
        server.shutdown()
        server.server_close()
    assert done.stdout.split() == ["valid", "refused"], done.stderr


def test_the_license_of_lite_is_that_of_its_towers(tiny_ballad, results):
    card = _card(tiny_ballad, results, arguments={"model": "lite"})
    assert (card.data.license, card.data.base_model) == ("apache-2.0", None)
