"""`ballad app`: what the page answers, and what it offers."""

import sys

import numpy as np
import pytest
from PIL import Image

from ballad_hf.commands import app
from ballad_hf.inference import CachedZeroShotImageClassificationPipeline


gr = pytest.importorskip("gradio")


@pytest.fixture
def classify(tiny_ballad, tiny_clip):
    tiny_ballad.config.class_counts = [50, 20, 10, 5, 1]
    return CachedZeroShotImageClassificationPipeline(
        tiny_ballad, tiny_clip.tokenizer, image_processor=tiny_clip.image_processor
    )


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8))


def test_the_models_classes_and_the_dial(classify, image):
    even, train = (app.top_classes(classify, image, "", dial) for dial in (0, 1))
    assert even == {row["label"]: row["score"] for row in classify(image)}
    assert (train["cat"] / train["owl"]) / (even["cat"] / even["owl"]) == pytest.approx(5, rel=1e-4)
    rare = app.top_classes(classify, image, "", -1)
    assert (rare["cat"] / rare["owl"]) / (even["cat"] / even["owl"]) == pytest.approx(1 / 5, rel=1e-4)


def test_typed_classes_are_cleaned_of_blanks_and_repeats(classify, image):
    scores = app.top_classes(classify, image, " a tram\n\na bus \na tram\n", 1)
    assert set(scores) == {"a tram", "a bus"}
    assert sum(scores.values()) == pytest.approx(1, abs=1e-5)


def test_the_page_reads_a_file_by_the_rule_of_training(classify, tmp_path):
    """Sixteen bits, scaled and not cut off at white; a file that was cut off is named."""
    from gradio.data_classes import ImageData

    page = app.build_page(classify, "outputs/digits")
    (component,) = (block for block in page.blocks.values() if isinstance(block, gr.Image))
    deep = tmp_path / "deep.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 2**16, (40, 48), dtype=np.uint16)).save(deep)
    given = component.preprocess(ImageData(path=str(deep), orig_name="deep.png"))
    assert app.top_classes(classify, given, "", 0) == {row["label"]: row["score"] for row in classify(str(deep))}
    deep.write_bytes(deep.read_bytes()[:-200])
    given = component.preprocess(ImageData(path=str(deep), orig_name="deep.png"))
    with pytest.raises(gr.Error, match="deep.png can't be read") as raised:
        app.top_classes(classify, given, "", 0)
    assert str(tmp_path) not in str(raised.value)


def test_every_way_to_move_the_dial_or_to_leave_the_classes_asks_again(classify):
    page = app.build_page(classify, "outputs/digits")
    targets = {
        (page.blocks[block].label or page.blocks[block].value, event)
        for function in page.fns.values()
        for block, event in function.targets
    }
    assert {("Target prior", "change"), ("Classify", "click"), ("Image", "change")} <= targets
    assert {event for name, event in targets if name.startswith("Your own classes")} == {"submit", "blur"}


@pytest.mark.parametrize("content", ["no model", "a dual encoder"])
def test_a_model_that_is_no_ballad_ends_with_one_line(clip_folder, tmp_path, content):
    folder = clip_folder if content == "a dual encoder" else tmp_path
    with pytest.raises(ValueError, match="give a BALLAD model" if content == "a dual encoder" else "can't be loaded"):
        app.main([str(folder)])


def test_no_image_gives_nothing_and_mistakes_reach_the_page(classify, image):
    assert app.top_classes(classify, None, "", 0) == {}
    classify.model.remove_text_tower()
    with pytest.raises(gr.Error, match="without its text tower"):
        app.top_classes(classify, image, "a tram", 0)


def test_the_page_names_the_model_and_locks_what_it_can_not_do(classify):
    def locked(page):
        return {
            block.label: not block.interactive
            for block in page.blocks.values()
            if isinstance(block, gr.Slider | gr.Textbox)
        }

    assert not any(locked(app.build_page(classify, "outputs/digits")).values())
    classify.model.config.class_counts = None
    classify.model.remove_text_tower()
    assert all(locked(app.build_page(classify, "outputs/digits")).values())


def test_a_missing_gradio_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=r"pip install 'ballad_hf\[app\]'"):
        app.main(["outputs/digits"])


def test_a_port_out_of_range_is_refused():
    with pytest.raises(ValueError, match="port is 70000: choose"):
        app.main(["outputs/digits", "--port", "70000"])
