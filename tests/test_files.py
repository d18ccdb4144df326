import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from ballad_hf.files import (
    StagingFolder,
    check_regular_file,
    check_regular_files,
    explain_full_disk,
    read_json,
    read_text,
    read_yaml,
    remove_leftovers,
    remove_staging_folders,
    replacing_file,
    replacing_folder,
    sha256_of,
    write_json,
    write_text,
    write_yaml,
)


def write_and_fail(replacing, path, error):
    with replacing(path) as temporary:
        (temporary / "half" if temporary.is_dir() else temporary).write_text("half")
        raise error


def test_an_interrupted_write_keeps_the_old_content_and_leaves_nothing(tmp_path):
    path = tmp_path / "notes.txt"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt):
        write_and_fail(replacing_file, path, KeyboardInterrupt())
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_a_full_disk_names_the_file_and_keeps_the_old_one(tmp_path):
    path = tmp_path / "notes.txt"
    write_text(path, "old")
    with pytest.raises(OSError, match=r"notes\.txt: No space left on device.*Free some space") as caught:
        write_and_fail(replacing_file, path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert caught.value.errno == errno.ENOSPC
    assert path.read_text() == "old"


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "deep" / "model"
    for content in ("first", "second"):
        with replacing_folder(path) as folder:
            (folder / f"{content}.txt").write_text(content)
    assert [file.name for file in path.iterdir()] == ["second.txt"]
    with pytest.raises(RuntimeError):
        write_and_fail(replacing_folder, path, RuntimeError())
    assert [file.name for file in path.iterdir()] == ["second.txt"]
    assert list(path.parent.iterdir()) == [path]


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path):
    kept = tmp_path / "kept.writing"
    kept.write_text("not hidden, so not ours")
    with replacing_folder(tmp_path / "model") as folder:
        staging = folder
        (folder / "weights").write_text("")
    staging.mkdir()
    (staging / "half").write_text("")
    (tmp_path / ".metrics.json.writing").write_text("{")
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.writing", "model"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1]", "must hold a mapping, not list"),
        (b"\xff\xfe", "not text in UTF-8"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_damaged_json_is_a_value_error_that_names_the_file(tmp_path, content, message):
    path = tmp_path / "state.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_json(path)
    assert str(path) in str(caught.value)


def test_yaml_may_be_empty_but_not_of_another_type(tmp_path):
    path = tmp_path / "arguments.yaml"
    path.write_text("")
    assert read_yaml(path) == {}
    path.write_text("- a")
    with pytest.raises(ValueError, match="must hold a mapping"):
        read_yaml(path)
    path.write_text("a: [")
    with pytest.raises(ValueError, match="not valid YAML"):
        read_yaml(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: &x [1]\nb: *x\n", "has an alias"),
        ("a: &x [*x]\n", "has an alias"),
        ("a: !!bool x\n", "not valid YAML"),
        ("a: !!binary AAAA\n", "not valid YAML"),
        ("a: " + "1" * 5000 + "\n", "4300 digits"),
        ("[" * 10_000, "not valid YAML"),
    ],
)
def test_yaml_holds_what_json_can_and_unfolds_to_no_more_than_it_says(tmp_path, content, message):
    path = tmp_path / "arguments.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_yaml(path)
    assert str(path) in str(caught.value)


def test_dates_of_yaml_are_text_and_values_that_are_shared_are_written_out(tmp_path):
    path, shared = tmp_path / "arguments.yaml", [1, 2]
    path.write_text("day: 2020-01-31\n")
    assert read_yaml(path) == {"day": "2020-01-31"}
    write_yaml(path, {"a": shared, "b": shared})
    assert read_yaml(path) == {"a": [1, 2], "b": [1, 2]}


def test_a_number_of_too_many_digits_is_no_valid_json(tmp_path):
    path = tmp_path / "state.json"
    path.write_text('{"step": ' + "1" * 5000 + "}")
    with pytest.raises(ValueError, match=r"state\.json is not valid JSON.*4300 digits"):
        read_json(path)


def test_a_folder_with_a_pipe_is_refused(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "nowhere").symlink_to("absent")
    check_regular_files(tmp_path)
    os.mkfifo(tmp_path / "deep" / "data.arrow")
    with pytest.raises(ValueError, match=r"data\.arrow is a pipe"):
        check_regular_files(tmp_path)


def test_sizes_are_checked_before_reading(tmp_path):
    path = tmp_path / "large.json"
    path.write_bytes(b" " * 11)
    with pytest.raises(ValueError, match="11 bytes, more than the 10 allowed"):
        read_text(path, max_bytes=10)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    for read in (check_regular_file, read_json, read_yaml):
        with pytest.raises(ValueError, match="not a regular file"):
            read(pipe)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "absent.json")


def test_nan_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "metrics.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_sha256_of_a_file(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_of(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


_HELD = """
import sys, time
from ballad_hf.files import StagingFolder
folder = StagingFolder(sys.argv[1], ".push-")
(folder.path / "weights").write_bytes(b"1")
print(folder.path, flush=True)
time.sleep(60)
"""


def test_staging_folders_of_killed_processes_are_removed_and_those_of_running_ones_stay(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", _HELD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    held = Path(process.stdout.readline().strip())
    with StagingFolder(tmp_path, ".push-") as own:
        assert held.is_dir()
        remove_staging_folders(tmp_path, ".push-")
        assert own.is_dir()
        process.kill()
        process.communicate()
        (tmp_path / ".push-link").symlink_to(tmp_path)
        with StagingFolder(tmp_path, ".push-"):
            assert not held.exists()
            assert own.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == [".push-link"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError("encoder error -2 when writing image file"),
    ],
)
def test_a_full_disk_in_any_words_is_named_with_the_path(error):
    message = "Could not write out/plots: No space left.*Free some space"
    with pytest.raises(OSError, match=message) as caught, explain_full_disk("out/plots"):
        raise error
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "Permission denied"), ValueError("x"), KeyError(3)])
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as caught, explain_full_disk("out"):
        raise error
    assert caught.value is error
