"""The recipes: the value of every option, and that their data and settings run."""

from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import CLIPProcessor

from ballad_hf import BalladForImageClassification, extract_features, train_phase_a, train_phase_b
from ballad_hf.commands.train import parse_arguments
from ballad_hf.conversion.tiny_clip import build_tiny_clip
from ballad_hf.data.long_tail import long_tailed_counts
from ballad_hf.data.transforms import train_transform
from ballad_hf.training.phase_b import views_per_image

from .conftest import load_splits


RECIPES = files("ballad_hf") / "recipes"

TOWERS = {
    "rn50": "timm/resnet50_clip.openai",
    "rn101": "timm/resnet101_clip.openai",
    "rn50x16": "timm/resnet50x16_clip.openai",
    "vit_b16": "openai/clip-vit-base-patch16",
}
LISTS = {"imagenet_lt": ("ImageNet_LT", "ImageNet"), "places_lt": ("Places_LT", "Places")}
# The paper's hyper-parameters, and what it leaves open: the identity start, the cosine in every step.
PAPER = {
    "templates": ["a photo of a {}."],
    "adapter_ratio": 0.2,
    "adapter_init": "identity",
    "logit_scale": None,
    "phase_a_epochs": 50,
    "phase_a_batch_size": 512,
    "phase_a_loss": "contrastive",
    "phase_a_sampler": "instance",
    "phase_a_train": "both",
    "phase_a_optimizer": "sgd",
    "phase_a_learning_rate": 1e-5,
    "phase_a_momentum": 0.9,
    "phase_a_weight_decay": 5e-4,
    "phase_a_schedule": "cosine",
    "phase_a_crop_scale": 0.5,
    "phase_a_horizontal_flip": 0.5,
    "phase_a_color_jitter": 0.4,
    "phase_a_batch_norm": "frozen",
    "phase_b_epochs": 10,
    "phase_b_batch_size": 512,
    "phase_b_learning_rate": 0.2,
    "phase_b_momentum": 0.9,
    "phase_b_weight_decay": 5e-4,
    "phase_b_loss": "cross_entropy",
    "phase_b_sampler": "class_aware",
    "phase_b_samples_per_class": 4,
    "phase_b_adapter_start": "model",
    "phase_b_schedule": "cosine",
    "phase_b_views": 10,
}
OFFICIAL = {
    **PAPER,
    "adapter_init": "random",
    "logit_scale": 100.0,
    "phase_a_loss": "class_prompt",
    "phase_a_schedule": "official",
    "phase_a_decay_all": True,
    "phase_a_metric_for_best": "overall",
    "phase_a_tail_guard": "off",
    "phase_b_views": "balanced",
}


def listed(data: str, tower: str) -> dict:
    lists, pictures = LISTS[data]
    return {
        "dataset": f"data/{lists}/{lists}_train.txt",
        "image_root": f"data/{pictures}",
        # The folders of Places-LT's lists are the names of its classes.
        "class_names": f"data/{lists}/class_names.txt" if data == "imagenet_lt" else None,
        "model": TOWERS[tower],
    }


def expected_values() -> dict[str, dict]:
    """Recipe -> every value that is not the default of an option."""
    recipes = {}
    for data in LISTS:
        for tower in TOWERS:
            recipes[f"{data}_{tower}"] = {
                **PAPER,
                **listed(data, tower),
                "num_workers": 8,
                "phase_a_micro_batch_size": 32 if tower == "rn50x16" else 128,
            }
    for imbalance in (10, 50, 100):
        recipes[f"cifar100_lt_{imbalance}_vit_b16"] = {
            **PAPER,
            "dataset": "uoft-cs/cifar100",
            "image_column": "img",
            "label_column": "fine_label",
            "train_split": "train",
            "test_split": "test",
            "imbalance_factor": float(imbalance),
            "profile": "exponential",
            "validation_fraction": 0.0,
            "model": TOWERS["vit_b16"],
            "num_workers": 4,
            "phase_a_micro_batch_size": 128,
        }
    recipes["official"] = {**OFFICIAL, **listed("imagenet_lt", "rn50"), "num_workers": 12}
    return recipes


EXPECTED = expected_values()


def read(recipe: str, *more: str):
    return parse_arguments(["--config", recipe, *more])


def test_there_is_a_recipe_for_every_row():
    assert {file.name for file in RECIPES.iterdir()} == {f"{name}.yaml" for name in (*EXPECTED, "digits")}


@pytest.mark.parametrize("recipe", EXPECTED)
def test_a_recipe_says_what_its_row_needs_and_nothing_else(recipe):
    arguments = read(recipe)
    wanted = parse_arguments([]).to_dict() | EXPECTED[recipe] | {"output_dir": f"outputs/{recipe}"}
    assert arguments.to_dict() == wanted


@pytest.mark.parametrize("recipe", EXPECTED)
def test_text_is_text_and_no_line_is_long(recipe):
    text = (RECIPES / f"{recipe}.yaml").read_text()
    assert max(map(len, text.splitlines())) <= 119
    # Unquoted, YAML reads `off` as false.
    assert not any(isinstance(value, bool) for name, value in yaml.safe_load(text).items() if name.endswith("guard"))


def test_the_command_line_goes_over_a_recipe():
    arguments = read("official", "--phase_a_micro_batch_size", "64", "--image_root", "/pictures")
    assert (arguments.training.phase_a.micro_batch_size, arguments.data.image_root) == (64, "/pictures")
    assert arguments.training.phase_a.loss == "class_prompt"


@pytest.mark.parametrize(("imbalance", "images", "smallest"), [(10, 19_573, 50), (50, 12_608, 10), (100, 10_847, 5)])
def test_the_tail_of_cifar(imbalance, images, smallest):
    """The counts of the paper's protocol, with nothing held out."""
    data = read(f"cifar100_lt_{imbalance}_vit_b16").data
    largest = 500 - round(500 * data.validation_fraction)
    counts = long_tailed_counts(largest, 100, data.imbalance_factor, data.profile)
    assert (sum(counts), counts[0], counts[-1]) == (images, 500, smallest)


@pytest.mark.parametrize("imbalance", [10, 50, 100])
def test_the_columns_of_cifar_are_read(tmp_path, imbalance):
    """A data set with CIFAR-100's columns: three classes of 110 images, all of them trained on."""
    from datasets import ClassLabel, Dataset, DatasetDict, Features
    from datasets import Image as ImageFeature

    names = ["apple", "aquarium_fish", "baby"]
    features = Features(
        {"img": ImageFeature(), "fine_label": ClassLabel(names=names), "coarse_label": ClassLabel(names=["x", "y"])}
    )

    def part(pictures: int) -> Dataset:
        picture = Image.new("RGB", (8, 8))
        columns = {
            "img": [picture] * 3 * pictures,
            "fine_label": [0, 1, 2] * pictures,
            "coarse_label": [0, 1, 0] * pictures,
        }
        return Dataset.from_dict(columns, features=features)

    DatasetDict({"train": part(110), "test": part(5)}).save_to_disk(tmp_path / "cifar")
    data = replace(read(f"cifar100_lt_{imbalance}_vit_b16").data, dataset=str(tmp_path / "cifar"))
    splits = load_splits(**vars(data), seed=0)
    assert splits.class_names == ["apple", "aquarium fish", "baby"]
    middle = {10: 34, 50: 15, 100: 11}  # 110 / sqrt(imbalance), rounded down
    assert splits.class_counts.tolist() == [110, middle[imbalance], 110 // imbalance]
    assert splits.validation is None
    assert len(splits.test) == 15


@pytest.mark.parametrize("data", ["imagenet_lt", "places_lt"])
def test_the_lists_pictures_and_names_lie_where_the_recipe_looks(tmp_path, monkeypatch, data):
    """Folders as the lists have them: WordNet ids, and names of places."""
    lists, pictures = LISTS[data]
    folders = {
        "imagenet_lt": ["train/n01440764", "train/n01443537"],
        "places_lt": ["train/desert_road", "train/desert-sand"],
    }[data]
    (tmp_path / "data" / lists).mkdir(parents=True)
    for part, count in (("train", 3), ("val", 2), ("test", 1)):
        lines = []
        for label, folder in enumerate(folders):
            (tmp_path / "data" / pictures / folder).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                path = f"{folder}/{part}{number}.jpg"
                Image.new("RGB", (8, 8)).save(tmp_path / "data" / pictures / path)
                lines.append(f"{path} {label}\n")
        (tmp_path / "data" / lists / f"{lists}_{part}.txt").write_text("".join(lines))
    if data == "imagenet_lt":
        (tmp_path / "data" / lists / "class_names.txt").write_text("tench\ngoldfish\n")
    monkeypatch.chdir(tmp_path)
    splits = load_splits(**vars(read(f"{data}_rn50").data), seed=0)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [6, 4, 2]
    assert (
        splits.class_names
        == {
            "imagenet_lt": ["tench", "goldfish"],
            "places_lt": ["desert road", "desert-sand"],
        }[data]
    )


def test_the_official_settings_on_the_digits():
    """Three short epochs of phase A and two of phase B with everything that is official about them."""
    arguments = read("official", "--phase_a_epochs", "3", "--phase_a_batch_size", "64", "--phase_b_epochs", "2")
    training = arguments.training
    splits = load_splits("digits")
    clip, tokenizer, image_processor = build_tiny_clip(width=32, layers=1, patch_size=16, words=["photo"])
    processor = CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer)
    start = {name: value.clone() for name, value in clip.state_dict().items()}
    options = {name: getattr(arguments.model, name) for name in ("adapter_ratio", "adapter_init", "logit_scale")}
    model = BalladForImageClassification.from_dual_encoder(
        clip, splits.class_names, tokenizer, templates=arguments.model.templates, **options
    )
    adapter = model.adapter.linear.weight.detach().clone()
    phase_a = train_phase_a(model, splits.train, processor, training.phase_a, progress=False)

    rates = [entry["learning_rate"] for entry in phase_a.history[1:]]
    assert rates == pytest.approx([0.75e-5, 0.25e-5, 0.0])  # the peak is missed, the last epoch is lost
    assert phase_a.best_epoch == 3
    assert model.logit_scale.item() == 100
    trained = model.clip.state_dict()
    assert torch.equal(trained["logit_scale"], start["logit_scale"])
    for name in ("visual_projection.weight", "text_projection.weight", "text_model.final_layer_norm.weight"):
        assert not torch.equal(trained[name], start[name])

    augmentation = train_transform(image_processor, (training.phase_a.crop_scale, 1.0))
    phase_b_arguments = replace(training.phase_b, batch_size=64)
    views = views_per_image(splits.train.labels, phase_b_arguments)
    table = extract_features(model, splits.train, views=views, transform=augmentation)
    assert table.vectors == 2 * (sum(splits.class_counts) // 64) * 64  # one view a draw
    assert table.views_per_row[torch.from_numpy(splits.train.labels == 9)].min() > 2 * 2  # two images in this class
    result = train_phase_b(model, table, phase_b_arguments, progress=False)
    assert result.steps == 2 * (sum(splits.class_counts) // 64)
    assert result.history[1]["learning_rate"] == pytest.approx(0.2)
    assert not np.allclose(adapter, np.eye(len(adapter)), atol=0.1)  # the random start
    assert not torch.equal(model.adapter.linear.weight, adapter)
