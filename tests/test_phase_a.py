"""Phase A as a whole: what it changes, what it keeps, when it stops."""

import copy
import dataclasses
import math
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import EarlyStoppingCallback, TrainerCallback

from ballad_hf import BalladForImageClassification, train_phase_a
from ballad_hf.conversion.tiny_clip import build_tiny_clip
from ballad_hf.data import transforms
from ballad_hf.data.image_dataset import ImageDataset
from ballad_hf.models.modeling_clip_resnet import CLIPResNetModel
from ballad_hf.training import phase_a
from ballad_hf.training.arguments import BalladTrainingArguments, PhaseAArguments
from ballad_hf.training.callbacks import TrainingEvents
from ballad_hf.training.checkpoints import PhaseAResult
from ballad_hf.training.losses import NonFiniteLossError
from ballad_hf.training.optimization import tower_of
from ballad_hf.training.phase_a import StopSignals, TrainingInterrupted
from ballad_hf.training.phase_a_setup import set_up_phase_a
from ballad_hf.training.validation import METRIC_NAMES, Validator, encode_classes


pytestmark = pytest.mark.numeric

NAMES = ["red", "green", "blue"]
COUNTS = [20, 8, 4]


def coloured(counts, seed, names=NAMES):
    """Images that are mostly red, green or blue."""
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(3), counts)
    pixels = generator.integers(0, 120, (len(labels), 24, 24, 3), dtype=np.uint8)
    pixels[np.arange(len(labels)), :, :, labels] += 130
    return ImageDataset(pixels, labels, names)


@dataclasses.dataclass
class Splits:
    train: ImageDataset
    validation: ImageDataset | None


@pytest.fixture(scope="module")
def splits():
    return Splits(coloured(COUNTS, 0), coloured([4, 4, 4], 1))


@pytest.fixture
def encoder():
    return build_tiny_clip(width=32, layers=1, projection_dim=16, patch_size=16, words=["photo", *NAMES])


@pytest.fixture
def model(encoder):
    return BalladForImageClassification.from_dual_encoder(encoder.clip, NAMES, encoder.tokenizer)


def arguments(**changes):
    return PhaseAArguments(**{"epochs": 2, "batch_size": 8, "optimizer": "adamw", "learning_rate": 1e-3, **changes})


def trained(model, splits, encoder, given, **options) -> PhaseAResult:
    options = {"eval_dataset": splits.validation, "progress": False, **options}
    return train_phase_a(model, splits.train, encoder, given, **options)


def copy_of(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def changed(before, module):
    return {name for name, value in module.state_dict().items() if not torch.equal(before[name], value)}


def test_it_learns_colours_and_leaves_a_model_that_is_ready(model, splits, encoder):
    adapter = copy_of(model.adapter)
    stale = model.class_embeds.clone()
    result = trained(model, splits, encoder, arguments(epochs=20))
    assert result.steps == 20 * 4
    assert result.history[0]["epoch"] == 0
    assert [entry["step"] for entry in result.history] == [0, *range(4, 84, 4)]
    assert result.validation["mean_class"] > 0.9
    assert result.validation["mean_class"] == max(entry["mean_class"] for entry in result.history)
    assert not model.training
    assert not changed(adapter, model.adapter)
    assert model.config.class_counts == COUNTS
    assert all(parameter.requires_grad for parameter in model.clip.parameters())
    assert not torch.equal(stale, model.class_embeds)
    fresh = model.class_embeds.clone()
    model.set_class_names(NAMES, encoder.tokenizer)
    assert torch.equal(fresh, model.class_embeds)  # made with the text tower as it is now


@pytest.mark.parametrize("train", ["both", "image", "projections"])
def test_images_are_compared_with_the_models_own_class_embeddings(model, splits, encoder, train):
    """Descriptions in the place of templates, in training and in validation alike."""
    descriptions = {"green": ["grass", "leaves in spring", "moss"], "red": ["blood"]}
    model.set_class_names(NAMES, encoder.tokenizer, ["a {}", "one {}"], descriptions=descriptions)
    setup = set_up_phase_a(
        model, splits.train, encoder, arguments(train=train), Accelerator(), eval_dataset=splits.validation
    )
    for part in (setup.gradients, setup.validator):
        embeds = part.frozen_embeds if train == "image" else encode_classes(setup.towers, part.texts)
        torch.testing.assert_close(embeds, model.class_embeds, rtol=0, atol=1e-5)


@pytest.mark.parametrize("train", ["both", "image", "text", "projections"])
@pytest.mark.parametrize("loss", ["contrastive", "class_prompt"])
def test_what_is_not_trained_does_not_move(model, splits, encoder, train, loss):
    before = copy_of(model.clip)
    given = arguments(train=train, loss=loss, epochs=1, train_logit_scale=False, metric_for_best="overall")
    splits = dataclasses.replace(splits, validation=None)  # the last weights are kept
    trained(model, splits, encoder, given)
    moved = changed(before, model.clip)
    if train == "projections":
        assert moved == {"visual_projection.weight", "text_projection.weight"}
    else:
        assert {tower_of(name) for name in moved} == ({"image", "text"} if train == "both" else {train})


def test_the_logit_scale_is_trained_up_to_100_or_fixed(model, splits, encoder):
    splits = dataclasses.replace(splits, validation=None)
    with torch.no_grad():
        model.clip.logit_scale.fill_(4.6)
    trained(model, splits, encoder, arguments(learning_rate=0.05, epochs=3))
    assert model.clip.logit_scale.exp().item() <= 100.01
    fixed = BalladForImageClassification.from_dual_encoder(encoder.clip, NAMES, encoder.tokenizer, logit_scale=100.0)
    before = fixed.clip.logit_scale.item()
    trained(fixed, splits, encoder, arguments(epochs=1))
    assert fixed.clip.logit_scale.item() == before


def test_the_same_seed_gives_the_same_bits_and_the_global_state_is_left_alone(splits, encoder):
    start = copy_of(encoder.clip)

    def run(seed, **options):
        encoder.clip.load_state_dict(start)
        model = BalladForImageClassification.from_dual_encoder(encoder.clip, NAMES, encoder.tokenizer)
        state = torch.get_rng_state()
        trained(model, splits, encoder, arguments(), seed=seed, **options)
        assert torch.equal(state, torch.get_rng_state())
        return copy_of(model)

    first, other = run(0), run(1)
    for same in (run(0), run(0, num_workers=2)):
        assert all(torch.equal(first[name], value) for name, value in same.items())
    assert not all(torch.equal(first[name], value) for name, value in other.items())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_checkpoints_do_not_change_what_is_trained(splits, encoder, tmp_path, optimizer):
    """Not even the one before the first step, where torch would take a step for Adam to have a state to save."""
    start = copy_of(encoder.clip)
    weights = []
    for folder in (None, tmp_path):
        encoder.clip.load_state_dict(start)
        model = BalladForImageClassification.from_dual_encoder(encoder.clip, NAMES, encoder.tokenizer)
        trained(
            model,
            dataclasses.replace(splits, validation=None),
            encoder,
            arguments(epochs=1, optimizer=optimizer, checkpoint_every_steps=2),
            output_dir=folder,
        )
        weights.append(copy_of(model))
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())


def naive_official_steps(model, encoder, splits, batches, given):
    """The official update, written out: all prompts at 77 tokens each step, cosine cross-entropy, torch's own SGD."""
    clip = model.clip
    tokens = encoder.tokenizer(
        [f"a photo of a {name}." for name in NAMES], padding="max_length", max_length=77, return_tensors="pt"
    )
    optimizer = torch.optim.SGD(clip.parameters(), lr=given.learning_rate, momentum=0.9, weight_decay=5e-4)
    clip.train()
    for pixel_values, labels in batches:
        images = clip.get_image_features(pixel_values=pixel_values).pooler_output
        texts = clip.get_text_features(**tokens).pooler_output
        images = images / images.norm(dim=-1, keepdim=True)
        texts = texts / texts.norm(dim=-1, keepdim=True)
        loss = torch.nn.functional.cross_entropy(100.0 * images @ texts.T, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_steps_are_those_of_the_official_update(splits, encoder):
    """Same start, batches and numbers; the scheduler's and the sampler's defects are not followed."""
    from ballad_hf.data.loaders import epoch_batches, train_loader
    from ballad_hf.data.samplers import InstanceSampler
    from ballad_hf.data.transforms import train_transform

    model = BalladForImageClassification.from_dual_encoder(encoder.clip, NAMES, encoder.tokenizer, logit_scale=100.0)
    start = copy_of(model.clip)
    given = PhaseAArguments(
        epochs=2, batch_size=8, loss="class_prompt", learning_rate=1e-3, decay_all=True, schedule="constant"
    )
    trained(model, dataclasses.replace(splits, validation=None), encoder, given)
    ours = copy_of(model.clip)

    model.clip.load_state_dict(start)
    transform = train_transform(encoder.image_processor)
    sampler = InstanceSampler(splits.train.labels, multiple_of=8, seed=0)
    loader = train_loader(splits.train.with_transform(transform), sampler, 8, seed=0)
    batches = [(b["pixel_values"], b["labels"]) for epoch in (0, 1) for b in epoch_batches(loader, epoch, 0)]
    assert len(batches) == 8
    naive_official_steps(model, encoder, splits, batches, given)
    for name, value in model.clip.state_dict().items():
        if name == "logit_scale" or not value.is_floating_point():  # the official code keeps the scale fixed
            continue
        assert torch.allclose(ours[name], value, rtol=1e-5, atol=1e-5), name
        assert name == "text_model.embeddings.position_embedding.weight" or not torch.equal(start[name], value), name


def test_the_best_epoch_is_kept_and_patience_ends_the_run(model, splits, encoder, caplog):
    # At such a rate every step makes it worse or no better than the start.
    given = arguments(epochs=9, learning_rate=3.0, optimizer="sgd", early_stopping_patience=2, max_grad_norm=1.0)
    before = copy_of(model.clip)
    result = trained(model, splits, encoder, given)
    scores = [entry["mean_class"] for entry in result.history]
    best = scores.index(max(scores))
    assert result.best_epoch == best
    assert len(scores) == best + 1 + 2  # two more validations, then the end
    assert result.steps == 4 * (len(scores) - 1)
    if best == 0:
        assert not changed(before, model.clip)
        assert "initial weights were kept" in caplog.text


def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_images(model, splits, encoder, tmp_path):
    wild = arguments(epochs=50, optimizer="sgd", schedule="constant")
    wild.learning_rate = 1e30  # refused where arguments are made
    with pytest.raises(NonFiniteLossError) as caught:
        trained(model, splits, encoder, wild, output_dir=tmp_path)
    message = str(caught.value)
    assert "at a learning rate of 1e+30" in message
    assert "on the training images [" in message
    assert "The last checkpoint is" in message
    assert (tmp_path / "phase_a" / "step-0000000000" / "tensors.safetensors").is_file()


@pytest.mark.parametrize("mode", ["warn", "interpolate", "stop", "off"])
def test_the_tail_guard(model, splits, encoder, mode, monkeypatch, caplog):
    """Figures by script: accuracy rises with the way from the start, and rare classes fall past 55 % of it."""
    before = copy_of(model.clip)
    ways = []

    def metrics(self, towers):
        way = (towers.clip.visual_projection.weight - before["visual_projection.weight"]).norm().item()
        ways.append(way)
        few = 0.5 if way <= 0.55 * max(ways) else 0.4
        return {**dict.fromkeys(METRIC_NAMES, None), "mean_class": 0.3 + way / 1000, "few": few}

    monkeypatch.setattr(Validator, "__call__", metrics)
    given = arguments(epochs=4, tail_guard=mode, learning_rate=1e-2, schedule="constant")
    result = trained(model, splits, encoder, given)
    assert ("rare classes have lost" in caplog.text) == (mode != "off")
    if mode == "stop":
        assert result.steps == 4  # after the first of four epochs
        assert not changed(before, model.clip)
    elif mode == "interpolate":
        assert result.interpolation == 0.5
        assert result.validation["few"] == 0.5
        assert "50% of the way" in caplog.text
        way = (model.clip.visual_projection.weight - before["visual_projection.weight"]).norm().item()
        assert way == pytest.approx(max(ways) / 2, rel=1e-3)
    else:
        assert result.steps == 16
        assert result.interpolation is None
        assert result.validation["few"] == 0.4


def test_low_rank_updates_are_merged_into_a_plain_model(model, splits, encoder):
    pytest.importorskip("peft")
    names = list(model.clip.state_dict())
    before = copy_of(model.clip)
    given = arguments(lora_rank=2, train="image", learning_rate=1e-2)
    trained(model, dataclasses.replace(splits, validation=None), encoder, given)
    assert list(model.clip.state_dict()) == names
    moved = changed(before, model.clip) - {"logit_scale"}
    assert moved
    for name in moved:
        assert name.startswith("vision_model.encoder.layers.0")
        assert torch.linalg.matrix_rank(model.clip.state_dict()[name] - before[name], rtol=1e-3) <= 2


def test_the_average_of_the_weights_is_what_is_kept(splits, encoder):
    start = copy_of(encoder.clip)
    kept = {}
    for decay in (None, 0.0, 0.9):
        encoder.clip.load_state_dict(start)
        model = BalladForImageClassification.from_dual_encoder(encoder.clip, NAMES, encoder.tokenizer)
        trained(model, dataclasses.replace(splits, validation=None), encoder, arguments(ema_decay=decay))
        kept[decay] = copy_of(model.clip)["visual_projection.weight"]
    assert torch.allclose(kept[None], kept[0.0])  # without memory the average is the weights
    moved = (kept[None] - start["visual_projection.weight"]).norm()
    assert 0 < (kept[0.9] - start["visual_projection.weight"]).norm() < moved


def test_activation_checkpointing_changes_nothing_but_the_memory(splits, encoder):
    start = copy_of(encoder.clip)
    found = []
    for checkpointing in (False, True):
        encoder.clip.load_state_dict(start)
        model = BalladForImageClassification.from_dual_encoder(encoder.clip, NAMES, encoder.tokenizer)
        trained(model, splits, encoder, arguments(optimizer="sgd", activation_checkpointing=checkpointing))
        found.append(copy_of(model.clip))
        assert not any(getattr(module, "gradient_checkpointing", False) for module in model.clip.modules())
    for name, value in found[0].items():
        assert torch.allclose(found[1][name], value, atol=1e-6), name


def test_compiled_towers_train_alike_and_are_plain_afterwards(splits, encoder, monkeypatch):
    """The graphs are captured, and run as they are instead of being translated for the device."""
    graphs = []

    def as_it_is(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **given: compiler(function, backend=as_it_is, **given))
    start = copy_of(encoder.clip)
    weights = []
    for torch_compile in (False, True):
        encoder.clip.load_state_dict(start)
        model = BalladForImageClassification.from_dual_encoder(encoder.clip, NAMES, encoder.tokenizer)
        given = arguments(epochs=1, optimizer="sgd", max_steps=1, torch_compile=torch_compile)
        trained(model, dataclasses.replace(splits, validation=None), encoder, given)
        assert bool(graphs) == torch_compile
        weights.append(copy_of(model))
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-5, atol=1e-5, msg=name)
    graphs.clear()
    torch.compiler.reset()  # a tower that is still compiled would be captured again
    encoder.clip.get_text_features(**encoder.tokenizer("red", return_tensors="pt"))
    encoder.clip.get_image_features(pixel_values=torch.zeros(1, 3, 32, 32))
    assert not graphs


def test_autocast_trains_float32_weights(model, splits, encoder):
    result = trained(
        model, splits, encoder, arguments(epochs=10), accelerator=Accelerator(mixed_precision="bf16", cpu=True)
    )
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert result.validation["mean_class"] > 0.6
    AcceleratorState._reset_state(reset_partial_state=True)
    half = model.to(torch.bfloat16)
    trained(half, splits, encoder, arguments(epochs=1))
    assert half.dtype == torch.float32


@pytest.mark.parametrize("batch_norm", ["frozen", "train"])
def test_running_statistics_of_a_modified_resnet(splits, encoder, batch_norm):
    from ballad_hf.models.configuration_clip_resnet import CLIPResNetConfig

    text_config = encoder.clip.config.text_config.to_dict()
    config = CLIPResNetConfig(
        text_config=text_config,
        vision_config={"image_size": 32, "depths": [1, 1, 1, 1], "width": 8, "num_attention_heads": 4},
        projection_dim=16,
    )
    torch.manual_seed(0)
    clip = CLIPResNetModel(config).eval()
    model = BalladForImageClassification.from_dual_encoder(clip, NAMES, encoder.tokenizer)
    before = copy_of(clip)
    given = arguments(batch_norm=batch_norm, epochs=1)
    trained(model, dataclasses.replace(splits, validation=None), encoder, given)
    statistics = {name for name in changed(before, clip) if "running" in name}
    assert bool(statistics) == (batch_norm == "train")


def test_low_rank_updates_of_one_tower_alone_are_reported(encoder, caplog):
    pytest.importorskip("peft")
    from ballad_hf.models.configuration_clip_resnet import CLIPResNetConfig
    from ballad_hf.training.optimization import LowRankUpdates

    vision = {"image_size": 32, "depths": [1, 1, 1, 1], "width": 8, "num_attention_heads": 4}
    config = CLIPResNetConfig(text_config=encoder.clip.config.text_config.to_dict(), vision_config=vision)
    clip = CLIPResNetModel(config)
    LowRankUpdates(clip, "both", rank=2)
    assert "The vision_model of this CLIPResNetModel has no layers" in caplog.text
    with pytest.raises(ValueError, match="no attention and MLP layers"):
        LowRankUpdates(CLIPResNetModel(config), "image", rank=2)


def test_a_callback_that_fails_ends_the_training(model, splits, encoder):
    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise RuntimeError("no network")

    with pytest.raises(RuntimeError, match="no network"):
        trained(model, splits, encoder, arguments(), callbacks=[Fails])


def test_callbacks_see_every_event_with_a_true_state(model, splits, encoder, tmp_path):
    seen = []

    class Records(TrainerCallback):
        def __getattribute__(self, name):
            if not name.startswith("on_"):
                return super().__getattribute__(name)

            def record(args, state, control, **passed):
                seen.append((name, state.global_step, passed))

            return record

    result = trained(model, splits, encoder, arguments(logging_steps=3), callbacks=[Records], output_dir=tmp_path)
    events = [name for name, _, _ in seen]
    assert (events[0], events[-1]) == ("on_train_begin", "on_train_end")
    assert [step for name, step, _ in seen if name == "on_step_end"] == list(range(1, 9))
    assert [step for name, step, _ in seen if name == "on_evaluate"] == [0, 4, 8]
    assert [step for name, step, _ in seen if name == "on_save"] == [0, 4, 8]
    assert [step for name, step, passed in seen if name == "on_log" and "loss" in passed["logs"]] == [3, 6]
    assert (events.count("on_epoch_begin"), events.count("on_epoch_end")) == (2, 2)
    evaluations = [passed for name, _, passed in seen if name == "on_evaluate"]
    for passed, entry in zip(evaluations, result.history, strict=True):
        assert passed["metrics"]["eval_mean_class"] == entry["mean_class"]
        assert passed["model"] is model
    saved = [passed["checkpoint"] for name, _, passed in seen if name == "on_save"]
    assert saved[-1] == tmp_path / "phase_a" / "step-0000000008"


@pytest.mark.parametrize("step", [3, 4])
def test_a_callback_stops_the_phase_after_its_step(model, splits, encoder, step):
    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == step
            return control

    result = trained(model, splits, encoder, arguments(), callbacks=[Stops])
    assert result.steps == step
    assert [entry["step"] for entry in result.history] == [0, step]


def test_a_callback_asks_for_a_checkpoint(model, splits, encoder, tmp_path):
    class Saves(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = state.global_step == 3

    given = arguments(keep_checkpoints=9)
    trained(model, splits, encoder, given, callbacks=[Saves], output_dir=tmp_path)
    steps = [int(path.name.removeprefix("step-")) for path in sorted((tmp_path / "phase_a").glob("step-*"))]
    assert steps == [0, 3, 4, 8]


def test_early_stopping_of_transformers_stops_and_its_patience_survives_a_resume(splits, encoder, tmp_path):
    """Every validation scores alike, so the third one without a gain is the last, interrupted or not."""
    start = copy_of(encoder.clip)
    args = BalladTrainingArguments(str(tmp_path))

    def run(folder, stop_at=None, resume=None):
        encoder.clip.load_state_dict(start)
        model = BalladForImageClassification.from_dual_encoder(encoder.clip, NAMES, encoder.tokenizer)

        class Interrupts(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == stop_at:
                    signal.raise_signal(signal.SIGTERM)

        accelerator = Accelerator()
        events = TrainingEvents([EarlyStoppingCallback(3), Interrupts], args, accelerator, model)
        given = arguments(epochs=9, learning_rate=1e-12, optimizer="sgd")
        return trained(
            model, splits, encoder, given, callbacks=events, output_dir=folder, resume_from_checkpoint=resume
        )

    assert run(tmp_path / "whole").steps == 3 * 4
    with pytest.raises(TrainingInterrupted):
        run(tmp_path / "cut", stop_at=9)
    assert run(tmp_path / "cut", resume=True).steps == 3 * 4


def test_a_checkpoint_of_weights_that_are_not_finite_is_not_saved(model, splits, encoder, tmp_path, caplog):
    class Poisons(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 6:
                model.clip.visual_projection.weight.data[0, 0] = float("nan")
                control.should_save = True

    with pytest.raises(NonFiniteLossError, match="step-0000000004"):
        trained(model, splits, encoder, arguments(), callbacks=[Poisons], output_dir=tmp_path)
    assert "state after step 6 is not finite" in caplog.text


def test_after_a_divergence_the_learning_rate_may_be_lowered(model, splits, encoder, tmp_path):
    start = copy_of(model.clip)
    wild = arguments(epochs=4, optimizer="sgd", schedule="constant")
    calm = dataclasses.replace(wild, learning_rate=1e-3)
    wild.learning_rate = 1e30  # refused where arguments are made
    with pytest.raises(NonFiniteLossError):
        trained(model, splits, encoder, wild, output_dir=tmp_path)
    model.clip.load_state_dict(start)
    result = trained(model, splits, encoder, calm, output_dir=tmp_path, resume_from_checkpoint=True)
    assert result.steps == 16
    model.clip.load_state_dict(start)
    with pytest.raises(ValueError, match="batch_size was 8 and is 4"):
        trained(
            model,
            splits,
            encoder,
            dataclasses.replace(calm, batch_size=4),
            output_dir=tmp_path,
            resume_from_checkpoint=True,
        )


@pytest.mark.parametrize("sampler", ["class_aware", "power", "progressive"])
def test_samplers_and_the_crop_schedule_reach_the_loader(model, splits, encoder, sampler, monkeypatch):
    scales = []
    draw = transforms._random_box_of_shape

    def recorded(width, height, to_width, to_height, scale, rng):
        scales.append(scale)
        return draw(width, height, to_width, to_height, scale, rng)

    monkeypatch.setattr(transforms, "_random_box_of_shape", recorded)
    given = arguments(epochs=3, sampler=sampler, crop_schedule="linear", crop_scale=0.5)
    result = trained(model, splits, encoder, given)
    pictures = 8 * result.steps // 3
    assert scales == [(0.5, 1.0)] * pictures + [(0.75, 1.0)] * pictures + [(1.0, 1.0)] * pictures


def test_a_loss_corrects_what_the_sampler_leaves(splits, encoder):
    losses = {}
    for loss in ("class_prompt", "balanced_softmax", "generalized_reweight"):
        model = BalladForImageClassification.from_dual_encoder(copy.deepcopy(encoder.clip), NAMES, encoder.tokenizer)
        result = trained(model, splits, encoder, arguments(sampler="class_aware", loss=loss))
        losses[loss] = [entry["loss"] for entry in result.history[1:]]
    assert losses["balanced_softmax"] == pytest.approx(losses["class_prompt"], rel=1e-4)
    assert losses["generalized_reweight"] == pytest.approx(losses["class_prompt"], rel=1e-4)


def test_the_loss_follows_a_progressive_sampler(model, splits, encoder):
    given = arguments(epochs=3, sampler="progressive", loss="balanced_softmax")
    setup = set_up_phase_a(model, splits.train, encoder, given, Accelerator(cpu=True))
    shares = {0: [20 / 32, 8 / 32, 4 / 32], 2: [1 / 3, 1 / 3, 1 / 3]}
    for epoch, expected in shares.items():
        setup.start_epoch(epoch)
        flat = setup.gradients.objective(torch.zeros(3, 3), torch.arange(3), torch.arange(3)).item()
        assert flat == pytest.approx(-sum(math.log(share) for share in expected) / 3, rel=1e-5)


def test_bad_input_is_named(model, splits, encoder):
    with pytest.raises(ValueError, match="An epoch of 32 rows is shorter than one global batch of 64"):
        trained(model, splits, encoder, arguments(batch_size=64))
    other = coloured(COUNTS, 0, ["red", "green", "yellow"])
    with pytest.raises(ValueError, match="call model.set_class_names"):
        trained(model, Splits(other, None), encoder, arguments())
    with pytest.raises(ValueError, match="there is no output_dir"):
        trained(model, splits, encoder, arguments(), resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="metric_for_best is 'many'"):
        trained(model, splits, encoder, arguments(metric_for_best="many"))


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_without_validation_the_last_epoch_is_kept_and_logged(splits, encoder, tmp_path, caplog, ema_decay):
    given = arguments(epochs=3, ema_decay=ema_decay)
    without = dataclasses.replace(splits, validation=None)

    def run(splits, **options):
        model = BalladForImageClassification.from_dual_encoder(copy.deepcopy(encoder.clip), NAMES, encoder.tokenizer)
        return trained(model, splits, encoder, given, **options), copy_of(model)

    result, weights = run(without, output_dir=tmp_path)
    assert (result.best_epoch, result.steps, result.validation, result.zero_shot) == (3, 12, None, None)
    assert [sorted(entry) for entry in result.history[1:]] == [["epoch", "learning_rate", "loss", "step"]] * 3
    (said,) = [record.getMessage() for record in caplog.records if "no validation split" in record.getMessage()]
    assert "phase A keeps the weights of its last epoch" in said
    # A validation that always prefers what came last must keep the same weights.
    rising = iter(range(1, 9))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Validator, "__call__", lambda self, towers: dict.fromkeys(METRIC_NAMES, next(rising) / 10))
        with_validation, expected = run(splits)
    assert with_validation.best_epoch == 3
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    # The state of a run without validation is read back and gone on from.
    shutil.rmtree(tmp_path / "phase_a" / "result")
    shutil.rmtree(max((tmp_path / "phase_a").glob("step-*")))
    resumed, again = run(without, output_dir=tmp_path, resume_from_checkpoint=True)
    assert (resumed.best_epoch, resumed.resumed_from) == (3, 8)
    assert all(torch.equal(weights[name], value) for name, value in again.items())


@pytest.mark.parametrize(
    "option", [{"tail_guard": "stop"}, {"tail_guard": "interpolate"}, {"early_stopping_patience": 2}]
)
def test_what_needs_validation_is_refused_without_it(model, splits, encoder, option):
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=f"no validation split, which {name}={value!r} needs.*validation_fraction"):
        trained(model, dataclasses.replace(splits, validation=None), encoder, arguments(**option))


def test_each_validation_is_a_line_in_the_log(model, splits, encoder, caplog):
    caplog.set_level("INFO", logger="ballad_hf")
    result = trained(model, splits, encoder, arguments())
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Phase A, epoch")]
    figures = [(entry["loss"], entry["mean_class"]) for entry in result.history[1:]]
    assert lines == [
        f"Phase A, epoch {epoch} of 2: loss {loss:.3f}, mean_class {accuracy:.3f}."
        for epoch, (loss, accuracy) in enumerate(figures, start=1)
    ]


def test_a_stopped_run_speaks_after_its_bar_is_closed(model, splits, encoder, monkeypatch):
    said: list[str] = []

    class Bar(phase_a.tqdm):
        def update(self, steps=1):
            signal.raise_signal(signal.SIGTERM)

        def close(self):
            said.append("the bar is closed")
            super().close()

    monkeypatch.setattr(phase_a, "tqdm", Bar)
    monkeypatch.setattr(phase_a.logger, "warning", said.append)
    with pytest.raises(TrainingInterrupted):
        trained(model, splits, encoder, arguments())
    first, second = said[:2]
    assert first == "the bar is closed"
    assert second.startswith("Phase A was stopped by SIGTERM")


def test_signals_are_noted_and_a_second_ctrl_c_stops_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        assert signals.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupted_program_ends_with_the_signals_status():
    interrupted = TrainingInterrupted(signal.SIGTERM, "Stopped after step 3.")
    assert interrupted.code == 143
    assert str(interrupted) == "Stopped after step 3."


def test_a_launcher_that_died_counts_as_sigterm(monkeypatch):
    parent = os.getppid()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    launched = StopSignals()
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    alone = StopSignals()
    assert launched.received is alone.received is None
    monkeypatch.setattr(os, "getppid", lambda: parent + 1)
    assert launched.received == signal.SIGTERM
    assert alone.received is None  # started from a shell, which may be closed while training goes on
