"""`ballad convert`: every kind of conversion from the command line."""

import json
import math

import pytest
import torch
from transformers import CLIPModel

from ballad_hf import BalladForImageClassification
from ballad_hf.commands.convert import KINDS, main, parser_of
from ballad_hf.hub.model_directory import save_model_directory

from .conftest import CLASS_NAMES
from .reference import TEXT_HEADS, assert_is_the_original, official_file, openai_file


def test_an_openai_checkpoint(tmp_path, capsys):
    options = ["--no-tokenizer", "--text-attention-heads", str(TEXT_HEADS)]
    main(["openai", str(openai_file("vit")), str(tmp_path / "clip"), *options])
    assert capsys.readouterr().out == f"{tmp_path / 'clip'}: 1.0 MB\n"
    assert_is_the_original(CLIPModel.from_pretrained(tmp_path / "clip"), "vit")


def test_an_official_checkpoint_is_converted_folded_and_loses_its_text_tower(tmp_path, capsys, tiny_clip, monkeypatch):
    tokenizer = tiny_clip.tokenizer
    content = torch.load(official_file("vit"), weights_only=True)
    text = content["state_dict_best"]["text_model"]
    text["module.token_embedding.weight"] = torch.randn(len(tokenizer), 64, generator=torch.Generator().manual_seed(0))
    torch.save(content, tmp_path / "official.pth")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "names.txt").write_text("\n".join(CLASS_NAMES) + "\n")
    monkeypatch.chdir(tmp_path)
    options = ["--class-names", "names.txt", "--templates", "a {}.", "the {}.", "--adapter-ratio", "0.3"]
    options += ["--tokenizer", "tokenizer", "--text-attention-heads", str(TEXT_HEADS), "--logit-scale", "80"]
    main(["official", "official.pth", "out", *options])
    model = BalladForImageClassification.from_pretrained("out")
    assert model.config.class_names == CLASS_NAMES
    assert list(model.config.templates) == ["a {}.", "the {}."]
    assert (model.config.adapter_ratio, model.config.logit_scale) == (0.3, 80)
    main(["fold", "out", "folded"])
    assert CLIPModel.from_pretrained("folded").logit_scale.item() == pytest.approx(math.log(80))
    main(["vision-only", "out", "small"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["out", "folded", "small"]
    assert "MB (from 1." in lines[2]


@pytest.mark.slow
def test_onnx(tiny_ballad, tiny_processor, tmp_path):
    pytest.importorskip("onnxscript")
    folder = save_model_directory(tiny_ballad, tmp_path / "model", tiny_processor)
    main(["onnx", str(folder), str(tmp_path / "onnx")])
    assert json.loads((tmp_path / "onnx" / "classes.json").read_text())["class_names"] == CLASS_NAMES
    assert (tmp_path / "onnx" / "image_classifier.onnx").is_file()


@pytest.mark.slow
def test_onnx_in_int8_is_calibrated_on_the_runs_dataset(tiny_ballad, tiny_processor, tmp_path):
    onnx = pytest.importorskip("onnx")
    folder = save_model_directory(tiny_ballad, tmp_path / "model", tiny_processor)
    with pytest.raises(ValueError, match=r"--quantize int8"):
        main(["onnx", str(folder), str(tmp_path / "onnx"), "--dataset", "digits"])
    with pytest.raises(ValueError, match=r"name a dataset with --dataset"):
        main(["onnx", str(folder), str(tmp_path / "onnx"), "--quantize", "int8"])
    assert not (tmp_path / "onnx").exists()
    (folder / "arguments.yaml").write_text("dataset: digits\nimbalance_factor: 20\nseed: 3\n")
    main(["onnx", str(folder), str(tmp_path / "onnx"), "--quantize", "int8", "--num-calibration-samples", "16"])
    graph = onnx.load(tmp_path / "onnx" / "image_classifier.onnx").graph
    assert "QuantizeLinear" in {node.op_type for node in graph.node}


def test_mistakes_leave_nothing_behind(tmp_path):
    (tmp_path / "notes.pt").write_text("these are no weights")
    with pytest.raises(ValueError, match=r"notes.pt is no checkpoint"):
        main(["openai", str(tmp_path / "notes.pt"), str(tmp_path / "out")])
    with pytest.raises(FileNotFoundError, match=r"nowhere.txt"):
        main(["official", str(official_file("vit")), str(tmp_path / "out"), "--class-names", "nowhere.txt"])
    assert [file.name for file in tmp_path.iterdir()] == ["notes.pt"]


@pytest.mark.parametrize(("kind", "message"), [("opena", "Did you mean 'openai'?"), ("x", "Choose one of openai, ")])
def test_an_unknown_kind_is_named(kind, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main([kind])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_help_names_every_kind(capsys):
    main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n  {kind} " in text for kind in KINDS)
    assert all(parser_of(kind).parse_args(["a", "b"]).output_dir == "b" for kind in KINDS)
