"""Pushing a model and loading it back: the real client in processes of its own, against a stand-in for the Hub."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ballad_hf.hub.model_directory import LAYOUT, save_model_directory
from ballad_hf.hub.push import CheckpointPusher, check_repo_id, push_model_directory, without_local_paths
from tests.hub_server import READ_TOKEN, HubClient, HubServer


@pytest.fixture(scope="module")
def _hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def client(_hub, tmp_path_factory):
    preload = "import torch, huggingface_hub, transformers.pipelines; import ballad_hf.hub.push"
    client = HubClient(_hub, tmp_path_factory.mktemp("home"), preload)
    yield client
    client.close()


@pytest.fixture
def hub(_hub):
    _hub.reset()
    return _hub


@pytest.fixture
def saved(tiny_ballad, tiny_processor, tmp_path) -> Path:
    card = "---\nlibrary_name: transformers\n---\n# A card"
    folder = save_model_directory(tiny_ballad, tmp_path / "saved", tiny_processor, card=card, arguments={"seed": 3})
    (folder / "metrics.json").write_text("{}\n")
    (folder / "arguments.yaml").write_text("seed: 3\n")
    (folder / "predictions").mkdir()
    (folder / "predictions" / "phase_B.safetensors").write_bytes(b"predictions")
    (folder / "checkpoints" / "step-1").mkdir(parents=True)
    (folder / "checkpoints" / "step-1" / "tensors.safetensors").write_bytes(b"not for everybody")
    (folder / "secret.txt").write_text("not for everybody")
    return folder


PUSH = """
import sys
from ballad_hf.commands.cli import main
main(["push", *sys.argv[1:]])
"""


def test_a_model_directory_is_pushed_and_nothing_else_and_the_card_comes_last(hub, client, saved):
    done = client(PUSH, saved, "someone/digits", "--private")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"Pushed to {hub.url}/someone/digits\n"
    repository = hub.repositories["someone/digits"]
    assert repository.private
    first, files, card = repository.commits
    assert LAYOUT.card not in files.files
    assert set(card.files) - set(files.files) == {LAYOUT.card}
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    names |= {"preprocessor_config.json", "processor_config.json"}
    documents = {
        "README.md",
        "metrics.json",
        "training_arguments.json",
        "arguments.yaml",
        "predictions/phase_B.safetensors",
    }
    assert set(card.files) - set(first.files) == names | documents
    for name in names | documents:
        content = (saved / name).read_bytes()
        same = json.loads if name == "config.json" else bytes
        assert same(card.files[name]) == same(content), name


def test_paths_of_the_users_disk_do_not_go_up(hub, client, saved):
    kept = "dataset: /home/me/birds\n"
    (saved / "arguments.yaml").write_text(kept)
    config = json.loads((saved / "config.json").read_text())
    config["clip_config"]["_name_or_path"] = "/home/me/clip"
    (saved / "config.json").write_text(json.dumps(config))
    assert client(PUSH, saved, "someone/digits").returncode == 0
    files = hub.repositories["someone/digits"].commits[-1].files
    assert files["arguments.yaml"] == b"dataset: birds\n"
    assert json.loads(files["config.json"])["clip_config"]["_name_or_path"] == "clip"
    assert (saved / "arguments.yaml").read_text() == kept


LOAD = """
import json, sys
import torch
import ballad_hf
from ballad_hf import BalladForImageClassification
from safetensors.torch import save_file
from transformers import pipeline
model = BalladForImageClassification.from_pretrained("someone/digits")
save_file({name: value.contiguous() for name, value in model.state_dict().items()}, sys.argv[2])
own = pipeline("image-classification", model="someone/digits")(sys.argv[1])
typed = pipeline("zero-shot-image-classification", model="someone/digits")(
    sys.argv[1], candidate_labels=["cat", "a bus"], hypothesis_template="a photo of a {}."
)
ratio = BalladForImageClassification.from_pretrained("someone/digits", revision=sys.argv[3]).config.adapter_ratio
print(json.dumps([own, typed, ratio]))
"""


def test_what_was_pushed_loads_bit_equal_also_by_revision_and_in_both_pipelines(
    hub, client, saved, tiny_ballad, tiny_clip, tmp_path, tiny_processor
):
    from safetensors.torch import load_file

    assert client(PUSH, saved, "someone/digits").returncode == 0
    first_revision = hub.repositories["someone/digits"].branches["main"]
    tiny_ballad.config.adapter_ratio = 0.75
    save_model_directory(tiny_ballad, saved, tiny_processor, overwrite=True)
    assert client(PUSH, saved, "digits").returncode == 0  # a bare name is one of the user's own
    image = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(image)
    done = client(LOAD, image, tmp_path / "state.safetensors", first_revision, token=None)
    assert done.returncode == 0, done.stderr
    own, typed, ratio = json.loads(done.stdout)
    assert ratio == 0.2
    loaded = load_file(tmp_path / "state.safetensors")
    state = tiny_ballad.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    pixel_values = tiny_clip.image_processor(Image.open(image), return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = tiny_ballad(pixel_values).logits[0].softmax(-1).tolist()
    scores = {row["label"]: row["score"] for row in own}
    assert scores == pytest.approx(dict(zip(tiny_ballad.config.class_names, expected, strict=True)), abs=1e-5)
    assert {row["label"] for row in typed} == {"cat", "a bus"}


LOAD_WITHOUT_BALLAD = """
import json, sys
import torch
import yaml
from PIL import Image
from transformers import (
    AutoConfig, AutoImageProcessor, AutoModelForImageClassification, AutoModelForZeroShotImageClassification,
    AutoTokenizer, pipeline,
)
name, image = "someone/digits", sys.argv[1]
labels = ["cat", "a bus"]
trusted = {"trust_remote_code": True}
pixels = AutoImageProcessor.from_pretrained(name, **trusted)(Image.open(image), return_tensors="pt")
tokenizer = AutoTokenizer.from_pretrained(name, **trusted)
texts = tokenizer([f"a photo of a {label}." for label in labels], padding=True, return_tensors="pt")
answers = {"config": AutoConfig.from_pretrained(name, **trusted).class_names}
with torch.no_grad():
    model = AutoModelForImageClassification.from_pretrained(name, **trusted).eval()
    answers["stored"] = model(**pixels).logits[0].tolist()
    model = AutoModelForZeroShotImageClassification.from_pretrained(name, **trusted).eval()
    answers["typed"] = model(**pixels, **texts).logits_per_image[0].tolist()
answers["own pipeline"] = pipeline("image-classification", model=name, **trusted)(image)
answers["typed pipeline"] = pipeline("zero-shot-image-classification", model=name, **trusted)(
    image, candidate_labels=labels, hypothesis_template="a photo of a {}."
)
model.set_class_names(["owl", "bus", "zebra"], tokenizer)
answers["renamed"] = [model.config.id2label[index] for index in range(3)]
assert sys.modules["ballad_hf"] is None and not any(module.startswith("ballad_hf.") for module in sys.modules)
answers["code"] = type(model).__module__.split(".")[0]
print(json.dumps(answers))
"""


@pytest.mark.slow
def test_what_was_pushed_with_its_code_answers_the_same_where_ballad_can_not_be_imported(
    hub, client, saved, tiny_ballad, tiny_clip, tmp_path
):
    assert client(PUSH, saved, "someone/digits", "--with_code").returncode == 0
    image = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(image)
    preload = "import torch, transformers.pipelines"
    stranger = HubClient(hub, tmp_path / "home", preload, blocked=("ballad_hf",))
    try:
        refused = stranger(
            LOAD_WITHOUT_BALLAD.replace('"trust_remote_code": True', '"trust_remote_code": False'), image
        )
        done = stranger(LOAD_WITHOUT_BALLAD, image, token=None)
    finally:
        stranger.close()
    assert "trust_remote_code" in refused.stderr  # no code runs that was not asked for
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert answers["code"] == "transformers_modules"
    assert answers["config"] == tiny_ballad.config.class_names
    assert answers["renamed"] == ["owl", "bus", "zebra"]
    pixel_values = tiny_clip.image_processor(Image.open(image), return_tensors="pt").pixel_values
    labels = ["cat", "a bus"]
    texts = tiny_clip.tokenizer([f"a photo of a {label}." for label in labels], padding=True, return_tensors="pt")
    with torch.no_grad():
        stored = tiny_ballad(pixel_values).logits[0]
        typed = tiny_ballad(pixel_values, **texts).logits_per_image[0]
    assert answers["stored"] == pytest.approx(stored.tolist(), abs=1e-5)
    assert answers["typed"] == pytest.approx(typed.tolist(), abs=1e-5)
    for kind, names, logits in (("own", tiny_ballad.config.class_names, stored), ("typed", labels, typed)):
        scores = {row["label"]: row["score"] for row in answers[f"{kind} pipeline"]}
        assert scores == pytest.approx(dict(zip(names, logits.softmax(-1).tolist(), strict=True)), abs=1e-5)


def test_a_second_push_writes_what_changed_and_clears_old_weights(hub, client, saved):
    assert client(PUSH, saved, "digits", "--with_code").returncode == 0
    repository = hub.repositories["someone/digits"]
    repository.commit("by hand", {**repository.at("main").files, "model-00001-of-00002.safetensors": b"old"}, "main")
    repository.commit("by hand", {**repository.at("main").files, "notes.py": b"# mine"}, "main")
    assert client(PUSH, saved, "digits").returncode == 0
    files = repository.at("main").files
    assert "model-00001-of-00002.safetensors" not in files
    assert "modeling_ballad.py" not in files
    assert "auto_map" not in json.loads(files["config.json"])
    assert files["notes.py"] == b"# mine"
    commits = len(repository.commits)
    assert client(PUSH, saved, "digits").returncode == 0
    assert len(repository.commits) == commits  # nothing changed, nothing written


@pytest.mark.parametrize(
    ("request_", "how", "message"),
    [
        ("POST /api/repos/create", 401, "hf auth login"),
        ("POST /api/models/.*/commit", 404, "no such repository or branch"),
        ("POST /api/models/.*/commit", 409, "someone else is writing"),
        ("POST /api/models/.*/commit", 500, "try again later"),
        ("POST /api/repos/create", "drop", "was not reached"),
        ("POST /api/models/.*/commit", "drop", "was not reached"),
    ],
)
def test_a_hub_that_fails_costs_nothing_and_the_message_says_how_to_go_on(hub, client, saved, request_, how, message):
    before = {file: file.read_bytes() for file in saved.rglob("*") if file.is_file()}
    hub.fail(request_, how, times=20)
    done = client(PUSH, saved, "someone/digits", "--private")
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert f"ballad push {saved} someone/digits --private" in done.stderr
    assert {file: file.read_bytes() for file in saved.rglob("*") if file.is_file()} == before


IMPATIENT = "import time; time.sleep = lambda seconds: None" + PUSH


def test_the_command_of_the_message_works_once_the_hub_does(hub, client, saved):
    hub.fail("PUT /lfs", "drop", times=1000)
    done = client(IMPATIENT, saved, "someone/digits", "--with_code")
    assert done.returncode == 1
    command = done.stderr.strip().splitlines()[-1].split()
    hub.forgive()
    assert command[:2] == ["ballad", "push"]
    done = client(PUSH, *command[2:])
    assert done.returncode == 0, done.stderr
    assert "modeling_ballad.py" in hub.repositories["someone/digits"].at("main").files


def test_a_connection_that_drops_once_is_tried_again(hub, client, saved):
    hub.fail("PUT /lfs", "drop")
    assert client(IMPATIENT, saved, "someone/digits").returncode == 0
    uploads = [path for method, path in hub.requests if method == "PUT"]
    assert len(uploads) == len(set(uploads)) + 1
    assert "model.safetensors" in hub.repositories["someone/digits"].at("main").files


def test_no_token_no_rights_no_network(hub, client, saved):
    nobody = client(PUSH, saved, "someone/digits", token=None)
    assert "hf auth login" in nobody.stderr
    reader = client(PUSH, saved, "someone/digits", token=READ_TOKEN)
    assert "has no write access there" in reader.stderr
    offline = client(f"import huggingface_hub.constants as c; c.HF_HUB_OFFLINE = True{PUSH}", saved, "someone/digits")
    assert "unset HF_HUB_OFFLINE" in offline.stderr
    assert not hub.repositories
    check = "from ballad_hf.hub.push import check_push; print(check_push('someone/digits'))"
    assert client(check).stdout == "someone\n"
    assert "hf auth login" in client(check, token="hf_wrong").stderr


def test_what_was_to_be_private_never_goes_into_a_public_repository(hub, client, saved):
    assert client(PUSH, saved, "someone/digits").returncode == 0
    commits = len(hub.repositories["someone/digits"].commits)
    (saved / "metrics.json").write_text("{}")
    refused = client(PUSH, saved, "someone/digits", "--private")
    assert refused.returncode == 1
    assert "someone/digits is public, but a private repository was requested" in refused.stderr
    assert len(hub.repositories["someone/digits"].commits) == commits


BRANCH = """
import sys
from huggingface_hub import HfApi
from ballad_hf import push_model_directory
push_model_directory(sys.argv[1], "someone/digits")
HfApi().create_branch("someone/digits", branch="trial")
push_model_directory(sys.argv[1], "someone/digits", revision="trial", with_code=True)
"""


def test_a_branch_can_be_pushed_to(hub, client, saved):
    done = client(BRANCH, saved)
    assert done.returncode == 0, done.stderr
    repository = hub.repositories["someone/digits"]
    assert "modeling_ballad.py" in repository.at("trial").files
    assert "modeling_ballad.py" not in repository.at("main").files
    missing = client(PUSH, saved, "someone/digits", "--revision", "no-such-branch")
    assert "create the branch first" in missing.stderr


CHECKPOINTS = """
import shutil, sys
from pathlib import Path
from ballad_hf.hub.push import CheckpointPusher
folder = Path(sys.argv[1])
with CheckpointPusher("someone/digits", private=True) as pusher:
    for step in range(1, 4):
        checkpoint = folder / f"step-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "tensors.safetensors").write_bytes(b"weights of %d" % step)
        (checkpoint / f"only-{step}.json").write_text("{}")
        pusher.submit(checkpoint)
        shutil.rmtree(checkpoint)
print(sorted(path.name for path in folder.iterdir()))
"""


def test_checkpoints_go_up_in_the_background_and_the_last_one_stays(hub, client, tmp_path):
    done = client(CHECKPOINTS, tmp_path / "checkpoints")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"  # nothing held back is left
    files = hub.repositories["someone/digits"].at("main").files
    assert files["last-checkpoint/tensors.safetensors"] == b"weights of 3"
    assert {name for name in files if "only" in name} == {"last-checkpoint/only-3.json"}


def test_a_checkpoint_that_can_not_go_up_is_a_warning(hub, client, tmp_path):
    hub.fail("POST /api/repos/create", 500, times=100)
    done = client(CHECKPOINTS, tmp_path / "checkpoints")
    assert done.returncode == 0
    assert "A checkpoint was not pushed to someone/digits" in done.stderr
    assert "Training continues" in done.stderr


@pytest.mark.parametrize("name", ["", "a/b/c", "with space", "-starts/wrong", "a--b"])
def test_a_name_that_can_be_none_is_refused_before_anything_else(name, saved):
    with pytest.raises(ValueError, match="is not a valid repository name"):
        push_model_directory(saved, name)
    with pytest.raises(ValueError, match="is not a valid repository name"):
        CheckpointPusher(name)
    check_repo_id("someone/digits")


@pytest.mark.parametrize("status", [400, 401, 403, 404, 429, 500, 503])
def test_an_upload_that_is_refused_was_reached(hub, client, saved, status):
    """The client hides the answer to a PUT behind a bare RuntimeError."""
    hub.fail("PUT /lfs", status, times=1000)
    done = client(IMPATIENT, saved, "someone/digits")
    assert done.returncode == 1
    assert "was not reached" not in done.stderr
    expected = {401: "hf auth login", 403: "no write access", 404: "no such repository"}
    assert expected.get(status, f"status {status}") in done.stderr


IN_A_HURRY = "import ballad_hf.hub.push as push; push.HUB_TIMEOUT = 0.2\n" + IMPATIENT


@pytest.mark.parametrize("request_", ["POST /api/repos/create", "PUT /lfs", "POST /api/models/.*/commit"])
def test_a_hub_that_never_answers_ends_in_a_time_out(hub, client, saved, request_):
    hub.fail(request_, "hang", times=1000)
    done = client(IN_A_HURRY, saved, "someone/digits")
    assert done.returncode == 1
    assert "did not answer within 0.2 s" in done.stderr
    assert "to push it later" in done.stderr


@pytest.mark.parametrize("name", ["model.safetensors", "plots/cat.png", "per_class.csv"])
def test_links_are_never_followed(saved, tmp_path, name):
    secret = tmp_path / "secret"
    secret.write_bytes((saved / name).read_bytes() if (saved / name).exists() else b"not for everybody")
    (saved / name).unlink(missing_ok=True)
    (saved / name).parent.mkdir(exist_ok=True)
    (saved / name).symlink_to(secret)
    with pytest.raises(ValueError, match=rf"{name} is a link.*cp -rL"):
        push_model_directory(saved, "someone/digits")


def test_a_folder_behind_a_link_is_refused_too(saved, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.png").write_bytes(b"not for everybody")
    (saved / "plots").symlink_to(tmp_path / "photos")
    with pytest.raises(ValueError, match=r"plots/me.png .*link"):
        push_model_directory(saved, "someone/digits")


CHECKPOINT_WITH_LINKS = """
import sys
from pathlib import Path
from ballad_hf.hub.push import CheckpointPusher
folder = Path(sys.argv[1])
checkpoint = folder / "step-1"
checkpoint.mkdir(parents=True)
(checkpoint / "state.json").write_text("{}")
(folder / "secret").mkdir()
(folder / "secret" / "key").write_text("not for everybody")
(checkpoint / "key").symlink_to(folder / "secret" / "key")
(checkpoint / "more").symlink_to(folder / "secret")
(folder / ".push-killed").mkdir()
(folder / ".push-killed" / "tensors.safetensors").write_bytes(b"of a killed run")
with CheckpointPusher("someone/digits") as pusher:
    pusher.submit(checkpoint)
print(sorted(path.name for path in folder.iterdir()))
"""


def test_checkpoints_go_up_without_their_links_and_leftovers_are_removed(hub, client, tmp_path):
    done = client(CHECKPOINT_WITH_LINKS, tmp_path / "checkpoints")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['secret', 'step-1']\n"
    files = hub.repositories["someone/digits"].at("main").files
    assert {name for name in files if name.startswith("last-checkpoint/")} == {"last-checkpoint/state.json"}


ARGUMENTS = {
    "dataset": "/home/me/birds & co",
    "image_root": "~/images",
    "output_dir": "/home/me/birds & co/outputs/mine",
    "model_name_or_path": "openai/clip-vit-base-patch16",
    "templates": ["a photo of a {}."],
    "seed": 3,
}


def test_local_paths_are_cut_in_every_file_that_shows_them(tmp_path):
    (tmp_path / "arguments.yaml").write_text(yaml.safe_dump(ARGUMENTS))
    record = {"arguments": {**ARGUMENTS, "paths": ["/srv/cache"]}, "seed": 3}
    (tmp_path / "training_arguments.json").write_text(json.dumps(record))
    report = "<pre>dataset: /home/me/birds &amp; co\n/home/me/birds &amp; co/outputs/mine\n/srv/cache</pre>"
    (tmp_path / "report.html").write_text(report)
    public = without_local_paths(tmp_path)
    expected = {**ARGUMENTS, "dataset": "birds & co", "image_root": "images", "output_dir": "mine"}
    assert yaml.safe_load(public["arguments.yaml"]) == expected
    assert json.loads(public["training_arguments.json"])["arguments"] == {**expected, "paths": ["cache"]}
    assert public["report.html"].decode() == "<pre>dataset: birds &amp; co\nmine\ncache</pre>"
    assert (tmp_path / "report.html").read_text() == report


def test_what_names_no_path_goes_up_as_it_is(tmp_path):
    assert without_local_paths(tmp_path) == {}
    (tmp_path / "arguments.yaml").write_text("dataset: someone/birds\noutput_dir: outputs/mine\n")
    (tmp_path / "report.html").write_text("<p>/usr/share</p>")
    assert without_local_paths(tmp_path) == {}


def test_damaged_arguments_are_named(tmp_path):
    (tmp_path / "training_arguments.json").write_text("{")
    with pytest.raises(ValueError, match="The arguments of the run in .* can't be read"):
        without_local_paths(tmp_path)


@pytest.mark.parametrize(
    ("argument", "value", "expected"),
    [
        ("dataset", "../home_of_alice/birds", "birds"),
        ("dataset", "data/../../alice/birds/", "birds"),
        ("dataset", "./alice/birds", "birds"),
        ("dataset", "home/alice/birds", "birds"),
        ("image_root", r"C:\Users\alice\birds", "birds"),
        ("image_root", r"..\alice\birds", "birds"),
        ("dataset", "file:///home/alice/birds", "birds"),
        ("dataset", "someone/birds", "someone/birds"),
        ("model_name_or_path", "openai/clip-vit-base-patch16", "openai/clip-vit-base-patch16"),
        ("templates", ["a photo/drawing/sketch of a {}."], ["a photo/drawing/sketch of a {}."]),
        ("dataset", "digits", "digits"),
    ],
)
def test_relative_paths_are_cut_and_hub_names_are_not(tmp_path, argument, value, expected):
    (tmp_path / "arguments.yaml").write_text(yaml.safe_dump({argument: value, "output_dir": "/home/alice/out"}))
    assert yaml.safe_load(without_local_paths(tmp_path)["arguments.yaml"]) == {argument: expected, "output_dir": "out"}


def test_the_files_of_the_mistakes_lose_their_folder(tmp_path):
    files = ["/home/alice/birds/test/owl & co/1.png", "/home/alice/birds/test/tit/2.png"]
    (tmp_path / "mistakes.csv").write_text("file,split\n" + "".join(f"{file},test\n" for file in files))
    (tmp_path / "report.html").write_text(f"<td>{files[0].replace('&', '&amp;')}</td><td>{files[1]}</td>")
    public = without_local_paths(tmp_path)
    rows = csv.DictReader(public["mistakes.csv"].decode().splitlines())
    assert [row["file"] for row in rows] == ["test/owl & co/1.png", "test/tit/2.png"]
    assert public["report.html"].decode() == "<td>test/owl &amp; co/1.png</td><td>test/tit/2.png</td>"


def test_the_root_folder_as_an_argument_leaves_the_report_alone(tmp_path):
    (tmp_path / "arguments.yaml").write_text("dataset: /\n")
    (tmp_path / "report.html").write_text("<p>a/b</p>")
    assert "report.html" not in without_local_paths(tmp_path)
