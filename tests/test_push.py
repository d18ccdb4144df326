"""Pushing a bundle and loading it back: the real client in processes of its own, against a stand-in for the Hub."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ballad_hf import save_bundle
from ballad_hf.hub.layout import LAYOUT, check_bundle
from ballad_hf.hub.push import CheckpointPusher, check_repo_id, push_bundle
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
def bundle(tiny_ballad, tiny_clip, tmp_path) -> Path:
    folder = save_bundle(
        tmp_path / "bundle",
        tiny_ballad,
        tiny_clip.tokenizer,
        tiny_clip.image_processor,
        card="---\nlibrary_name: transformers\n---\n# A card",
        metrics={"phase B": {"overall": 0.5}},
        arguments={"seed": 3},
    )
    (folder / "arguments.yaml").write_text("seed: 3\n")
    (folder / "predictions").mkdir()
    (folder / "predictions" / "phase_B.safetensors").write_bytes(b"predictions")
    (folder / "checkpoints" / "step-1").mkdir(parents=True)
    (folder / "checkpoints" / "step-1" / "tensors.safetensors").write_bytes(b"not for everybody")
    (folder / "secret.txt").write_text("not for everybody")
    return folder


PUSH = """
from ballad_hf.hub.push import main
main()
"""


def test_a_bundle_is_pushed_and_nothing_else_and_the_card_comes_last(hub, client, bundle):
    done = client(PUSH, bundle, "someone/digits", "--private")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"Pushed to {hub.url}/someone/digits\n"
    repository = hub.repositories["someone/digits"]
    assert repository.private
    first, files, card = repository.commits
    assert LAYOUT.card not in files.files
    assert set(card.files) - set(files.files) == {LAYOUT.card}
    names = {"config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"}
    told = {
        "README.md",
        "metrics.json",
        "training_arguments.json",
        "arguments.yaml",
        "predictions/phase_B.safetensors",
    }
    assert set(card.files) - set(first.files) == names | told
    for name in names | told:
        content = (bundle / name).read_bytes()
        same = json.loads if name == "config.json" else bytes
        assert same(card.files[name]) == same(content), name


def test_paths_of_the_users_disk_do_not_go_up(hub, client, bundle):
    kept = "dataset: /home/me/birds\n"
    (bundle / "arguments.yaml").write_text(kept)
    config = json.loads((bundle / "config.json").read_text())
    config["clip_config"]["_name_or_path"] = "/home/me/clip"
    (bundle / "config.json").write_text(json.dumps(config))
    assert client(PUSH, bundle, "someone/digits").returncode == 0
    files = hub.repositories["someone/digits"].commits[-1].files
    assert files["arguments.yaml"] == b"dataset: birds\n"
    assert json.loads(files["config.json"])["clip_config"]["_name_or_path"] == "clip"
    assert (bundle / "arguments.yaml").read_text() == kept


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
    hub, client, bundle, tiny_ballad, tiny_clip, tmp_path
):
    from safetensors.torch import load_file

    assert client(PUSH, bundle, "someone/digits").returncode == 0
    first_revision = hub.repositories["someone/digits"].branches["main"]
    tiny_ballad.config.adapter_ratio = 0.75
    save_bundle(bundle, tiny_ballad, tiny_clip.tokenizer, tiny_clip.image_processor, overwrite=True)
    assert client(PUSH, bundle, "digits").returncode == 0  # a bare name is one of the user's own
    picture = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(picture)
    done = client(LOAD, picture, tmp_path / "state.safetensors", first_revision, token=None)
    assert done.returncode == 0, done.stderr
    own, typed, ratio = json.loads(done.stdout)
    assert ratio == 0.2
    loaded = load_file(tmp_path / "state.safetensors")
    state = tiny_ballad.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    pixel_values = tiny_clip.image_processor(Image.open(picture), return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = tiny_ballad(pixel_values).logits[0].softmax(-1).tolist()
    scores = {row["label"]: row["score"] for row in own}
    assert scores == pytest.approx(dict(zip(tiny_ballad.config.class_names, expected, strict=True)), abs=1e-5)
    assert {row["label"] for row in typed} == {"cat", "a bus"}


LOAD_WITHOUT_BALLAD = """
import json, sys
import torch
from PIL import Image
from transformers import (
    AutoConfig, AutoImageProcessor, AutoModelForImageClassification, AutoModelForZeroShotImageClassification,
    AutoTokenizer, pipeline,
)
name, picture = "someone/digits", sys.argv[1]
labels = ["cat", "a bus"]
trusted = {"trust_remote_code": True}
pixels = AutoImageProcessor.from_pretrained(name, **trusted)(Image.open(picture), return_tensors="pt")
tokenizer = AutoTokenizer.from_pretrained(name, **trusted)
texts = tokenizer([f"a photo of a {label}." for label in labels], padding=True, return_tensors="pt")
answers = {"config": AutoConfig.from_pretrained(name, **trusted).class_names}
with torch.no_grad():
    model = AutoModelForImageClassification.from_pretrained(name, **trusted).eval()
    answers["stored"] = model(**pixels).logits[0].tolist()
    model = AutoModelForZeroShotImageClassification.from_pretrained(name, **trusted).eval()
    answers["typed"] = model(**pixels, **texts).logits_per_image[0].tolist()
answers["own pipeline"] = pipeline("image-classification", model=name, **trusted)(picture)
answers["typed pipeline"] = pipeline("zero-shot-image-classification", model=name, **trusted)(
    picture, candidate_labels=labels, hypothesis_template="a photo of a {}."
)
model.set_class_names(["owl", "bus", "zebra"], tokenizer)
answers["renamed"] = [model.config.id2label[index] for index in range(3)]
assert sys.modules["ballad_hf"] is None and not any(module.startswith("ballad_hf.") for module in sys.modules)
answers["code"] = type(model).__module__.split(".")[0]
print(json.dumps(answers))
"""


def test_what_was_pushed_with_its_code_answers_the_same_where_ballad_can_not_be_imported(
    hub, client, bundle, tiny_ballad, tiny_clip, tmp_path
):
    assert client(PUSH, bundle, "someone/digits", "--with_code").returncode == 0
    picture = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(picture)
    preload = "import torch, transformers.pipelines"
    stranger = HubClient(hub, tmp_path / "home", preload, blocked=("ballad_hf",))
    try:
        refused = stranger(
            LOAD_WITHOUT_BALLAD.replace('"trust_remote_code": True', '"trust_remote_code": False'), picture
        )
        done = stranger(LOAD_WITHOUT_BALLAD, picture, token=None)
    finally:
        stranger.close()
    assert "trust_remote_code" in refused.stderr  # no code runs that was not asked for
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert answers["code"] == "transformers_modules"
    assert answers["config"] == tiny_ballad.config.class_names
    assert answers["renamed"] == ["owl", "bus", "zebra"]
    pixel_values = tiny_clip.image_processor(Image.open(picture), return_tensors="pt").pixel_values
    labels = ["cat", "a bus"]
    texts = tiny_clip.tokenizer([f"a photo of a {label}." for label in labels], padding=True, return_tensors="pt")
    with torch.no_grad():
        stored = tiny_ballad(pixel_values).logits[0]
        typed = tiny_ballad(pixel_values, **texts).logits_per_image[0]
    assert answers["stored"] == pytest.approx(stored.tolist(), abs=1e-5)
    assert answers["typed"] == pytest.approx(typed.tolist(), abs=1e-5)
    for said, names, logits in (("own", tiny_ballad.config.class_names, stored), ("typed", labels, typed)):
        scores = {row["label"]: row["score"] for row in answers[f"{said} pipeline"]}
        assert scores == pytest.approx(dict(zip(names, logits.softmax(-1).tolist(), strict=True)), abs=1e-5)


def test_a_second_push_writes_what_changed_and_clears_old_weights(hub, client, bundle):
    assert client(PUSH, bundle, "digits", "--with_code").returncode == 0
    repository = hub.repositories["someone/digits"]
    repository.commit("by hand", {**repository.at("main").files, "model-00001-of-00002.safetensors": b"old"}, "main")
    repository.commit("by hand", {**repository.at("main").files, "notes.py": b"# mine"}, "main")
    assert client(PUSH, bundle, "digits").returncode == 0
    files = repository.at("main").files
    assert "model-00001-of-00002.safetensors" not in files
    assert "modeling_ballad.py" not in files
    assert "auto_map" not in json.loads(files["config.json"])
    assert files["notes.py"] == b"# mine"
    commits = len(repository.commits)
    assert client(PUSH, bundle, "digits").returncode == 0
    assert len(repository.commits) == commits  # nothing changed, nothing written


@pytest.mark.parametrize(
    ("request_", "how", "says"),
    [
        ("POST /api/repos/create", 401, "hf auth login"),
        ("POST /api/models/.*/commit", 404, "no such repository or branch"),
        ("POST /api/models/.*/commit", 409, "somebody else is writing"),
        ("POST /api/models/.*/commit", 500, "try again later"),
        ("POST /api/repos/create", "drop", "was not reached"),
        ("POST /api/models/.*/commit", "drop", "was not reached"),
    ],
)
def test_a_hub_that_fails_costs_nothing_and_the_message_says_how_to_go_on(hub, client, bundle, request_, how, says):
    before = {file: file.read_bytes() for file in bundle.rglob("*") if file.is_file()}
    hub.fail(request_, how, times=20)
    done = client(PUSH, bundle, "someone/digits", "--private")
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert f"python -m ballad_hf.hub.push {bundle} someone/digits --private" in done.stderr
    assert {file: file.read_bytes() for file in bundle.rglob("*") if file.is_file()} == before


IMPATIENT = "import time; time.sleep = lambda seconds: None" + PUSH


def test_the_command_of_the_message_works_once_the_hub_does(hub, client, bundle):
    hub.fail("PUT /lfs", "drop", times=1000)
    done = client(IMPATIENT, bundle, "someone/digits", "--with_code")
    assert done.returncode == 1
    command = done.stderr.strip().splitlines()[-1].split()
    hub.forgive()
    assert command[:3] == ["python", "-m", "ballad_hf.hub.push"]
    done = client(PUSH, *command[3:])
    assert done.returncode == 0, done.stderr
    assert "modeling_ballad.py" in hub.repositories["someone/digits"].at("main").files


def test_a_connection_that_drops_once_is_tried_again(hub, client, bundle):
    hub.fail("PUT /lfs", "drop")
    assert client(IMPATIENT, bundle, "someone/digits").returncode == 0
    uploads = [path for method, path in hub.requests if method == "PUT"]
    assert len(uploads) == len(set(uploads)) + 1
    assert "model.safetensors" in hub.repositories["someone/digits"].at("main").files


def test_no_token_no_rights_no_network(hub, client, bundle):
    nobody = client(PUSH, bundle, "someone/digits", token=None)
    assert "hf auth login" in nobody.stderr
    reader = client(PUSH, bundle, "someone/digits", token=READ_TOKEN)
    assert "may not write there" in reader.stderr
    offline = client(f"import huggingface_hub.constants as c; c.HF_HUB_OFFLINE = True{PUSH}", bundle, "someone/digits")
    assert "unset HF_HUB_OFFLINE" in offline.stderr
    assert not hub.repositories
    check = "from ballad_hf.hub.push import check_push; print(check_push('someone/digits'))"
    assert client(check).stdout == "someone\n"
    assert "hf auth login" in client(check, token="hf_wrong").stderr


def test_what_was_to_be_private_never_goes_into_a_public_repository(hub, client, bundle):
    assert client(PUSH, bundle, "someone/digits").returncode == 0
    commits = len(hub.repositories["someone/digits"].commits)
    (bundle / "metrics.json").write_text("{}")
    refused = client(PUSH, bundle, "someone/digits", "--private")
    assert refused.returncode == 1
    assert "someone/digits is public, and a private repository was asked for" in refused.stderr
    assert len(hub.repositories["someone/digits"].commits) == commits


BRANCH = """
import sys
from huggingface_hub import HfApi
from ballad_hf import push_bundle
push_bundle(sys.argv[1], "someone/digits")
HfApi().create_branch("someone/digits", branch="trial")
push_bundle(sys.argv[1], "someone/digits", revision="trial", with_code=True)
"""


def test_a_branch_can_be_pushed_to(hub, client, bundle):
    done = client(BRANCH, bundle)
    assert done.returncode == 0, done.stderr
    repository = hub.repositories["someone/digits"]
    assert "modeling_ballad.py" in repository.at("trial").files
    assert "modeling_ballad.py" not in repository.at("main").files
    missing = client(PUSH, bundle, "someone/digits", "--revision", "no-such-branch")
    assert "make the branch first" in missing.stderr


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
    assert "Training goes on" in done.stderr


@pytest.mark.parametrize("name", ["", "a/b/c", "with space", "-starts/wrong", "a--b"])
def test_a_name_that_can_be_none_is_refused_before_anything_else(name, bundle):
    with pytest.raises(ValueError, match="can't be a repository's name"):
        push_bundle(bundle, name)
    with pytest.raises(ValueError, match="can't be a repository's name"):
        CheckpointPusher(name)
    check_repo_id("someone/digits")


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "preprocessor_config.json", "tokenizer_config.json"]
)
def test_a_bundle_with_a_hole_is_never_pushed(bundle, name):
    content = (bundle / name).read_bytes()
    (bundle / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"{name} is damaged"):
        push_bundle(bundle, "someone/digits")
    (bundle / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name} is missing"):
        push_bundle(bundle, "someone/digits")


def test_shards_are_all_looked_for(bundle, tiny_ballad):
    (bundle / "model.safetensors").unlink()
    tiny_ballad.save_pretrained(bundle, max_shard_size="100KB")
    shards = sorted(bundle.glob("model-*.safetensors"))
    assert len(shards) > 1
    check_bundle(bundle)
    shards[-1].unlink()
    with pytest.raises(FileNotFoundError, match=shards[-1].name):
        check_bundle(bundle)
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        check_bundle(bundle / "nowhere")
