"""One step of phase A: its gradients do not depend on how a batch is cut up, and rows are gathered over processes."""

import copy

import numpy as np
import pytest
import torch
from accelerate import Accelerator, debug_launcher

from ballad_hf.data.prompts import ClassPrompts
from ballad_hf.models.class_embeddings import encode_class_prompts
from ballad_hf.training.losses import build_classification_loss
from ballad_hf.training.optimization import freeze_the_rest
from ballad_hf.training.step import (
    ClassTexts,
    Objective,
    OutOfMemoryError,
    StepGradients,
    TrainableTowers,
    class_embeddings,
    gather_rows,
)

from .test_dual_encoders import FAMILIES, tiny_model, tokenizer_for


pytestmark = pytest.mark.numeric

NAMES = ["cat", "dog", "owl", "red fox", "zebra", "a very long name of a rare species"]
COUNTS = [50, 20, 10, 5, 2, 1]
OWN = {"owl": ["a round face", "wings that make no sound", "owl"], "red fox": ["a bushy tail"]}
LABELS = torch.tensor([0, 0, 1, 0, 2, 5, 1])


def gradients_of(
    clip, tokenizer, loss, micro_batch_size=None, piece=None, train="both", templates=("a {}.",), own=None
):
    """Gradients by name, and the loss, from one step over 7 images."""
    freeze_the_rest(clip, train, train_logit_scale=True)
    clip.zero_grad()
    accelerator = Accelerator(cpu=True)
    prompts = ClassPrompts(NAMES, list(templates), tokenizer, clip.config, own)
    texts = ClassTexts(prompts, 0, 1, piece, torch.device("cpu"))
    objective = Objective() if loss == "contrastive" else Objective(build_classification_loss(loss, COUNTS))
    towers = TrainableTowers(clip)
    frozen = None
    if train == "image":
        with torch.no_grad():
            share = texts.share(torch.arange(len(NAMES)))
            features = torch.cat([towers(**part).text for part in share.pieces])
            frozen = class_embeddings(features, share.prompt_counts)[share.pick]
    step = StepGradients(
        towers,
        None if train == "image" else texts,
        objective,
        accelerator,
        num_classes=len(NAMES),
        micro_batch_size=micro_batch_size,
        frozen_embeds=frozen,
        image_is_trained=train != "text",
    )
    pixel_values = torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    value = step(pixel_values, LABELS)
    return value.item(), {
        name: parameter.grad.clone() for name, parameter in clip.named_parameters() if parameter.grad is not None
    }


@pytest.mark.parametrize("loss", ["contrastive", "cross_entropy", "balanced_softmax", "lade"])
@pytest.mark.parametrize("train", ["both", "image", "text", "projections"])
def test_pieces_give_the_gradients_of_the_whole(tiny_clip, loss, train):
    clip, tokenizer, _ = tiny_clip
    whole, expected = gradients_of(clip, tokenizer, loss, train=train)
    assert any(gradient.abs().max() > 0 for gradient in expected.values())
    for micro_batch_size, piece in ((3, None), (1, 2), (7, 2)):
        value, found = gradients_of(clip, tokenizer, loss, micro_batch_size, piece, train)
        assert value == pytest.approx(whole, rel=1e-5)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-5, name


@pytest.mark.parametrize("loss", ["contrastive", "cross_entropy"])
@pytest.mark.parametrize("train", ["both", "projections"])
def test_pieces_of_uneven_classes_give_the_gradients_of_the_whole(tiny_clip, loss, train):
    """Classes of 1, 2 and 3 prompts, in pieces of 1 to 4 prompts."""
    clip, tokenizer, _ = tiny_clip
    told = {"train": train, "templates": ("a {}.", "one {}."), "own": OWN}
    whole, expected = gradients_of(clip, tokenizer, loss, **told)
    for micro_batch_size, piece in ((3, 1), (7, 3), (2, 4)):
        value, found = gradients_of(clip, tokenizer, loss, micro_batch_size, piece, **told)
        assert value == pytest.approx(whole, rel=1e-5)
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-5, name


@pytest.mark.parametrize("piece", [1, 3, 4, 100])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_pieces_hold_as_many_prompts_as_they_may_and_are_as_many_everywhere(tiny_clip, piece, processes):
    clip, tokenizer, _ = tiny_clip
    prompts = ClassPrompts(NAMES, ["a {}.", "one {}."], tokenizer, clip.config, OWN)
    assert prompts.counts.tolist() == [2, 2, 3, 1, 2, 2]
    shares = [
        ClassTexts(prompts, process, processes, piece, torch.device("cpu")).share(torch.tensor([0, 2, 3, 4, 5]))
        for process in range(processes)
    ]
    assert len({len(share.pieces) for share in shares}) == 1
    assert len({len(share.prompt_counts) for share in shares}) == 1
    for share in shares:
        assert [len(tokens["input_ids"]) for tokens in share.pieces] == share.rows
        assert sum(share.rows) == share.prompt_counts.sum()
        assert max(share.rows) <= max(piece, 3)
    if piece == 4 and processes == 1:
        assert sorted(shares[0].rows) in ([2, 4, 4], [3, 3, 4])  # ten prompts


def test_the_contrastive_loss_over_uneven_classes_is_that_of_their_embeddings(tiny_clip):
    """Three prompts of a class are one text for the loss: their normalised mean, compared once."""
    clip, tokenizer, _ = tiny_clip
    value, _ = gradients_of(clip, tokenizer, "contrastive", own=OWN)
    embeds = encode_class_prompts(clip, tokenizer, NAMES, ["a {}."], descriptions=OWN)
    pixel_values = torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        images = clip.get_image_features(pixel_values=pixel_values).pooler_output
        pairs = clip.logit_scale.exp() * torch.nn.functional.normalize(images) @ embeds[LABELS].T  # a text an image
    same = (LABELS[:, None] == LABELS).float()
    both = [-((logits.log_softmax(1) * same).sum(1) / same.sum(1)).mean().item() for logits in (pairs, pairs.T)]
    assert value == pytest.approx(sum(both) / 2, rel=1e-5)


@pytest.mark.parametrize("own", [{}, OWN], ids=["templates", "descriptions"])
def test_the_whole_is_what_a_plain_loss_over_all_prompts_gives(tiny_clip, own):
    clip, tokenizer, _ = tiny_clip
    value, found = gradients_of(clip, tokenizer, "cross_entropy", templates=("a {}.", "one {}."), own=own)
    clip.zero_grad()
    pixel_values = torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images = clip.get_image_features(pixel_values=pixel_values).pooler_output
    embeds = []
    for name in NAMES:  # one prompt at a time
        texts = own.get(name, [f"a {name}.", f"one {name}."])
        tokens = [tokenizer(text, return_tensors="pt") for text in texts]
        features = [clip.get_text_features(**token).pooler_output[0] for token in tokens]
        embeds.append(sum(feature / feature.norm() for feature in features) / len(texts))
    embeds = torch.stack([embed / embed.norm() for embed in embeds])
    logits = clip.logit_scale.exp() * (images / images.norm(dim=-1, keepdim=True)) @ embeds.T
    loss = torch.nn.functional.cross_entropy(logits, LABELS)
    loss.backward()
    assert value == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in clip.named_parameters():
        assert (found[name] - parameter.grad).norm() <= 1e-4 * parameter.grad.norm() + 1e-5, name


def test_the_contrastive_loss_encodes_the_classes_of_the_batch_only(tiny_clip, monkeypatch):
    clip, tokenizer, _ = tiny_clip
    rows = []
    whole = type(clip).get_text_features

    def counted(self, input_ids, **kwargs):
        rows.append(len(input_ids))
        return whole(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(clip), "get_text_features", counted)
    gradients_of(clip, tokenizer, "contrastive")
    assert rows == [len(np.unique(LABELS))]
    rows.clear()
    gradients_of(clip, tokenizer, "cross_entropy", train="image")  # a frozen text tower runs before, not in the step
    assert rows == [len(NAMES)]


def test_dropout_falls_alike_in_both_passes(tiny_clip):
    clip, tokenizer, _ = tiny_clip
    for module in clip.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.5  # of attention
    clip.train()

    def step(micro_batch_size):
        torch.manual_seed(3)
        return gradients_of(clip, tokenizer, "contrastive", micro_batch_size, piece=2)

    (first, some), (second, same) = step(3), step(3)
    assert first == second
    assert all(torch.equal(some[name], same[name]) for name in some)
    # A finite difference along the gradient: the second pass must see the masks of the first.
    name, parameter = next((n, p) for n, p in clip.named_parameters() if n == "visual_projection.weight")
    direction = some[name] / some[name].norm()
    parameter.data.add_(1e-3 * direction)
    above, _ = step(3)
    parameter.data.sub_(2e-3 * direction)
    below, _ = step(3)
    assert (above - below) / 2e-3 == pytest.approx(some[name].norm().item(), rel=0.05)


def _step_with_memory_for(most, tiny_clip, monkeypatch, error=None):
    """Gradients of a step whose device holds `most` images, and the sizes of the forward passes that were tried."""
    tried = []
    forward = TrainableTowers.forward

    def limited(self, pixel_values=None, **tokens):
        if pixel_values is not None:
            tried.append(len(pixel_values))
            if len(pixel_values) > most:
                raise error or torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, pixel_values, **tokens)

    monkeypatch.setattr(TrainableTowers, "forward", limited)
    return tried, lambda loss: gradients_of(tiny_clip.clip, tiny_clip.tokenizer, loss)


@pytest.mark.parametrize("loss", ["contrastive", "cross_entropy"])
@pytest.mark.parametrize(
    "error",
    [None, RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")],
)
def test_where_memory_runs_out_the_micro_batch_is_halved_and_the_gradients_stay(tiny_clip, monkeypatch, loss, error):
    value, expected = gradients_of(tiny_clip.clip, tiny_clip.tokenizer, loss)
    tried, step = _step_with_memory_for(2, tiny_clip, monkeypatch, error)
    halved, gradients = step(loss)
    assert tried[0] == 7
    assert tried.count(3) == 1  # halved again: 7 // 2 // 2 is 1
    assert set(tried[tried.index(3) + 1 :]) == {1}
    assert halved == pytest.approx(value, rel=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)  # float32, logits up to 15


def test_one_image_that_does_not_fit_says_what_to_set(tiny_clip, monkeypatch):
    _, step = _step_with_memory_for(0, tiny_clip, monkeypatch)
    with pytest.raises(OutOfMemoryError, match="--phase_a_activation_checkpointing.*--preset quick"):
        step("contrastive")


def test_other_errors_of_a_step_are_not_taken_for_a_lack_of_memory(tiny_clip, monkeypatch):
    tried, step = _step_with_memory_for(0, tiny_clip, monkeypatch, RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        step("contrastive")
    assert tried == [7]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_projection_on_kept_features_of_its_tower_is_the_whole_tower(family, tiny_clip):
    """`train="projections"` runs the frozen text tower once; families pool and project in their own ways."""
    tokenizer = tokenizer_for(family, tiny_clip.tokenizer)
    clip = tiny_model(family, tokenizer)
    freeze_the_rest(clip, "projections", train_logit_scale=False)
    prompts = ClassPrompts(["cat", "a red fox"], ["a {}.", "a photo of a {}."], tokenizer, clip.config)
    texts = ClassTexts(prompts, 0, 1, None, torch.device("cpu"))
    towers = TrainableTowers(clip)
    classes = torch.tensor([0, 1])
    (tokens,) = texts.share(classes).pieces
    expected = towers(**tokens).text
    kept = ClassTexts(prompts, 0, 1, None, torch.device("cpu"))
    kept.keep_pooled(copy.deepcopy(clip))
    (pooled,) = kept.share(classes).pieces
    assert set(pooled) == {"pooled_text"}
    text = towers(**pooled).text
    torch.testing.assert_close(text, expected, rtol=1e-5, atol=1e-5)
    text.sum().backward()
    assert any(parameter.grad is not None for name, parameter in clip.named_parameters() if "text" in name)


def check_on_a_process():
    rank = Accelerator(cpu=True).process_index
    rows = torch.full((2, 3), float(rank), requires_grad=True)
    gathered = gather_rows(rows)
    assert gathered[:, 0].tolist() == [0.0, 0.0, 1.0, 1.0]
    # Process r weighs row i by 10 ** r * (i + 1); the gradient of a row is the sum over both processes.
    (gathered * 10.0**rank * torch.arange(1.0, 5.0)[:, None]).sum().backward()
    assert rows.grad[:, 0].tolist() == ([11.0, 22.0] if rank == 0 else [33.0, 44.0])


def test_a_row_gets_the_gradients_of_all_processes():
    debug_launcher(check_on_a_process, num_processes=2)


def test_one_process_keeps_its_rows():
    rows = torch.ones(2, 3)
    assert gather_rows(rows) is rows
