"""What is damaged, what reads it, and what a right result is.

An area makes its sound files once. A case copies them, damages the copy by its own seed and calls the readers. A
reader returns only with a right result, about which its assertions are, or raises an error that a user can understand.
"""

import io
import json
import random
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPProcessor

from ballad_hf import BalladForImageClassification, as_image_dataset, load_image_dataset
from ballad_hf.commands.options import load_model
from ballad_hf.commands.predict import PredictionFile
from ballad_hf.conversion.checkpoint_files import read_checkpoint
from ballad_hf.conversion.convert import convert_official_ballad, convert_openai_clip
from ballad_hf.conversion.dual_encoders import load_dual_encoder, load_image_processor, load_tokenizer
from ballad_hf.conversion.tiny_clip import build_tiny_clip
from ballad_hf.data.class_names import shown_class_names
from ballad_hf.data.images import check_image, open_image
from ballad_hf.evaluation.frontier import Frontier, FrontierPoint
from ballad_hf.evaluation.predictions import Predictions
from ballad_hf.features.cache import FeatureCache, ShardPlan
from ballad_hf.features.table import FeatureTable
from ballad_hf.hub.model_directory import check_model_directory, save_model_directory
from ballad_hf.hub.push import without_local_paths
from ballad_hf.training.checkpoints import Checkpoint, CheckpointStore
from ballad_hf.training.run_directory import claim_run_directory

from ..reference import official_file, openai_file
from ..test_layouts import write_open_clip_folder
from .mutations import mutate_bytes, mutate_file, mutate_folder


NAMES = ["cat", "dog", "owl"]


class Area(ABC):
    """One kind of files."""

    cost = 1  # in units of a case; a dear area gets fewer cases

    def __init__(self, folder: Path):
        self.sound = folder / "sound"
        self.sound.mkdir(parents=True)
        self.make(self.sound)

    @abstractmethod
    def make(self, folder: Path) -> None:
        """Write the sound files."""

    @abstractmethod
    def readers(self, folder: Path, rng: random.Random) -> list[Callable[[], object]]:
        """What reads the damaged files; each is called, whatever became of the others."""

    def damage(self, folder: Path, rng: random.Random) -> None:
        """Damage a copy of the sound files."""
        mutate_folder(folder, rng)


class ModelDirectories(Area):
    """Every file of a model directory; a model that loads must give finite logits for its classes."""

    cost = 4

    def make(self, folder: Path) -> None:
        clip, tokenizer, image_processor = build_tiny_clip(width=32, layers=1, projection_dim=16, patch_size=16)
        model = BalladForImageClassification.from_dual_encoder(clip, NAMES, tokenizer)
        save_model_directory(model, folder / "model", CLIPProcessor(image_processor, tokenizer))

    def damage(self, folder: Path, rng: random.Random) -> None:
        mutate_folder(folder / "model", rng)

    def readers(self, folder: Path, rng: random.Random) -> list[Callable[[], object]]:
        return [partial(check_model_directory, folder / "model"), partial(self.read, folder / "model")]

    def read(self, folder: Path) -> None:
        model, processor = load_model(str(folder))
        with torch.no_grad():
            logits = model(pixel_values=torch.zeros(1, 3, 32, 32)).logits
        assert logits.shape == (1, len(model.config.class_names))
        assert torch.isfinite(logits).all()
        assert processor.image_processor is not None


class Checkpoints(Area):
    """Checkpoints of phase A; what loads must be bit for bit one that was saved."""

    def make(self, folder: Path) -> None:
        store = CheckpointStore(folder / "phase_a", keep=3)
        for step in (1, 2, 30):
            store.save(step, self.tensors(step), self.state(step))

    def tensors(self, step: int) -> dict[str, torch.Tensor]:
        return {"weights/a": torch.full((4, 3), float(step)), "random/cpu": torch.arange(step, dtype=torch.uint8)}

    def state(self, step: int) -> dict:
        return {"best": 0.5 / step, "history": [{"epoch": step, "loss": 1.25}], "identity": {"seed": 3, "name": "a"}}

    def readers(self, folder: Path, rng: random.Random) -> list[Callable[[], object]]:
        store = CheckpointStore(folder / "phase_a", keep=3)
        loaders = [store.load_latest, *(partial(store.load, path) for path in store.paths())]
        return [partial(self.read, loader) for loader in loaders]

    def read(self, load: Callable[[], Checkpoint | None]) -> None:
        checkpoint = load()
        if checkpoint is None:
            return
        assert checkpoint.step in (1, 2, 30)
        assert checkpoint.state == self.state(checkpoint.step)
        expected = self.tensors(checkpoint.step)
        assert checkpoint.tensors.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in checkpoint.tensors.items())


class FeatureCaches(Area):
    """Saved feature tables and cache entries; what is served must be what was saved."""

    plan = ShardPlan.of(6, 4, torch.float32, vectors_per_shard=2)
    provenance = {"encoder": "a", "data": "b"}

    def make(self, folder: Path) -> None:
        self.table().save(folder / "table", vectors_per_shard=4)
        cache = FeatureCache(folder / "cache")
        for encoder in ("a", "other"):
            entry = cache.entry(self.plan, {**self.provenance, "encoder": encoder})
            with cache.build(entry) as partial:
                for shard in range(self.plan.shards):
                    partial.write_shard(shard, torch.full((2, 4), shard + (encoder == "other") / 2))
                partial.write_head({"offsets": torch.arange(7)})
                partial.finish()

    def table(self) -> FeatureTable:
        features = torch.arange(40.0).reshape(10, 4) / 40
        return FeatureTable(
            features, [0, 1, 2, 0, 1, 2, 0, 1, 2, 0], torch.eye(3, 4), logit_scale=7.0, class_names=NAMES
        )

    def readers(self, folder: Path, rng: random.Random) -> list[Callable[[], object]]:
        return [partial(self.read_cache, folder / "cache"), partial(self.read_table, folder / "table")]

    def read_cache(self, folder: Path) -> None:
        cache = FeatureCache(folder)
        entry = cache.entry(self.plan, self.provenance)
        if cache.find(entry):
            shards = entry.read_shards()
            assert all(bool((shard == number).all()) for number, shard in enumerate(shards))
        else:
            with cache.build(entry) as partial:
                for shard in partial.missing_shards():
                    partial.write_shard(shard, torch.full((2, 4), float(shard)))
                partial.write_head({"offsets": torch.arange(7)})
                partial.finish()
            assert cache.find(entry)

    def read_table(self, folder: Path) -> None:
        table, expected = FeatureTable.open(folder), self.table()
        assert torch.equal(table.to("cpu").features, expected.features)
        assert torch.equal(table.labels, expected.labels)
        assert torch.equal(table.class_embeds, expected.class_embeds)
        assert (table.logit_scale, table.class_names) == (7.0, NAMES)


class Lists(Area):
    """List files and iNaturalist's JSON beside their images; every row must have its image and a class."""

    def make(self, folder: Path) -> None:
        rows = []
        for label, name in enumerate(NAMES):
            (folder / "images" / name).mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (4, 4), (label, number, 0)).save(folder / "images" / name / f"{number}.png")
                rows.append((f"images/{name}/{number}.png", label))
        (folder / "birds_train.txt").write_text("".join(f"{path} {label}\n" for path, label in rows))
        (folder / "birds_test.txt").write_text("".join(f"{path} {label}\n" for path, label in rows[::4]))
        content = {
            "images": [{"id": number, "file_name": path} for number, (path, _) in enumerate(rows)],
            "annotations": [{"image_id": number, "category_id": 7 * label} for number, (_, label) in enumerate(rows)],
            "categories": [{"id": 7 * label, "name": name} for label, name in enumerate(NAMES)],
        }
        (folder / "train2018.json").write_text(json.dumps(content))

    def damage(self, folder: Path, rng: random.Random) -> None:
        mutate_file(rng.choice(sorted(folder.glob("*.*"))), rng)

    def readers(self, folder: Path, rng: random.Random) -> list[Callable[[], object]]:
        unreadable = rng.choice(("raise", "skip"))
        return [partial(self.read, folder / name, unreadable) for name in ("birds_train.txt", "train2018.json")]

    def read(self, file: Path, unreadable: str) -> None:
        dataset = load_image_dataset(str(file), on_unreadable=unreadable, test_fraction=0.0)
        for split in dataset.values():
            classes = split.features["label"].num_classes
            assert len(split)
            assert all(0 <= label < classes for label in split["label"])
            assert all(Path(image["path"]).is_file() for image in split["image"])


class Images(Area):
    """Image files; what opens must be an RGB image of the size in its header, and the quick check must not crash."""

    def make(self, folder: Path) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
        image = Image.fromarray(noise)
        for name in ("a.png", "a.jpg", "a.gif", "a.bmp", "a.tif", "a.webp", "a.ppm", "a.ico"):
            image.save(folder / name)
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(folder / "turned.jpg", exif=exif)
        image.convert("P").save(folder / "palette.png", transparency=3)
        Image.fromarray(noise[..., 0].astype(np.uint16) * 200).save(folder / "deep.png")
        image.save(folder / "packed.tif", compression="tiff_lzw")
        (folder / "a.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")

    def damage(self, folder: Path, rng: random.Random) -> None:
        for file in sorted(folder.iterdir()):
            mutate_file(file, rng)
        mutate_folder(folder, rng)

    def readers(self, folder: Path, rng: random.Random) -> list[Callable[[], object]]:
        return [
            partial(self.read, path, rng.random() < 0.3, rng.choice((None, 8))) for path in sorted(folder.iterdir())
        ]

    def read(self, path: Path, from_bytes: bool, min_size: int | None) -> None:
        source = path.read_bytes() if from_bytes and path.is_file() else path
        check_image(source, path.name)
        image = open_image(source, path.name, min_size=min_size)
        assert image.mode == "RGB"
        assert image.width > 0
        np.asarray(image)


class ClassNames(Area):
    """Files of class names; a name each, all different."""

    def make(self, folder: Path) -> None:
        (folder / "names.txt").write_text("cat\ndog\nowl\n")
        (folder / "names.json").write_text(json.dumps(NAMES))
        (folder / "mapping.json").write_text(json.dumps({"cat": "house cat", "dog": "dog", "owl": "barn owl"}))
        (folder / "categories.json").write_text(
            json.dumps([{"id": 5 * n, "name": name} for n, name in enumerate(NAMES)])
        )
        (folder / "names.yaml").write_text("- cat\n- dog\n- owl\n")
        (folder / "mapping.yaml").write_text("cat: house cat\nowl: barn owl\n2: x\n".replace("2: x\n", ""))

    def damage(self, folder: Path, rng: random.Random) -> None:
        for file in sorted(folder.iterdir()):
            mutate_file(file, rng)

    def readers(self, folder: Path, rng: random.Random) -> list[Callable[[], object]]:
        return [partial(self.read, file) for file in sorted(folder.iterdir())]

    def read(self, file: Path) -> None:
        names = shown_class_names(NAMES, file)
        assert len(names) == len({name.lower() for name in names}) == 3
        assert all(isinstance(name, str) and name for name in names)


class WeightFiles(Area):
    """Checkpoint files of every format; only tensors come out, and a conversion is finite or refused."""

    cost = 2

    def make(self, folder: Path) -> None:
        state = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3), "c": torch.ones(5).bfloat16()}
        torch.save({"state_dict": state, "epoch": 3}, folder / "new.pt")
        torch.save(state, folder / "old.pth", _use_new_zipfile_serialization=False)
        with warnings.catch_warnings(action="ignore"):
            torch.jit.save(torch.jit.script(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))), folder / "script.pt")
        save_file(state, folder / "plain.safetensors")

    def damage(self, folder: Path, rng: random.Random) -> None:
        for file in sorted(folder.iterdir()):
            mutate_file(file, rng)
        if rng.random() < 0.25:
            source = rng.choice((openai_file("vit"), openai_file("resnet"), official_file("vit")))
            (folder / f"{'official' if 'official' in source.name else 'openai'}_clip.pt").write_bytes(
                mutate_bytes(source.read_bytes(), rng)
            )

    def readers(self, folder: Path, rng: random.Random) -> list[Callable[[], object]]:
        return [partial(self.read, file, folder / "converted" / file.stem) for file in sorted(folder.iterdir())]

    def read(self, file: Path, output: Path) -> None:
        if file.name == "official_clip.pt":
            convert_official_ballad(file, output, tokenizer=False)
        elif file.name == "openai_clip.pt":
            convert_openai_clip(file, output, tokenizer=False)
        else:
            content = read_checkpoint(file)
            size = sum(value.numel() * value.element_size() for value in content.values() if torch.is_tensor(value))
            assert size <= 4 * file.stat().st_size


class DualEncoders(Area):
    """Folders of transformers and of open_clip, to train from."""

    cost = 4

    def make(self, folder: Path) -> None:
        clip, tokenizer, image_processor = build_tiny_clip(width=32, layers=1, projection_dim=16, patch_size=16)
        for part in (clip, tokenizer, image_processor):
            part.save_pretrained(folder / "clip")
        write_open_clip_folder(folder / "open_clip", "vit")
        tokenizer.save_pretrained(folder / "open_clip")

    def damage(self, folder: Path, rng: random.Random) -> None:
        for part in ("clip", "open_clip"):
            mutate_folder(folder / part, rng)

    def readers(self, folder: Path, rng: random.Random) -> list[Callable[[], object]]:
        return [partial(self.read, folder / name) for name in ("clip", "open_clip")]

    def read(self, folder: Path) -> None:
        clip = load_dual_encoder(folder)
        assert all(not parameter.is_meta for parameter in clip.parameters())
        load_image_processor(folder, clip.config)
        load_tokenizer(folder, clip.config)


class Columns(Area):
    """Parquet files and what `datasets` saved; every row must have an image and a class."""

    cost = 6

    def make(self, folder: Path) -> None:
        file = io.BytesIO()
        Image.new("RGB", (4, 4)).save(file, "png")
        rows = {
            "image": [{"bytes": file.getvalue(), "path": f"{row}.png"} for row in range(12)],
            "label": [0, 1, 2] * 4,
        }
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
        dataset = datasets.Dataset.from_dict(rows, features=features)
        (folder / "parquet").mkdir()
        for split in ("train", "test"):
            dataset.to_parquet(folder / "parquet" / f"{split}.parquet")
        datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(folder / "saved")

    def damage(self, folder: Path, rng: random.Random) -> None:
        for part in ("parquet", "saved"):
            mutate_folder(folder / part, rng)

    def readers(self, folder: Path, rng: random.Random) -> list[Callable[[], object]]:
        return [partial(self.read, path) for path in (folder / "parquet", folder / "saved")]

    def read(self, path: Path) -> None:
        for split in load_image_dataset(str(path), test_fraction=0.0).values():
            images = as_image_dataset(split)
            assert len(images)
            assert 0 <= images.labels.min() <= images.labels.max() < len(images.class_names)
            assert images.image(0).mode == "RGB"


class Results(Area):
    """What a run leaves: arguments, predictions, the frontier of a sweep, the output of `ballad predict`."""

    def make(self, folder: Path) -> None:
        (folder / "arguments.yaml").write_text("dataset: /home/me/birds\nseed: 3\nphase_a_epochs: 2\n")
        (folder / "training_arguments.json").write_text(
            json.dumps({"arguments": {"dataset": "/home/me/birds"}, "seed": 3})
        )
        Predictions.from_logits(torch.eye(3), [0, 1, 2]).save(folder / "test.safetensors")
        Frontier([FrontierPoint(0.2, {"many": 0.5, "few": 0.1}), FrontierPoint(0.3, {"few": 0.2})], 0).save(
            folder / "frontier.json"
        )
        for name in ("out.csv", "out.jsonl"):
            with PredictionFile(folder / name, {"model": "m"}, ranks=1) as output:
                output.write(
                    [("a.png", [{"label": "cat\n", "score": 0.5}]), ("b,.png", [{"label": '"', "score": 0.25}])]
                )

    def damage(self, folder: Path, rng: random.Random) -> None:
        for file in sorted(folder.iterdir()):
            mutate_file(file, rng)

    def readers(self, folder: Path, rng: random.Random) -> list[Callable[[], object]]:
        return [
            partial(without_local_paths, folder),
            partial(claim_run_directory, folder, {"dataset": "/home/me/birds", "seed": 3}, resume=True),
            partial(self.read_predictions, folder / "test.safetensors"),
            lambda: Frontier.load(folder / "frontier.json").table(),
            *(partial(PredictionFile, folder / name, {"model": "m"}, ranks=1) for name in ("out.csv", "out.jsonl")),
        ]

    def read_predictions(self, file: Path) -> None:
        predictions = Predictions.load(file)
        lengths = {len(getattr(predictions, name)) for name in ("index", "labels", "predicted", "confidence")}
        assert len(lengths) == 1


AREAS: dict[str, type[Area]] = {
    "model directories": ModelDirectories,
    "checkpoints of phase A": Checkpoints,
    "feature caches": FeatureCaches,
    "lists and JSON": Lists,
    "images": Images,
    "class names": ClassNames,
    "weight files": WeightFiles,
    "dual encoders": DualEncoders,
    "parquet and saved datasets": Columns,
    "results": Results,
}
