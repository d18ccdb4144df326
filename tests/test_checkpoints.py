"""Checkpoints are complete, whatever happens while they are written."""

import errno
import os

import pytest
import torch

from ballad_hf.training import checkpoints
from ballad_hf.training.checkpoints import (
    CheckpointStore,
    CheckpointTimer,
    optimizer_from_tensors,
    optimizer_to_tensors,
)


def tensors(value):
    return {"weight": torch.full((3,), float(value)), "half": torch.full((2,), value, dtype=torch.bfloat16)}


def test_what_is_saved_is_read_back_bit_for_bit(tmp_path):
    store = CheckpointStore(tmp_path / "made" / "for it")
    path = store.save(7, tensors(0.1), {"best": 0.25, "names": ["a"]})
    checkpoint = store.load(path)
    assert checkpoint.step == 7
    assert checkpoint.state == {"best": 0.25, "names": ["a"]}
    for name, value in tensors(0.1).items():
        assert torch.equal(checkpoint.tensors[name], value)
        assert checkpoint.tensors[name].dtype == value.dtype


def test_the_last_ones_and_the_pinned_one_are_kept(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2, 3, 10, 200):
        store.save(step, tensors(step), {}, pinned=2)
    assert [path.name for path in store.paths()] == ["step-0000000002", "step-0000000010", "step-0000000200"]
    assert store.load_latest().step == 200


def test_tensors_that_share_memory_are_saved(tmp_path):
    whole = torch.arange(6.0)
    store = CheckpointStore(tmp_path)
    store.save(1, {"whole": whole, "part": whole[:3], "turned": whole.view(2, 3).T}, {})
    read = store.load_latest().tensors
    assert torch.equal(read["part"], whole[:3])
    assert torch.equal(read["turned"], whole.view(2, 3).T)


def test_an_unfinished_or_damaged_checkpoint_is_passed_over(tmp_path, caplog):
    store = CheckpointStore(tmp_path)
    store.save(1, tensors(1), {})
    damaged = store.save(2, tensors(2), {})
    (damaged / "tensors.safetensors").write_bytes(b"short")
    (tmp_path / ".step-0000000003.writing").mkdir()
    assert store.load_latest().step == 1
    assert "is damaged" in caplog.text
    with pytest.raises(ValueError, match="is damaged"):
        store.load(damaged)
    with pytest.raises(FileNotFoundError, match="is not a checkpoint"):
        store.load(tmp_path / ".step-0000000003.writing")
    assert CheckpointStore(tmp_path / "nothing").load_latest() is None


def test_a_full_disk_keeps_the_checkpoint_before_and_says_so(tmp_path, monkeypatch, caplog):
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, tensors(1), {})

    def full(tensors, path):
        path.write_bytes(b"a part of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(OSError, match=r"No space left.*Free some space.*last checkpoint, .*step-0000000001, is kept"):
        store.save(2, tensors(2), {})
    assert not store.try_save(2, tensors(2), {})
    assert "Training goes on" in caplog.text
    assert os.listdir(tmp_path) == ["step-0000000001"]
    assert store.load_latest().tensors["weight"][0] == 1


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(OSError, match="choose a folder that can be written to"):
        CheckpointStore(tmp_path / "taken").save(1, tensors(1), {})
    with pytest.raises(ValueError, match="keep is 0"):
        CheckpointStore(tmp_path, keep=0)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_goes_on_as_if_never_stopped(kind):
    options = {"lr": 0.1, "momentum": 0.9} if kind is torch.optim.SGD else {"lr": 0.1}

    def step(model, optimizer, number):
        optimizer.zero_grad()
        inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(number))
        model(inputs).square().mean().backward()
        optimizer.step()

    def start():
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 2)
        return model, kind(model.parameters(), **options)

    model, optimizer = start()
    for number in range(5):
        if number == 3:
            weights = {name: value.clone() for name, value in model.state_dict().items()}
            moments, rest = optimizer_to_tensors(model, optimizer)
        step(model, optimizer, number)
    resumed, its_optimizer = start()
    resumed.load_state_dict(weights)
    optimizer_from_tensors(resumed, its_optimizer, moments, rest)
    for number in (3, 4):
        step(resumed, its_optimizer, number)
    assert torch.equal(model.weight, resumed.weight)
    assert torch.equal(model.bias, resumed.bias)


def test_a_flipped_bit_is_found(tmp_path):
    store = CheckpointStore(tmp_path)
    path = store.save(1, tensors(1), {})
    content = bytearray((path / "tensors.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "tensors.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="checksum"):
        store.load(path)
    assert store.load_latest() is None


def test_a_checkpoint_that_was_renamed_to_another_step_is_refused(tmp_path):
    store = CheckpointStore(tmp_path)
    path = store.save(3, tensors(1), {})
    renamed = path.rename(store.path_of(9))
    with pytest.raises(ValueError, match="is of step 3: rename it to step-0000000003"):
        store.load(renamed)
    assert store.load(renamed.rename(tmp_path / "mine")).step == 3


@pytest.mark.parametrize("content", ["", "{", "[1]", "{}", '{"step": "x", "sha256": "", "state": {}}'])
def test_a_damaged_state_is_named(tmp_path, content):
    store = CheckpointStore(tmp_path)
    path = store.save(1, tensors(1), {})
    (path / "state.json").write_text(content)
    with pytest.raises(ValueError, match=r"step-0000000001 is damaged .*remove it to resume from another one"):
        store.load(path)


def test_the_timer(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now[0])
    timer = CheckpointTimer(every_steps=4, every_minutes=2)
    assert [step for step in range(1, 10) if timer.due_by_steps(step)] == [4, 8]
    now[0] = 219.0
    assert not timer.due_by_clock()
    now[0] = 220.0
    assert timer.due_by_clock()
    timer.restart()
    assert not timer.due_by_clock()
    assert not CheckpointTimer().due_by_steps(1)


def test_a_changed_state_is_refused_as_changed_tensors_are(tmp_path):
    store = CheckpointStore(tmp_path)
    path = store.save(1, tensors(1), {"best": 0.25})
    state = path / "state.json"
    state.write_text(state.read_text().replace("0.25", "0.75"))
    with pytest.raises(ValueError, match=r"checksum of state\.json does not match"):
        store.load(path)
