"""The handler of Inference Endpoints, by its contract: constructed with a folder, called with a decoded request."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from ballad_hf.hub.endpoint_handler import EndpointHandler
from ballad_hf.hub.model_directory import save_model_directory
from ballad_hf.hub.push import HANDLER
from tests.hub_server import HubClient, HubServer


@pytest.fixture
def saved(tiny_ballad, tiny_processor, tmp_path):
    return save_model_directory(tiny_ballad, tmp_path / "saved", tiny_processor)


@pytest.fixture
def handler(saved):
    return EndpointHandler(str(saved))


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8))


@pytest.fixture
def encoded(image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def scores_of(model, processor, image) -> dict[str, float]:
    with torch.no_grad():
        logits = model(processor(image, return_tensors="pt").pixel_values).logits[0]
    return dict(zip(model.config.class_names, logits.softmax(-1).tolist(), strict=True))


def test_every_form_of_an_image_gives_the_models_scores_best_first(handler, tiny_ballad, tiny_clip, image, encoded):
    expected = scores_of(tiny_ballad, tiny_clip.image_processor, image)
    forms = [image, encoded, f"data:image/png;base64,{encoded}", base64.b64decode(encoded)]
    for form in forms:
        rows = handler({"inputs": form})
        assert {row["label"]: row["score"] for row in rows} == pytest.approx(expected, abs=1e-5)
        assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
    json.dumps(rows)  # what an endpoint does with it


def test_parameters(handler, encoded):
    (best,) = handler({"inputs": encoded, "parameters": {"top_k": 1}})
    assert best == handler({"inputs": encoded})[0]
    labels = {"candidate_labels": ["a bus", "a tram", "an owl"]}
    typed = handler({"inputs": encoded, "parameters": labels})
    assert {row["label"] for row in typed} == {"a bus", "a tram", "an owl"}
    assert sum(row["score"] for row in typed) == pytest.approx(1, abs=1e-5)
    assert handler({"inputs": encoded, "parameters": {**labels, "top_k": 2}}) == typed[:2]
    template = handler.classify.model.config.templates[0]
    assert handler({"inputs": encoded, "parameters": {**labels, "hypothesis_template": template}}) == typed


def test_a_list_of_images_gives_a_list_of_answers(handler, encoded):
    one = handler({"inputs": encoded})
    two = handler({"inputs": [encoded, encoded]})
    assert [row["label"] for row in two[0]] == [row["label"] for row in one]
    assert len(two) == 2
    typed = handler({"inputs": [encoded, encoded], "parameters": {"candidate_labels": ["a", "b"], "top_k": 1}})
    assert [len(rows) for rows in typed] == [1, 1]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, "no 'inputs'"),
        ({"inputs": 3}, "a int"),
        ({"inputs": "https://example.com/cat.png"}, "no base64 text"),
        ({"inputs": b"not an image"}, "can't be read"),
        ({"inputs": "aGVsbG8="}, "can't be read"),
        ({"inputs": b"", "parameters": {"top": 3}}, r"\['top'\].*top_k, candidate_labels"),
        ({"inputs": b"", "parameters": {"top_k": 0}}, "top_k is 0"),
        ({"inputs": b"", "parameters": {"top_k": "3"}}, "top_k is '3'"),
    ],
)
def test_a_wrong_request_is_named(handler, request_, message):
    with pytest.raises(ValueError, match=message):
        handler(request_)


@pytest.mark.parametrize("labels", [[], "a bus", [3]])
def test_wrong_labels_are_named(handler, encoded, labels):
    with pytest.raises(ValueError, match="list of classes"):
        handler({"inputs": encoded, "parameters": {"candidate_labels": labels}})


def test_a_file_of_the_machine_is_never_opened(handler, image, tmp_path, monkeypatch):
    """`etc/passwd` is base64 text as well as a path."""
    monkeypatch.chdir(tmp_path)
    image.save("abcd", "PNG")
    for path in ("abcd", str(tmp_path / "abcd")):
        with pytest.raises(ValueError, match=r"no base64 text|can't be read"):
            handler({"inputs": path})


def test_a_model_without_its_text_tower_serves_its_own_classes(tiny_ballad, tiny_clip, image, tmp_path):
    expected = scores_of(tiny_ballad, tiny_clip.image_processor, image)
    tiny_ballad.remove_text_tower()
    folder = save_model_directory(tiny_ballad, tmp_path / "vision", tiny_clip.image_processor)
    handler = EndpointHandler(str(folder))
    assert {row["label"]: row["score"] for row in handler({"inputs": image})} == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="without its text tower"):
        handler({"inputs": image, "parameters": {"candidate_labels": ["a bus"]}})


PUSH = """
import sys
from ballad_hf.commands.push import main
main(sys.argv[1:])
"""
# As the toolkit of the endpoints does: everything of the repository, then the class of handler.py with that folder.
SERVE = """
import importlib.util, json, sys
from huggingface_hub import snapshot_download
folder = snapshot_download("someone/digits", local_dir=sys.argv[1])
spec = importlib.util.spec_from_file_location("handler", f"{folder}/handler.py")
handler = importlib.util.module_from_spec(spec)
sys.path.insert(0, folder)
sys.modules["handler"] = handler
spec.loader.exec_module(handler)
endpoint = handler.EndpointHandler(folder)
print(json.dumps(endpoint({"inputs": sys.argv[2]})))
"""


def test_a_pushed_handler_serves_without_this_package(saved, encoded, image, tiny_ballad, tiny_clip, tmp_path):
    with HubServer() as hub:
        preload = "import torch, transformers.pipelines"
        pusher = HubClient(hub, tmp_path / "home", f"{preload}; import ballad_hf.hub.push")
        endpoint = HubClient(hub, tmp_path / "there", preload, blocked=("ballad_hf",))
        try:
            done = pusher(PUSH, saved, "someone/digits", "--with_handler")
            assert done.returncode == 0, done.stderr
            files = hub.repositories["someone/digits"].at("main").files
            assert files["handler.py"] == HANDLER.read_bytes()
            assert files["requirements.txt"].startswith(b"transformers==")
            done = endpoint(SERVE, tmp_path / "repository", encoded, token=None)
            assert done.returncode == 0, done.stderr
        finally:
            pusher.close()
            endpoint.close()
    scores = {row["label"]: row["score"] for row in json.loads(done.stdout)}
    assert scores == pytest.approx(scores_of(tiny_ballad, tiny_clip.image_processor, image), abs=1e-5)
