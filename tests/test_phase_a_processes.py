"""Phase A over real processes, and after real kills: the weights are those of one process that nobody stopped."""

import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch
from accelerate import Accelerator, debug_launcher
from torch.multiprocessing import ProcessExitedException

from ballad_hf import BalladForImageClassification, files, train_phase_a
from ballad_hf.conversion.tiny_clip import build_tiny_clip
from ballad_hf.data.image_dataset import ImageDataset
from ballad_hf.training.arguments import PhaseAArguments
from ballad_hf.training.phase_a import PhaseALoop


pytestmark = pytest.mark.numeric

NAMES = ["red", "green", "blue"]


def noisy(counts, seed):
    labels = np.repeat(np.arange(3), counts)
    pixels = np.random.default_rng(seed).integers(0, 256, (len(labels), 24, 24, 3), dtype=np.uint8)
    return ImageDataset(pixels, labels, NAMES)


def run(folder, file, options, resume=None, accelerator=None):
    """Train, and leave the weights and the history in `file`; for one process or one of several."""
    torch.set_num_threads(1)
    accelerator = accelerator or Accelerator(cpu=True)
    encoder = build_tiny_clip(width=32, layers=1, projection_dim=16, patch_size=16)
    model = BalladForImageClassification.from_dual_encoder(
        encoder.clip, NAMES, encoder.tokenizer, logit_scale=options.pop("logit_scale", None)
    )
    model.set_class_names(NAMES, encoder.tokenizer, descriptions=options.pop("descriptions", None))
    eval_dataset = None if options.pop("without_validation", False) else noisy([2, 2, 1], 1)
    told = PhaseAArguments(**{"epochs": 2, "batch_size": 8, "learning_rate": 1e-2, **options})
    result = train_phase_a(
        model,
        noisy([20, 8, 4], 0),
        encoder,
        told,
        eval_dataset=eval_dataset,
        accelerator=accelerator,
        output_dir=folder,
        resume_from_checkpoint=resume,
        progress=False,
    )
    if accelerator.is_main_process:
        torch.save({"weights": model.state_dict(), "history": result.history, "steps": result.steps}, file)


def launch(processes, *arguments):
    """The real thing: `processes` of them, over gloo; one is a forked process too, which may be killed."""
    if processes > 1:
        debug_launcher(run, args=arguments, num_processes=processes)
        return 0
    process = multiprocessing.get_context("fork").Process(target=run, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def read(file):
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "contrastive"},
        {"loss": "class_prompt"},
        {"loss": "lade"},
        {"loss": "class_prompt", "descriptions": {"green": ["grass", "leaves in spring", "moss"]}},
    ],
    ids=["contrastive", "class_prompt", "lade", "class_prompt-descriptions"],
)
@pytest.mark.parametrize("micro_batch_size", [None, 1])
def test_gradients_are_those_of_one_process(tmp_path, options, micro_batch_size):
    """One plain step at rate 1: the weights move by the gradient."""
    told = {
        **options,
        "learning_rate": 1.0,
        "momentum": 0.0,
        "weight_decay": 0.0,
        "max_steps": 1,
        "logit_scale": 1.0,
        "schedule": "constant",
        "micro_batch_size": micro_batch_size,
        "without_validation": True,
    }
    moved = {}
    for processes in (1, 2, 4) if micro_batch_size is None else (1, 2):
        assert launch(processes, None, tmp_path / f"{processes}", dict(told)) == 0
        moved[processes] = read(tmp_path / f"{processes}")["weights"]
    assert launch(1, None, tmp_path / "start", {**told, "learning_rate": 1e-12}) == 0
    start = read(tmp_path / "start")["weights"]
    gradients = {n: flat(weights) - flat(start) for n, weights in moved.items()}
    assert gradients[1].norm() > 1e-3
    # A gradient is a difference of weights here: right to the rounding of the largest weight, and to that of its sums.
    rounding = torch.finfo(torch.float32).eps * flat(start).abs().max() + 1e-5 * gradients[1].abs().max()
    for processes in moved:
        assert (gradients[processes] - gradients[1]).abs().max() <= 4 * rounding


def flat(weights):
    """All trained weights in one row, in double precision."""
    return torch.cat([value.flatten().double() for name, value in weights.items() if name.startswith("clip.")])


def test_two_processes_choose_the_same_epoch_as_one(tmp_path):
    for processes in (1, 2):
        launch(processes, tmp_path / f"run{processes}", tmp_path / f"{processes}", {"optimizer": "adamw"})
    one, two = read(tmp_path / "1"), read(tmp_path / "2")
    assert [entry["step"] for entry in one["history"]] == [entry["step"] for entry in two["history"]] == [0, 4, 8]
    for mine, theirs in zip(one["history"], two["history"], strict=True):
        assert mine["mean_class"] == pytest.approx(theirs["mean_class"])
        assert mine.get("loss", 0) == pytest.approx(theirs.get("loss", 0), rel=1e-4)


def kill_in_step(step):
    """The process that trains its `step`-th step dies in it, as if the power went."""
    whole = PhaseALoop._train_step

    def dies(self, batch):
        if self.state.step == step and self.accelerator.is_main_process:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, batch)

    PhaseALoop._train_step = dies


def kill_while_writing(nth):
    """The process dies in the `nth` sync of a checkpoint's files: half of it is written."""
    whole, count = files._sync, [0]

    def dies(path):
        count[0] += 1
        if count[0] == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        whole(path)

    files._sync = dies


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adamw", "checkpoint_every_steps": 3, "ema_decay": 0.9},
        {"optimizer": "sgd", "lora_rank": 2, "micro_batch_size": 2, "lora_dropout": 0.5},
    ],
    ids=["adamw-ema", "sgd-lora-dropout"],
)
def test_killed_and_resumed_is_bit_for_bit_what_never_stopped(tmp_path, processes, options, monkeypatch):
    options = {"epochs": 3, **options}
    launch(processes, tmp_path / "whole", tmp_path / "expected", dict(options))
    expected = read(tmp_path / "expected")
    kills = [
        (kill_in_step, 2),
        (kill_while_writing, 6),
        (kill_in_step, 7),
        (kill_while_writing, 3),
        (kill_in_step, 10),
    ]
    arguments = (tmp_path / "run", tmp_path / "result", dict(options), True)
    for how, where in kills if processes == 1 else kills[1::2]:
        monkeypatch.setattr(PhaseALoop, "_train_step", PhaseALoop._train_step)  # puts the whole one back afterwards
        monkeypatch.setattr(files, "_sync", files._sync)
        how(where)
        if processes == 1:
            assert launch(1, *arguments) == -signal.SIGKILL
        else:
            with pytest.raises(ProcessExitedException):
                launch(2, *arguments)
        monkeypatch.undo()
        assert not (tmp_path / "result").exists()
    launch(processes, *arguments)
    found = read(tmp_path / "result")
    assert found["history"] == expected["history"]
    assert found["steps"] == expected["steps"] == 12
    assert all(torch.equal(found["weights"][name], value) for name, value in expected["weights"].items())
    (tmp_path / "result").unlink()
    launch(processes, *arguments)  # a finished run is read back
    again = read(tmp_path / "result")
    assert all(torch.equal(again["weights"][name], value) for name, value in expected["weights"].items())


def stop_politely(number, step):
    whole = PhaseALoop._train_step

    def signalled(self, batch):
        if self.state.step == step:
            os.kill(os.getpid(), number)
        return whole(self, batch)

    PhaseALoop._train_step = signalled


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves_with_its_status(tmp_path, number, monkeypatch, capfd):
    launch(1, tmp_path / "whole", tmp_path / "expected", {})
    monkeypatch.setattr(PhaseALoop, "_train_step", PhaseALoop._train_step)
    stop_politely(number, 5)
    assert launch(1, tmp_path / "run", tmp_path / "result", {}) == 128 + number
    monkeypatch.undo()
    assert max(path.name for path in (tmp_path / "run" / "phase_a").iterdir()) in (
        "step-0000000006",
        "step-0000000007",
    )
    launch(1, tmp_path / "run", tmp_path / "result", {}, True)
    found, expected = read(tmp_path / "result"), read(tmp_path / "expected")
    assert all(torch.equal(found["weights"][name], value) for name, value in expected["weights"].items())


def test_another_runs_checkpoint_is_refused(tmp_path):
    run(tmp_path / "run", tmp_path / "result", {"epochs": 1})
    with pytest.raises(ValueError, match=r"belongs to another run: learning_rate was 0.01 and is 0.5. Use the same"):
        run(tmp_path / "run", tmp_path / "result", {"epochs": 1, "learning_rate": 0.5}, True)
    with pytest.raises(ValueError, match="belongs to another run: class prompts was"):
        run(tmp_path / "run", tmp_path / "result", {"epochs": 1, "descriptions": {"red": ["blood"]}}, True)
    with pytest.raises(FileNotFoundError, match="is not a checkpoint"):
        run(tmp_path / "run", tmp_path / "result", {"epochs": 1}, tmp_path / "nothing")
