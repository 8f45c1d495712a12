"""A picture of samples for a page: one row a video, the prompt beside its frames.

python tools/sheet.py outputs/quickstart/samples docs/samples.png --rows 0 9 18 70 100
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from opensora.infer.records import read_records
from opensora.media.read import read_clip
from opensora.media.sheet import contact_sheet

GAP = 4
TEXT_SIZE = 14


def sheet(folder: Path, rows: list[int], *, columns: int, text_width: int) -> Image.Image:
    """The chosen samples of a folder, in the order given.

    Args:
        rows: indices of samples.
        columns: frames of each, evenly spread from the first to the last.
        text_width: pixels for the prompts; longer ones are wrapped.
    """
    records = {record["index"]: record for record in read_records(folder)}
    chosen = [records[row] for row in rows]
    clips = [read_clip(folder / record["file"]).frames for record in chosen]
    frames = contact_sheet(clips, columns=columns, gap=GAP)
    picture = Image.new("RGB", (text_width + frames.shape[1], frames.shape[0]), "white")
    picture.paste(Image.fromarray(frames), (text_width, 0))
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(TEXT_SIZE)
    pitch = (frames.shape[0] + GAP) / len(clips)
    for number, record in enumerate(chosen):
        place = (6, (number + 0.5) * pitch - GAP / 2)
        text = _wrapped(record["prompt"], font, text_width - 16)
        draw.multiline_text(place, text, fill="black", font=font, anchor="lm", spacing=3)
    return picture


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


def main() -> None:
    """Draw the picture with as few colours as it needs, because pages carry it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("samples", type=Path, help="a folder of `opensora sample` or `eval`")
    parser.add_argument("output", type=Path, help="PNG")
    parser.add_argument("--rows", type=int, nargs="+", default=list(range(6)))
    parser.add_argument("--columns", type=int, default=6, help="frames a video")
    parser.add_argument("--text-width", type=int, default=190, help="pixels for the prompts")
    options = parser.parse_args()
    picture = sheet(
        options.samples, options.rows, columns=options.columns, text_width=options.text_width
    )
    palette = picture.quantize(256, dither=Image.Dither.NONE)
    palette.save(options.output, optimize=True)
    size = options.output.stat().st_size / 1000
    print(f"{options.output}: {np.array(picture).shape[1]}x{picture.height}, {size:.0f} kB")


if __name__ == "__main__":
    main()
