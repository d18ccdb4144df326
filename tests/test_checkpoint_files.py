"""What is read, what is refused, and that nothing in a file is run."""

import io
import pickle
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save as save_safetensors
from torch import nn

from ballad_hf.conversion.checkpoint_files import read_checkpoint

from .reference import openai_file


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(6.0).reshape(2, 3))
        self.offset = nn.Parameter(torch.arange(4.0).half())

    def forward(self, x):
        return x @ self.weight + self.offset[:3]


class Outer(nn.Module):
    """Parameters, buffers of several dtypes, a view of a longer storage, an empty tensor, a submodule."""

    def __init__(self):
        super().__init__()
        self.inner = Inner()
        self.shared = nn.Parameter(self.inner.weight.detach().T)
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("empty", torch.empty(0, 4))
        self.register_buffer("later", torch.arange(10, dtype=torch.float64)[4:8])
        self.names = ["a", "b"]

    def forward(self, x):
        return self.inner(x) + self.count


def torchscript(module: nn.Module) -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(module), buffer)
    return buffer.getvalue()


def torch_saved(content, **kwargs) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **kwargs)
    return buffer.getvalue()


STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3), "c": torch.ones(5, dtype=torch.bfloat16)}
FORMATS = {
    "safetensors": (".safetensors", lambda: save_safetensors(STATE)),
    "torch.save": (".pt", lambda: torch_saved(STATE)),
    "old torch.save": (".pth", lambda: torch_saved(STATE, _use_new_zipfile_serialization=False)),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_tensors(name, tmp_path):
    suffix, write = FORMATS[name]
    file = tmp_path / f"weights{suffix}"
    file.write_bytes(write())
    state = read_checkpoint(file)
    assert state.keys() == STATE.keys()
    assert all(torch.equal(state[key], value) and state[key].dtype == value.dtype for key, value in STATE.items())


def test_a_torchscript_archive_is_its_modules_state_dict(tmp_path):
    module = Outer()
    file = tmp_path / "archive.pt"
    file.write_bytes(torchscript(module))
    state = read_checkpoint(file)
    expected = module.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert state[name].dtype == value.dtype
        assert torch.equal(state[name], value), name
    assert torch.equal(state["later"], torch.tensor([4.0, 5.0, 6.0, 7.0], dtype=torch.float64))


def test_a_traced_module_reads_like_a_scripted_one(tmp_path):
    module = Inner()
    file = tmp_path / "archive.pt"
    torch.jit.save(torch.jit.trace(module, torch.zeros(1, 2)), file)
    assert torch.equal(read_checkpoint(file)["weight"], module.weight)


class Touches:
    """A pickle of it creates a file when it is loaded without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_something_is_refused_unrun(tmp_path, zipped):
    trace, file = tmp_path / "was-here", tmp_path / "weights.pt"
    file.write_bytes(torch_saved({"w": Touches(trace)}, _use_new_zipfile_serialization=zipped))
    with pytest.raises(ValueError, match="more than tensors and plain values") as refused:
        read_checkpoint(file)
    assert "weights_only" not in str(refused.value)  # torch's advice is to run the file
    assert "open" in str(refused.value)
    assert not trace.exists()


def with_pickle(archive: bytes, data: bytes) -> bytes:
    """The same archive with another data.pkl."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(buffer, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, data if entry.filename.endswith("/data.pkl") else old.read(entry))
    return buffer.getvalue()


def test_a_torchscript_archive_that_would_run_something_is_refused_unrun(tmp_path):
    trace, file = tmp_path / "was-here", tmp_path / "archive.pt"
    file.write_bytes(with_pickle(torchscript(Inner()), pickle.dumps(Touches(trace), protocol=2)))
    with pytest.raises(ValueError, match=r"the file names .*\.open"):
        read_checkpoint(file)
    assert not trace.exists()


def test_the_code_in_a_torchscript_archive_is_not_run(tmp_path):
    class Careless(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, x):
            return x

        @torch.jit.export
        def __getstate__(self):
            return self.weight, self.training

        @torch.jit.export
        def __setstate__(self, state: tuple[torch.Tensor, bool]):
            self.weight = state[0]
            self.training = state[1]
            raise RuntimeError("the archive's code ran")

    file = tmp_path / "archive.pt"
    file.write_bytes(torchscript(Careless()))
    assert read_checkpoint(file) == {}  # its tensors are not where a module keeps them


def test_a_storage_of_another_length_is_named(tmp_path):
    archive = torchscript(Inner())
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(buffer, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            new.writestr(entry.filename, content[:-4] if "/data/" in entry.filename else content)
    file = tmp_path / "archive.pt"
    file.write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="truncated"):
        read_checkpoint(file)


def zipped(members: dict[str, bytes], compressed: tuple[str, ...] = ()) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            how = zipfile.ZIP_DEFLATED if name in compressed else zipfile.ZIP_STORED
            archive.writestr(f"archive/{name}", content, how)
    return buffer.getvalue()


def state_pickle(length: int, size: tuple[int, ...], stride: tuple[int, ...], storages: int = 1) -> bytes:
    """A pickled state dict whose tensors claim these sizes, in the words of `torch.save`."""
    code = b"\x80\x02}q\x00("
    for place in range(storages):
        code += b"X\x01\x00\x00\x00" + bytes([97 + place]) + b"ctorch._utils\n_rebuild_tensor_v2\n(("
        code += b"X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x00" + bytes([48 + place])
        code += b"X\x03\x00\x00\x00cpuI%d\ntQI0\n(" % length + b"".join(b"I%d\n" % side for side in size) + b"t("
        code += b"".join(b"I%d\n" % step for step in stride) + b"tI00\nNtR"
    return code + b"u."


GIGABYTES = 34 * 10**9 // 4
BOMBS = {
    "a compressed pickle": (
        zipped({"data.pkl": b"\x80\x02" + b"]" * 3_000_000 + b".", "version": b"3"}, compressed=("data.pkl",)),
        r"data\.pkl in it unfolds to 3,000,003 bytes",
    ),
    "a storage that is not there": (
        zipped({"data.pkl": state_pickle(GIGABYTES, (2,), (1,)), "data/0": bytes(8)}),
        "its storages promise 34,000,000,000 bytes",
    ),
    "a compressed storage": (
        zipped(
            {"data.pkl": state_pickle(100, (100,), (1,)), "data/0": bytes(400), "version": bytes(99)},
            compressed=("data/0",),
        ),
        "Storage 0 has 400 bytes",
    ),
    "strides of zero": (
        zipped({"data.pkl": state_pickle(1, (GIGABYTES,), (0,)), "data/0": bytes(4)}),
        "its tensors promise 34,000,000,000 bytes",
    ),
    "a memo of gigabytes": (
        zipped({"data.pkl": b"\x80\x02}r\xff\xff\xff\x7f."}),
        "numbers an object 2,147,483,647",
    ),
    "an old file without its storage": (
        torch_saved({"w": torch.zeros(4)}, _use_new_zipfile_serialization=False).replace(
            b"K\x04", b"J" + GIGABYTES.to_bytes(8, "little")[:4]
        ),
        "truncated",
    ),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_file_that_promises_more_than_it_has_is_refused_before_anything_is_allocated(bomb, tmp_path, monkeypatch):
    content, message = BOMBS[bomb]
    file = tmp_path / "bomb.pt"
    file.write_bytes(content)
    monkeypatch.setattr(torch, "frombuffer", None)  # a call would be a TypeError
    with pytest.raises(ValueError, match=message) as refused:
        read_checkpoint(file)
    assert "bomb.pt" in str(refused.value)
    assert f"{len(content):,} bytes on disk" in str(refused.value)


def test_a_safetensors_header_that_promises_more_than_the_file_is_refused(tmp_path):
    file = tmp_path / "bomb.safetensors"
    header = b'{"w":{"dtype":"F32","shape":[500000000],"data_offsets":[0,2000000000]}}'
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    size, promised = 8 + len(header) + 16, 2_000_000_000 + 8 + len(header)
    with pytest.raises(ValueError, match=f"has {size} bytes on disk, but its header promises {promised:,} bytes"):
        read_checkpoint(file)


def test_a_function_of_the_reader_can_not_be_changed_by_a_pickle(tmp_path):
    file = tmp_path / "changes.pt"
    file.write_bytes(zipped({"data.pkl": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb."}))
    with pytest.raises(ValueError, match="changes a function"):
        read_checkpoint(file)


def test_tied_weights_are_read(tmp_path):
    file, weight = tmp_path / "tied.pt", torch.arange(6.0).reshape(2, 3)
    torch.save({"in": weight, "out": weight, "row": weight[1]}, file)
    state = read_checkpoint(file)
    assert torch.equal(state["in"], weight)
    assert torch.equal(state["out"], weight)
    assert torch.equal(state["row"], weight[1])


def test_what_training_code_keeps_beside_the_weights_is_read(tmp_path):
    module = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    module(torch.ones(2)).sum().backward()
    optimizer.step()
    for number, zipped_file in enumerate((True, False)):
        file = tmp_path / f"{number}.pt"
        content = {
            "epoch": 3,
            "state_dict": module.state_dict(),
            "optimizer": optimizer.state_dict(),
            "p": module.bias,
        }
        torch.save(content, file, _use_new_zipfile_serialization=zipped_file)
        read = read_checkpoint(file)
        assert read["epoch"] == 3
        assert torch.equal(read["state_dict"]["weight"], module.weight)
        assert torch.equal(
            read["optimizer"]["state"][0]["momentum_buffer"], optimizer.state[module.weight]["momentum_buffer"]
        )
        assert torch.equal(read["p"], module.bias)


_TRUNCATED = {name: (suffix, write()) for name, (suffix, write) in FORMATS.items()}
_TRUNCATED["TorchScript"] = (".pt", torchscript(Inner()))


@pytest.mark.parametrize("name", _TRUNCATED)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_file_cut_anywhere_is_a_value_error_that_names_it(name, data, tmp_path_factory):
    suffix, content = _TRUNCATED[name]
    file = tmp_path_factory.mktemp("cut") / f"weights{suffix}"
    file.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(ValueError, match="weights"):
        read_checkpoint(file)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_value_error(tmp_path_factory, content):
    file = tmp_path_factory.mktemp("bytes") / "weights.pt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="weights"):
        read_checkpoint(file)


def test_a_real_archive_cut_in_half_is_a_value_error(tmp_path):
    file = tmp_path / "cut.pt"
    content = openai_file("vit").read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cut.pt is no checkpoint"):
        read_checkpoint(file)


def test_other_files_say_what_they_are(tmp_path):
    pointer = tmp_path / "model.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        read_checkpoint(pointer)
    listed = tmp_path / "list.pt"
    torch.save([torch.ones(2)], listed)
    with pytest.raises(ValueError, match="holds a list, not a dict"):
        read_checkpoint(listed)
    with pytest.raises(FileNotFoundError, match="nowhere.pt"):
        read_checkpoint(tmp_path / "nowhere.pt")
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path)
