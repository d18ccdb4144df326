"""Show some plots of a run in one image: `python docs/make_gallery.py outputs/digits docs/images/report.png`.

The README's is that of `OMP_NUM_THREADS=1 accelerate launch examples/train_ballad.py`.
"""

import sys
from pathlib import Path

from PIL import Image


PLOTS = ["training_curves", "confusions", "reliability", "mistakes"]
TILE = (760, 600)  # pixels
GAP = 24


def gallery(run: Path) -> Image.Image:
    """The plots in two columns, each scaled to fit its tile."""
    (width, height), rows = TILE, -(-len(PLOTS) // 2)
    page = Image.new("RGB", (2 * width + 3 * GAP, rows * (height + GAP) + GAP), "white")
    for place, name in enumerate(PLOTS):
        with Image.open(run / "plots" / f"{name}.png") as file:
            plot = file.convert("RGB")
        plot.thumbnail(TILE, Image.Resampling.LANCZOS)
        left, top = GAP + place % 2 * (width + GAP), GAP + place // 2 * (height + GAP)
        page.paste(plot, (left + (width - plot.width) // 2, top + (height - plot.height) // 2))
    return page.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)


if __name__ == "__main__":
    run, output = map(Path, sys.argv[1:3])
    gallery(run).save(output, optimize=True)
