"""The models room travels: its files in a model's folder serve where Ballad is not installed."""

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
from ballad_hf.models.dual_encoders import clip_image_processor

from .conftest import CLASS_NAMES
from .test_modeling_clip_resnet import built, tiny_config, tiny_picture


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
            raise ModuleNotFoundError(f"{name} is not installed here")

sys.meta_path.insert(0, Refuse())
from transformers import AutoModelForImageClassification, pipeline

folder, image, clip_file = sys.argv[1:]
rows = pipeline("image-classification", model=folder, trust_remote_code=True)(image)
model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
folded = type(model.fold_adapter()).__name__
other = type(model).from_clip(clip_file, text_attention_heads=2)
print(json.dumps([rows, folded, type(other.clip).__name__]))
"""


def test_a_ballad_over_a_resnet_serves_converts_and_folds_where_ballad_is_not_installed(
    tiny_clip, tmp_path, monkeypatch
):
    from .reference import openai_file

    # As `register_for_auto_class` does, for this test alone.
    monkeypatch.setattr(BalladConfig, "_auto_class", "AutoConfig")
    monkeypatch.setattr(BalladForImageClassification, "_auto_class", "AutoModelForImageClassification")
    clip = built(tiny_config(tiny_clip.tokenizer))
    model = BalladForImageClassification.from_dual_encoder(clip, CLASS_NAMES, tiny_clip.tokenizer)
    folder, processor = tmp_path / "ballad", clip_image_processor(32)
    for part in (model, processor):
        part.save_pretrained(folder)
    tiny_picture().save(tmp_path / "picture.png")
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_BALLAD, str(folder), str(tmp_path / "picture.png"), str(openai_file("vit"))],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    rows, folded, other = json.loads(done.stdout)
    assert (folded, other) == ("CLIPResNetModel", "CLIPModel")
    with torch.no_grad():
        expected = model(processor(tiny_picture(), return_tensors="pt").pixel_values).logits[0].softmax(-1)
    assert {row["label"]: row["score"] for row in rows} == pytest.approx(
        dict(zip(CLASS_NAMES, expected.tolist(), strict=True)), abs=1e-5
    )
