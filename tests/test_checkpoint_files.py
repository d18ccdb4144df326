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
