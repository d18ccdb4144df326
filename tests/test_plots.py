"""Plots: what stands on them, for two classes and for ten thousand, and the files they become."""

import warnings

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from PIL import Image

from ballad_hf import LongTailMetrics
from ballad_hf.data.image_dataset import ImageDataset
from ballad_hf.evaluation import plots
from ballad_hf.evaluation.plots import (
    drawable,
    plot_accuracy_by_frequency,
    plot_confusions,
    plot_gain_by_class,
    plot_mistakes,
    plot_reliability,
    plot_training_curves,
    save_figure,
    short,
    thumbnail,
)
from ballad_hf.evaluation.predictions import Predictions
from ballad_hf.evaluation.report import save_plots
from ballad_hf.evaluation.summary import worst_confusions, worst_mistakes


NAMES = ["cat $5", "a class with a name that does not fit any axis", "猫", "red fox", "zebra"]
COUNTS = [19, 500, 3, 120, 50]


def _grey_images(number):
    """A dataset of grey images of several shapes."""
    images = [Image.new("L", (8 + row % 3, 5 + row % 7), row % 256) for row in range(number)]
    return ImageDataset(images, [0] * number, ["grey"])


def _predictions(labels, predicted, classes=5, sureness=4.0):
    logits = np.eye(classes, dtype=np.float32)[np.asarray(predicted)] * np.reshape(sureness, (-1, 1))
    return Predictions.from_logits(logits, np.asarray(labels))


def _stage(right, counts=COUNTS, names=NAMES):
    """`right[c]` of ten images of class c are right, the rest are taken for the next class."""
    classes = len(right)
    labels = np.repeat(np.arange(classes), 10)
    hit = np.tile(np.arange(10), classes) < np.repeat(right, 10)
    predictions = _predictions(labels, np.where(hit, labels, (labels + 1) % classes), classes)
    return predictions, LongTailMetrics.from_predictions(predictions, counts, names)


@pytest.fixture
def stages():
    right = {"before training": [5, 5, 5, 5, 5], "phase A": [3, 10, 0, 8, 6], "phase B": [9, 9, 4, 8, 7]}
    made = {name: _stage(of_classes) for name, of_classes in right.items()}
    return {name: stage[1] for name, stage in made.items()}, {name: stage[0] for name, stage in made.items()}


def test_every_plot_of_a_run_in_one_call(stages, tmp_path):
    files = save_plots(tmp_path / "new" / "plots", *stages, dataset=_grey_images(50))
    names = ["accuracy_by_frequency", "gain_by_class", "reliability", "confusions", "mistakes"]
    assert [file.name for file in files] == [f"{name}.{kind}" for name in names for kind in ("png", "svg")]
    for file in files:
        if file.suffix == ".png":
            with Image.open(file) as image:
                assert min(image.size) > 400
                assert len(image.convert("L").getcolors(1 << 16)) > 10  # something is drawn
        else:
            assert file.read_text(encoding="utf-8").lstrip().startswith("<?xml")


def test_the_same_run_gives_the_same_bytes(stages, tmp_path):
    first = save_plots(tmp_path / "first", *stages)
    second = save_plots(tmp_path / "second", *stages)
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]


def test_what_cannot_be_drawn_is_left_out(tmp_path):
    predictions, metrics = _stage([10] * 5, counts=None)
    files = save_plots(tmp_path, {"model": metrics}, {"model": predictions}, dataset=_grey_images(50))
    assert [file.name for file in files] == ["reliability.png", "reliability.svg"]


def test_accuracy_stands_under_the_frequency_of_its_class(stages):
    figure = plot_accuracy_by_frequency(stages[0])
    top, bottom = figure.axes
    # By frequency: class 1 (500), 3 (120), 4 (50), 0 (19), 2 (3).
    assert [text.get_text() for text in bottom.get_xticklabels()] == [
        "a class with…it any axis", "red fox", "zebra", "cat $5", "class 2",
    ]  # fmt: skip
    markers = {tuple(line.get_xdata()): list(line.get_ydata()) for line in bottom.get_lines() if len(line.get_xdata())}
    assert markers[(0, 1)] == [0.9, 0.8]  # many
    assert markers[(2,)] == [0.7]  # medium
    assert markers[(3, 4)] == [0.9, 0.4]  # few
    assert markers[(0, 1, 2, 3, 4)] == [0.5] * 5  # before training
    (steps,) = top.patches
    assert steps.get_data().values.tolist() == [500, 120, 50, 19, 3]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend[:2] == ["many-shot: 2 classes, mean 85.0%", "medium-shot: 1 class, mean 70.0%"]


def test_gain_of_the_last_stage_over_the_one_before(stages):
    figure = plot_gain_by_class(stages[0])
    (axes,) = figure.axes
    assert [round(bar.get_height(), 6) for bar in axes.containers[0]] == [-0.1, 0.0, 0.1, 0.6, 0.4]
    assert axes.get_title(loc="left") == "phase B vs. phase A on evaluation images: mean-class +20.0 points"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["better: 3 classes", "worse: 1 class"]
    over_all = plot_gain_by_class(stages[0], before="before training").axes[0]
    assert [round(bar.get_height(), 6) for bar in over_all.containers[0]] == [0.4, 0.3, 0.2, 0.4, -0.1]


def test_reliability_is_that_of_the_bins(stages):
    predictions = _predictions([0] * 10 + [1] * 10, [0] * 8 + [1] * 2 + [1] * 5 + [0] * 5, 2, [3.0] * 10 + [0.5] * 10)
    metrics = LongTailMetrics.from_predictions(predictions, [500, 3])
    top = plot_reliability(predictions, metrics).axes[0]
    sure, unsure = np.exp(3) / (np.exp(3) + 1), np.exp(0.5) / (np.exp(0.5) + 1)
    curves = [(line.get_xdata(), line.get_ydata()) for line in top.get_lines() if len(line.get_xdata())]
    diagonal, many, few, everything = curves
    assert np.allclose(many, [[sure], [0.8]])
    assert np.allclose(few, [[unsure], [0.5]])
    assert np.allclose(everything, [[unsure, sure], [0.5, 0.8]])
    labels = [line.get_label() for line in top.get_lines()]
    assert f"many-shot: error {100 * (sure - 0.8):.1f} points" in labels


def test_a_bin_of_few_images_bends_no_line_but_is_shown():
    """Ten sure images, 8 right; nine unsure ones, all wrong, which would pull the line to the bottom."""
    predictions = _predictions([0] * 10 + [1] * 9, [0] * 8 + [1] * 2 + [0] * 9, 2, [3.0] * 10 + [0.5] * 9)
    figure = plot_reliability(predictions, LongTailMetrics.from_predictions(predictions, [500, 3]))
    top = figure.axes[0]
    sure, unsure = np.exp(3) / (np.exp(3) + 1), np.exp(0.5) / (np.exp(0.5) + 1)
    lines = [line.get_xydata().tolist() for line in top.get_lines() if len(line.get_xdata())]
    assert [len(line) for line in lines] == [2, 1, 1]  # the diagonal, many-shot, all
    assert np.allclose(lines[1:], [[[sure, 0.8]]] * 2)
    pale = [markers.get_offsets().tolist() for markers in top.collections if markers.get_alpha() is not None]
    assert np.allclose([markers for markers in pale if markers], [[[unsure, 0.0]]] * 2)  # few-shot, all
    assert "pale: fewer than 10 images" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_ten_thousand_classes_stay_readable_and_small(tmp_path):
    classes = 10_000
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, 20_000)
    stages = {}
    for name, share in (("phase A", 0.3), ("phase B", 0.6)):
        predicted = np.where(rng.random(len(labels)) < share, labels, rng.integers(0, classes, len(labels)))
        rank = np.where(predicted == labels, 0, 1)
        half = np.full(len(labels), 0.5, dtype=np.float32)
        stages[name] = Predictions(np.arange(len(labels)), labels, predicted, half, half, rank, classes)
    counts = np.maximum(1, 2000 * 0.999 ** np.arange(classes)).astype(int)
    results = {name: LongTailMetrics.from_predictions(predictions, counts) for name, predictions in stages.items()}
    files = save_plots(tmp_path, results, stages)
    assert sum(file.stat().st_size for file in files) < 4_000_000
    axes = plot_gain_by_class(results).axes[0]
    heights = np.array([bar.get_height() for bar in axes.containers[0]])
    assert len(heights) == 100
    # The first bar is the mean of the hundred most frequent classes that have a test image.
    change = [
        after - before
        for before, after in zip(results["phase A"].class_accuracy, results["phase B"].class_accuracy, strict=True)
        if after is not None
    ]
    seen = sum(value is not None for value in results["phase B"].class_accuracy[:100])
    assert heights[0] == pytest.approx(np.mean(change[:seen]))
    assert "each bar is the mean of 100" in axes.get_xlabel()
    confusions = plot_confusions(stages["phase B"])
    assert len(confusions.axes[0].get_xticklabels()) <= 20


def test_confusions_are_ranked_by_what_is_sure_of_them():
    # Class 0: one image, taken for 1. Class 1: 40 of 50 taken for 2. Class 2: 10 of 50 taken for 1.
    labels = [0] + [1] * 50 + [2] * 50
    predicted = [1] + [2] * 40 + [1] * 10 + [1] * 10 + [2] * 40
    worst = worst_confusions(_predictions(labels, predicted, 3))
    assert list(zip(worst.true.tolist(), worst.predicted.tolist(), worst.images.tolist(), strict=True)) == [
        (1, 2, 40), (0, 1, 1), (2, 1, 10),
    ]  # fmt: skip
    assert worst.fraction.tolist() == [0.8, 1.0, 0.2]


def test_confusion_map_shows_shares_of_rows():
    labels = [0] * 4 + [1] * 5 + [2] * 2
    predicted = [0, 0, 0, 1] + [1, 1, 1, 2, 2] + [2, 2]
    axes = plot_confusions(_predictions(labels, predicted, 3), ["a", "b", "c"]).axes[0]
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {(0, 0): "75", (1, 0): "25", (1, 1): "60", (2, 1): "40", (2, 2): "100"}


def test_map_of_many_classes_holds_the_worst_pairs_whole():
    labels = np.repeat(np.arange(30), 10)
    hit = np.tile(np.arange(10), 30) < np.repeat(10 - np.arange(30) % 10, 10)
    predictions = _predictions(labels, np.where(hit, labels, (labels + 1) % 30), 30)
    shown = [text.get_text() for text in plot_confusions(predictions, most_classes=6).axes[0].get_xticklabels()]
    # Nine of ten wrong: classes 9, 19 and 29, each taken for the next.
    assert shown == ["class 0", "class 9", "class 10", "class 19", "class 20", "class 29"]


def test_worst_mistakes_are_the_surest_and_not_all_of_one_pair():
    labels = [0, 0, 0, 0, 0, 1, 2]
    predicted = [1, 1, 1, 1, 0, 2, 0]
    predictions = _predictions(labels, predicted, 3, [9, 8, 7, 6, 10, 5, 8.5])
    # Pair (0, 1) has its three surest, the fourth is left out; row 4 is right.
    assert worst_mistakes(predictions).tolist() == [0, 6, 1, 2, 5]
    assert worst_mistakes(predictions, most=2).tolist() == [0, 6]
    assert worst_mistakes(_predictions([0], [0], 3)).tolist() == []


def test_mistakes_show_the_images_of_their_rows():
    predictions = _predictions([0, 1], [1, 1], 2)
    logits = np.array([[0.0, 4.0], [0.0, 4.0]])
    moved = Predictions.from_logits(logits, [0, 1], index=[5, 2])
    axes = plot_mistakes(moved, _grey_images(6), ["cat", "dog"]).axes[0]
    assert axes.get_title() == "cat\n→ dog\n98% confident"
    shown = np.asarray(axes.images[0].get_array())
    assert shown.shape[:2] == (128, 128)
    assert (shown[64, 64] == 5).all()  # row 5 is an image of the grey 5
    with pytest.raises(ValueError, match="row 5, but the dataset has 3 images"):
        plot_mistakes(moved, _grey_images(3))
    with pytest.raises(ValueError, match="no mistakes"):
        plot_mistakes(_predictions([0], [0], 2), _grey_images(1))
    assert plot_mistakes(predictions, _grey_images(2)).axes[0].get_title() == "class 0\n→ class 1\n98% confident"


@pytest.mark.parametrize("size", [(1, 1), (3, 900), (900, 3), (128, 128), (4000, 3000)])
def test_thumbnails_are_squares_of_any_image(size):
    assert thumbnail(Image.new("RGB", size, "red")).size == (128, 128)


def test_dollars_are_no_formula(tmp_path):
    predictions, metrics = _stage([1, 2], counts=[500, 3], names=["$\\frac$", "a $ b $"])
    save_plots(tmp_path, {"m": metrics}, {"m": predictions}, dataset=_grey_images(20))


def test_names_are_cut_in_the_middle():
    assert short("exactly as long", 15) == "exactly as long"
    assert short("two\nlines", 20) == "two lines"
    assert len(short("x" * 500, 24)) == 24


def test_bad_input_is_named(stages, tmp_path):
    results, predictions = stages
    with pytest.raises(ValueError, match="no results to plot"):
        save_plots(tmp_path, {}, {})
    with pytest.raises(ValueError, match="no predictions of 'phase B', only of phase A"):
        save_plots(tmp_path, results, {"phase A": predictions["phase A"]})
    with pytest.raises(ValueError, match="1 predictions, but metrics of 50 images"):
        save_plots(tmp_path, results, {"phase B": _predictions([0], [0])})
    with pytest.raises(ValueError, match="'phase C' is not an earlier result"):
        plot_gain_by_class(results, before="phase C")
    with pytest.raises(ValueError, match="needs two results"):
        plot_gain_by_class({"phase B": results["phase B"]})
    with pytest.raises(ValueError, match="different numbers of classes"):
        plot_gain_by_class({"a": _stage([1, 2], None, None)[1], "b": results["phase B"]})
    with pytest.raises(ValueError, match="no training counts"):
        plot_accuracy_by_frequency({"a": _stage([1, 2], None, None)[1]})
    with pytest.raises(ValueError, match="no confusions to plot"):
        plot_confusions(_predictions([0], [0]))


def test_figures_are_written_where_asked(stages, tmp_path):
    files = save_figure(plot_gain_by_class(stages[0]), tmp_path / "gain.v2")
    assert sorted(file.name for file in files) == ["gain.v2.png", "gain.v2.svg"]


def test_training_curves_of_both_phases():
    first = [{"step": 0, "mean_class": 0.2}, {"step": 10, "loss": 2.0, "mean_class": 0.4, "few": 0.1}]
    second = [
        {"epoch": 0, "eval_mean_class": 0.4},
        {"epoch": 1, "loss": 1.0},
        {"epoch": 1, "eval_mean_class": 0.6, "eval_loss": 9.0},
    ]
    figure = plot_training_curves({"phase A": first, "phase B": second, "phase C": []})
    loss_a, loss_b, accuracy_a, accuracy_b = figure.axes
    assert [axes.get_title(loc="left") for axes in (loss_a, loss_b)] == ["phase A", "phase B"]
    assert [line.get_xydata().tolist() for line in loss_a.get_lines()] == [[[10, 2.0]]]
    assert [line.get_xydata().tolist() for line in loss_b.get_lines()] == [[[1, 1.0]]]
    assert [line.get_xydata().tolist() for line in accuracy_a.get_lines()] == [[[0, 0.2], [10, 0.4]], [[10, 0.1]]]
    assert [line.get_xydata().tolist() for line in accuracy_b.get_lines()] == [[[0, 0.4], [1, 0.6]]]
    assert (accuracy_a.get_xlabel(), accuracy_b.get_xlabel()) == ("step", "epoch")
    assert {axes.get_ylabel() for axes in (accuracy_a, accuracy_b)} == {"validation accuracy"}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["mean-class", "few-shot"]
    with pytest.raises(ValueError, match="no training curves"):
        plot_training_curves({"phase A": [{"step": 0}]})


@pytest.fixture
def only_the_first_font(monkeypatch):
    """As on a machine without fonts for other scripts."""
    monkeypatch.setattr(plots, "_FONTS", ("DejaVu Sans",))
    _forget_fonts()
    yield
    monkeypatch.undo()
    _forget_fonts()


def _forget_fonts():
    plots._installed_fonts.cache_clear()
    plots._glyphs.cache_clear()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("red fox", "red fox"),
        ("Ärger 5 €", "Ärger 5 €"),
        ("猫", "class 3"),
        ("cat 猫", "cat (class 3)"),
        ("🦊", "fox face"),
        ("🦊 red", "fox face red"),
        ("\U0001f9d1\U0001f3fd\u200d\U0001f680", "adult rocket"),  # an astronaut: joined, with a skin tone
        ("\ue000", "class 3"),  # private use: it has no name
    ],
)
def test_what_no_font_can_draw_is_put_into_words(only_the_first_font, name, shown):
    assert drawable(name, "class 3") == shown


def test_no_plot_has_boxes_in_the_place_of_letters(only_the_first_font, tmp_path):
    names = ["猫", "🦊", "лиса", "กบ", "zebra"]
    made = {
        stage: _stage(correct, names=names) for stage, correct in {"前": [5] * 5, "phase B": [9, 9, 4, 8, 7]}.items()
    }
    results = {stage: entry[1] for stage, entry in made.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of each missing glyph
        save_plots(tmp_path, results, {stage: entry[0] for stage, entry in made.items()}, dataset=_grey_images(50))


def test_a_font_that_is_installed_is_used(tmp_path, monkeypatch):
    file = _font_with("猫", tmp_path / "cjk.ttf")
    monkeypatch.setattr(font_manager.fontManager, "ttflist", list(font_manager.fontManager.ttflist))
    font_manager.fontManager.addfont(file)
    monkeypatch.setattr(plots, "_FONTS", ("DejaVu Sans", "Made For This Test"))
    _forget_fonts()
    try:
        assert drawable("猫", "class 2") == "猫"
        assert drawable("犬", "class 2") == "class 2"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            save_figure(plot_gain_by_class({name: _stage([5] * 5)[1] for name in ("猫", "after")}), tmp_path / "gain")
    finally:
        monkeypatch.undo()
        _forget_fonts()


def _font_with(letters, file):
    """A font whose glyphs for these letters are squares."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for point in ((0, 700), (700, 700), (700, 0)):
        pen.lineTo(point)
    pen.closePath()
    glyph, names = pen.glyph(), [".notdef", *(f"uni{ord(letter):04X}" for letter in letters)]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(letter): name for letter, name in zip(letters, names[1:], strict=True)})
    builder.setupGlyf(dict.fromkeys(names, glyph))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (800, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Made For This Test", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(file)
    return file
