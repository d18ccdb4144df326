"""The package `models` travels: its files in a model directory serve where ballad_hf is not installed."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ballad_hf.models
from ballad_hf import BalladConfig, BalladForImageClassification
from ballad_hf.conversion.dual_encoders import clip_image_processor

from .conftest import CLASS_NAMES
from .test_join_towers import tiny_joined
from .test_modeling_clip_resnet import built, tiny_config, tiny_image


JOINED_CODE = {
    *("configuration_efficientnet_lite.py", "modeling_efficientnet_lite.py"),
    *("configuration_joined_towers.py", "modeling_joined_towers.py"),
}
FILES = sorted(Path(ballad_hf.models.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_imports_its_siblings_by_name_and_nothing_else_of_the_package(file):
    """Of relative imports the Hub's loader understands `from .sibling import name` alone."""
    siblings = {other.stem for other in FILES}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, f"line {node.lineno}"
            assert node.module in siblings, f"line {node.lineno}"
        elif isinstance(node, ast.ImportFrom):
            assert not (node.module or "").startswith("ballad_hf"), f"line {node.lineno}"
        elif isinstance(node, ast.Import):
            assert not any(name.name.startswith("ballad_hf") for name in node.names), f"line {node.lineno}"


_WITHOUT_BALLAD = """
import importlib.abc, json, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ballad_hf":
            raise ModuleNotFoundError(f"{name} is not installed here", name=name)

sys.meta_path.insert(0, Refuse())
from transformers import AutoModel, AutoModelForImageClassification, AutoProcessor, pipeline

image = sys.argv[1]
zero_shot = {"candidate_labels": ["cat", "dog", "owl"], "hypothesis_template": "a photo of a {}."}
task = "zero-shot-image-classification"
answers = {}

answers["vit"] = pipeline(task, model="folded-vit")(image, **zero_shot)  # a class of transformers needs no trust
answers["resnet"] = pipeline(task, model="folded-resnet", trust_remote_code=True)(image, **zero_shot)
answers["joined"] = pipeline(task, model="folded-joined", trust_remote_code=True)(image, **zero_shot)
answers["classes"] = [
    type(AutoModel.from_pretrained("folded-vit")).__name__,
    type(AutoModel.from_pretrained("folded-resnet", trust_remote_code=True)).__name__,
]

answers["ballad"] = pipeline("image-classification", model="ballad", trust_remote_code=True)(image)
answers["ballad-joined"] = pipeline("image-classification", model="ballad-joined", trust_remote_code=True)(image)
model = AutoModelForImageClassification.from_pretrained("ballad", trust_remote_code=True)
answers["classes"].append(type(model.fold_adapter()).__name__)
answers["classes"].append(type(AutoModel.from_pretrained("ballad", trust_remote_code=True)).__name__)
processor = AutoProcessor.from_pretrained("ballad", trust_remote_code=True)
answers["processor"] = [type(processor.image_processor).__name__, type(processor.tokenizer).__name__]
try:
    type(model).from_clip("folded-vit")
except ImportError as error:
    answers["from_clip"] = str(error)

assert not any(module.split(".")[0] == "ballad_hf" for module in sys.modules)
print(json.dumps(answers))
"""


def scores(rows: list[dict]) -> dict[str, float]:
    return {row["label"]: pytest.approx(row["score"], abs=1e-5) for row in rows}


@pytest.mark.slow
def test_folded_models_and_models_with_code_work_without_the_package(tiny_ballad, tiny_clip, tmp_path, monkeypatch):
    tokenizer, processor, image = tiny_clip.tokenizer, clip_image_processor(32), tiny_image()
    resnet = BalladForImageClassification.from_dual_encoder(built(tiny_config(tokenizer)), CLASS_NAMES, tokenizer)
    with torch.no_grad():
        resnet.adapter.linear.weight.copy_(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))
    resnet.config.auto_map = {"AutoModel": "modeling_ballad.BalladModel"}
    joined = BalladForImageClassification.from_dual_encoder(tiny_joined(tokenizer), CLASS_NAMES, tokenizer)
    folders = {
        "folded-vit": tiny_ballad.fold_adapter(),
        "folded-resnet": resnet.fold_adapter(),
        "folded-joined": joined.fold_adapter(),
        "ballad": resnet,
        "ballad-joined": joined,
    }
    # As `register_for_auto_class` does, for this test alone.
    monkeypatch.setattr(BalladConfig, "_auto_class", "AutoConfig")
    monkeypatch.setattr(BalladForImageClassification, "_auto_class", "AutoModelForImageClassification")
    for name, model in folders.items():
        for part in (model, processor, tokenizer):
            part.save_pretrained(tmp_path / name)
    code = {name: {file.name for file in (tmp_path / name).glob("*.py")} for name in folders}
    assert code["folded-vit"] == set()
    assert code["ballad"] == {file.name for file in FILES} - {"__init__.py"}
    assert code["folded-resnet"] == {"configuration_clip_resnet.py", "modeling_clip_resnet.py"}
    assert code["folded-joined"] == JOINED_CODE
    image.save(tmp_path / "image.png")
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_BALLAD, "image.png"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert answers["classes"] == ["CLIPModel", "CLIPResNetModel", "CLIPResNetModel", "BalladModel"]
    assert "pip install ballad_hf" in answers["from_clip"]
    labels = ["cat", "dog", "owl"]
    tokens = tokenizer([f"a photo of a {label}." for label in labels], padding=True, return_tensors="pt")
    pixel_values = processor(image, return_tensors="pt").pixel_values
    for kind, model in (("vit", tiny_ballad), ("resnet", resnet), ("joined", joined)):
        with torch.no_grad():
            probabilities = model(pixel_values, **tokens).logits_per_image[0].softmax(-1)
        assert dict(zip(labels, probabilities.tolist(), strict=True)) == scores(answers[kind])
    for kind, model in (("ballad", resnet), ("ballad-joined", joined)):
        with torch.no_grad():
            probabilities = model(pixel_values).logits[0].softmax(-1)
        assert dict(zip(CLASS_NAMES, probabilities.tolist(), strict=True)) == scores(answers[kind])
