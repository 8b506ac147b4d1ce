"""Prompts that a model is calibrated or distilled on."""

from __future__ import annotations

from pathlib import Path

from edgedit.errors import InputError

__all__ = ["DEFAULT_PROMPTS", "PROMPTS_FILE", "read_prompts"]

PROMPTS_FILE = "calibration.txt"

DEFAULT_PROMPTS = (
    "a photo of a cat sleeping on a windowsill in the morning sun",
    "a busy street market at night, neon signs, rain on the pavement",
    "portrait of an old fisherman with a grey beard, oil painting",
    "a bowl of fresh fruit on a wooden table, soft light",
    "an astronaut riding a horse on the moon",
    "aerial view of a river winding through an autumn forest",
    "a red sports car parked in front of a modern glass building",
    "a child's drawing of a house, a tree and a smiling sun",
    "close-up of a bee on a purple flower, macro photography",
    "a medieval castle on a cliff above a stormy sea",
    "three green apples in a row on a white background",
    "a cosy library with tall shelves and a leather armchair",
    "a blue ceramic vase with yellow tulips, watercolour",
    "snow-covered mountains reflected in a still lake at dawn",
    "a robot playing chess with a young woman in a park",
    "a slice of chocolate cake on a plate, studio photography",
    "pixel art of a dragon guarding a treasure chest",
    "a sailing boat on calm water under a pink sky",
    "a black and white photograph of a jazz band on stage",
    "a futuristic city with flying vehicles and hanging gardens",
    "two dogs running along a beach, splashing water",
    "an ancient temple overgrown with jungle plants",
    "a steaming cup of coffee beside an open notebook",
    "an isometric illustration of a small workshop full of tools",
    "a hummingbird hovering in front of a red flower",
    "a lighthouse in heavy fog, minimalist composition",
    "a group of hot air balloons over a desert valley",
    "a knitted toy elephant on a white shelf",
    "a stained glass window with geometric patterns",
    "a chef preparing sushi behind a wooden counter",
    "a bicycle leaning against a yellow wall with blue shutters",
    "an infographic poster of the planets of the solar system",
)
"""General prompts, for a checkpoint that brings none."""


def read_prompts(source: str, checkpoint: Path) -> list[str]:
    """The prompts of a text file, one a line; "self" takes the checkpoint's `calibration.txt`, or `DEFAULT_PROMPTS`.

    Raises InputError when there are none.
    """
    path = Path(source)
    if source == "self":
        path = checkpoint / PROMPTS_FILE
        if not path.is_file():
            return list(DEFAULT_PROMPTS)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"--calibration {source} cannot be read ({error}); give a text file, one prompt a line"
        ) from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"{path} holds no prompts; write one a line, or give --calibration self")
    return prompts
