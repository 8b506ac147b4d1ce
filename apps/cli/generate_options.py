"""The flags of `edgedit generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgedit.sampler_names import SAMPLERS

PICTURE, START, OUTPUT, MACHINE = "Picture", "Starting point", "Output", "Machine"
MODELS_OWN = "the model's own"

Prompt = Annotated[str | None, typer.Argument(metavar="[PROMPT]", help="What to draw; - reads standard input.")]
PromptOption = Annotated[
    str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="The same as PROMPT.", rich_help_panel=PICTURE)
]
PromptFile = Annotated[
    Path | None,
    typer.Option("--prompt-file", metavar="FILE", help="Read the prompt from a text file.", rich_help_panel=PICTURE),
]
NegativePrompt = Annotated[
    str | None,
    typer.Option("--negative-prompt", "-n", metavar="TEXT", help="What to avoid.", rich_help_panel=PICTURE),
]
AllowEmpty = Annotated[
    bool, typer.Option("--allow-empty", help="Draw even if the prompt is empty.", rich_help_panel=PICTURE)
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="BUNDLE",
        help="builtin, a bundle's path, the name of one that `edgedit models` lists, or a Hub id ORG/NAME.",
        show_default="builtin",
    ),
]
Steps = Annotated[
    int | None, typer.Option(metavar="N", help="Denoising steps.", show_default=MODELS_OWN, rich_help_panel=PICTURE)
]
Seeds = Annotated[
    list[int] | None,
    typer.Option(
        "--seed",
        "-s",
        metavar="N",
        help="Seed of the noise; repeat for several pictures.",
        show_default="random, printed",
        rich_help_panel=PICTURE,
    ),
]
Width = Annotated[
    int | None,
    typer.Option("--width", "-W", metavar="PX", help="Width.", show_default=MODELS_OWN, rich_help_panel=PICTURE),
]
Height = Annotated[
    int | None,
    typer.Option("--height", "-H", metavar="PX", help="Height.", show_default=MODELS_OWN, rich_help_panel=PICTURE),
]
Size = Annotated[str | None, typer.Option(metavar="WxH", help="Both at once, as 512x512.", rich_help_panel=PICTURE)]
Aspect = Annotated[
    str | None,
    typer.Option(metavar="W:H", help="The model's size of the nearest aspect ratio, as 16:9.", rich_help_panel=PICTURE),
]
ForceSize = Annotated[
    bool,
    typer.Option("--force-size", help="Draw a size that the model was not made for.", rich_help_panel=PICTURE),
]
DenoiseTile = Annotated[
    int | None,
    typer.Option(
        metavar="PX",
        help="Denoise in overlapping windows of this side, for a picture larger than the model draws.",
        show_default="the picture whole",
        rich_help_panel=PICTURE,
    ),
]
DenoiseOverlap = Annotated[
    int | None,
    typer.Option(
        metavar="PX",
        help="Least overlap of those windows.",
        show_default="half of their side",
        rich_help_panel=PICTURE,
    ),
]
AttentionScale = Annotated[
    str | None,
    typer.Option(
        metavar="FACTOR",
        help="Scale of the self-attention's scores: entropy, or a number; 1 is as trained.",
        show_default="entropy, where the model can",
        rich_help_panel=PICTURE,
    ),
]
GuidanceScale = Annotated[
    float | None,
    typer.Option(
        "--guidance",
        "--guidance-scale",
        "--cfg",
        "--cfg-scale",
        metavar="SCALE",
        help="How strongly the prompt counts.",
        show_default=MODELS_OWN,
        rich_help_panel=PICTURE,
    ),
]
GuidanceInterval = Annotated[
    str | None,
    typer.Option(
        metavar="A:B",
        help="Guide between these fractions of the steps only.",
        show_default="0:1",
        rich_help_panel=PICTURE,
    ),
]
Sampler = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help=f"One of {', '.join(SAMPLERS)}.", show_default=MODELS_OWN, rich_help_panel=PICTURE
    ),
]
Sigmas = Annotated[
    str | None,
    typer.Option(metavar="LIST", help="Noise levels, falling to the end point, as 14,3,0.", rich_help_panel=PICTURE),
]
Rng = Annotated[
    str | None,
    typer.Option(
        "--rng",
        metavar="NAME",
        help="philox, or torch for the noise of torch.manual_seed on a CPU.",
        show_default="philox",
        rich_help_panel=PICTURE,
    ),
]
StepCache = Annotated[
    str | None,
    typer.Option(
        metavar="POLICY",
        help="Reuse blocks between steps: taylor:N, delta:N or first-block:T, or off.",
        show_default="off",
        rich_help_panel=PICTURE,
    ),
]
BatchCount = Annotated[
    int,
    typer.Option(
        "--batch-count", "-b", metavar="N", help="Pictures per seed, seeds counting up.", rich_help_panel=PICTURE
    ),
]
ImagePath = Annotated[
    Path | None, typer.Option("--image", "-i", metavar="FILE", help="Start from a picture.", rich_help_panel=START)
]
Strength = Annotated[
    float | None,
    typer.Option(
        metavar="F",
        help="How far to go back to noise, above 0 to 1.",
        show_default="0.6 with --image",
        rich_help_panel=START,
    ),
]
LatentsIn = Annotated[
    Path | None,
    typer.Option(metavar="FILE.npy", help="Starting noise, float32 [1, C, H, W].", rich_help_panel=START),
]
Replayed = Annotated[
    Path | None,
    typer.Option(
        "--config-from-metadata",
        "-C",
        metavar="PICTURE",
        help="Draw this picture again; other flags replace parts of its recipe.",
        rich_help_panel=START,
    ),
]
Output = Annotated[
    str | None,
    typer.Option(
        "--output",
        "-o",
        metavar="NAME",
        help="File (.png, .jpg, .webp) with {seed} and {index}, or a folder.",
        show_default="edgedit-{seed}.png",
        rich_help_panel=OUTPUT,
    ),
]
Preview = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Keep a cheap preview here while drawing.", rich_help_panel=OUTPUT),
]
LatentsOut = Annotated[
    str | None,
    typer.Option(
        metavar="FILE.npy", help="Save the final latents too; {seed} and {index} as in -o.", rich_help_panel=OUTPUT
    ),
]
NoMetadata = Annotated[
    bool, typer.Option("--no-metadata", help="Leave the recipe out of the pictures.", rich_help_panel=OUTPUT)
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON events on stdout, one a line.", rich_help_panel=OUTPUT)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only paths and warnings.", rich_help_panel=OUTPUT)]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Settings, times and memory too.", rich_help_panel=OUTPUT)
]
Backend = Annotated[
    str, typer.Option(metavar="NAME", help="auto, onnx, coreml or mlx.", show_default="auto", rich_help_panel=MACHINE)
]
Engine = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="What runs ONNX graphs on the CPU: auto, onnxruntime or openvino.",
        show_default="auto",
        rich_help_panel=MACHINE,
    ),
]
Providers = Annotated[
    list[str] | None,
    typer.Option(
        "--provider",
        metavar="NAME",
        help="ONNX Runtime execution provider (cpu, cuda, dml …), repeat by preference; for MLX gpu or cpu.",
        show_default="cpu, or MLX's GPU",
        rich_help_panel=MACHINE,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", "-t", metavar="N", help="Threads.", show_default="all cores", rich_help_panel=MACHINE),
]
LowRam = Annotated[
    bool,
    typer.Option(
        "--low-ram",
        help="Keep one component in memory at a time.",
        show_default="when memory is short",
        rich_help_panel=MACHINE,
    ),
]
Decoder = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="full, or tiny for one that was distilled to be quick.",
        show_default="full",
        rich_help_panel=MACHINE,
    ),
]
VaeTiling = Annotated[
    str,
    typer.Option(
        metavar="MODE",
        help="How the picture is decoded: auto, off (whole), exact or fast tiles.",
        show_default="auto",
        rich_help_panel=MACHINE,
    ),
]
VaeTileSize = Annotated[
    int | None,
    typer.Option(metavar="PX", help="Side of a tile.", show_default="what fits", rich_help_panel=MACHINE),
]
VaeTileOverlap = Annotated[
    int | None,
    typer.Option(
        metavar="PX",
        help="Most pixels that a tile may read beyond itself.",
        show_default="what is quickest",
        rich_help_panel=MACHINE,
    ),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Most memory while decoding, as 3G; a larger picture is decoded in tiles.",
        show_default="what is free",
        rich_help_panel=MACHINE,
    ),
]
GraphCache = Annotated[
    bool,
    typer.Option("--graph-cache", help="Keep optimised graphs on disk, to open faster.", rich_help_panel=MACHINE),
]
Interpreter = Annotated[
    bool,
    typer.Option(
        "--interpreter", help="Evaluate Core ML programs with numpy, on any OS (slow).", rich_help_panel=MACHINE
    ),
]
EmulateFp16 = Annotated[
    bool,
    typer.Option(
        "--emulate-fp16", help="With --interpreter: round to float16 as the programs say.", rich_help_panel=MACHINE
    ),
]
ComputeUnits = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="What Core ML may use: all, cpu, gpu or ne (Neural Engine).",
        show_default="all",
        rich_help_panel=MACHINE,
    ),
]
NoCache = Annotated[
    bool,
    typer.Option("--no-cache", help="Keep no prompt embeddings on disk.", rich_help_panel=MACHINE),
]
Offline = Annotated[
    bool, typer.Option("--offline", help="Never use the network, for a Hub id neither.", rich_help_panel=MACHINE)
]
