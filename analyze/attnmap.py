#!/usr/bin/env python3
"""Draw what a token of Vim or VMamba takes from every other one: the attention hidden in its selective scans.

python analyze/attnmap.py --image examples/digits/samples/three.png \\
    --checkpoint examples/digits/vim_pico_digits.safetensors --output map.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "vim"), str(ROOT)]

from analyze.commands import (  # noqa: E402
    CHECKPOINT_HELP,
    MODEL_HELP,
    add_run_flags,
    figure_class,
    load_network,
    read_size,
    running,
    set_threads,
    write_figure,
)
from command_line import note, run_script  # noqa: E402

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor, nn

    from analyze.panels import Row
    from analyze.recording import Recording
    from classify import Classifier

MODES = ("CB", "CBdt", "CwBw", "CwBdtw", "ww")
CLASS_TOKEN = "cls"


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description="Draw attention maps of a Vim or VMamba.",
        epilog="X,Y are pixels of the model's input (the picture is resized and its middle cut out), from its upper "
        "left corner; the drawing has them on its axes. Exit code: 0, 1 if some pictures failed, 2 if all did or "
        "the command cannot be carried out.",
    )
    add = parser.add_argument
    add("--image", nargs="+", required=True, metavar="PICTURE", help="file, folder, glob pattern or web address")
    add("--output", required=True, metavar="PATH", help="the drawing (.png, .jpg ...); a folder if there are several")
    add("--model", metavar="NAME", help=MODEL_HELP)
    add("--checkpoint", metavar="WEIGHTS", help=CHECKPOINT_HELP)
    add("--query", nargs="+", type=_query, metavar="X,Y",
        help="the token that looks: a pixel in its patch, or cls for the class token; several are drawn below each "
        "other (default: cls where there is one, else the middle)")  # fmt: skip
    add("--stage", type=int, metavar="N", help="stage, from 0 (default: 2 of VMamba; Vim has only 0)")
    add("--block", type=int, metavar="N",
        help="block of the stage, from 0; -1 is the last (default: 1 in VMamba, the last in Vim)")  # fmt: skip
    add("--mode", choices=MODES, default="CwBdtw",
        help="what the map is made of: C and B, with or without dt and the decay (w); CwBdtw is the scan itself "
        "(default: %(default)s)")  # fmt: skip
    add("--ret", nargs="+", metavar="MAP",
        help="a0 a1 ...: one direction; ao0 ao1 ...: in the order in which it runs; all: their sum; nall: the mean of "
        "the normalised ones (default: every direction and all)")  # fmt: skip
    norms = parser.add_mutually_exclusive_group()
    norms.add_argument("--norm", action="store_true", help="show (x - min) / (max - min) of the whole map")
    norms.add_argument("--absnorm", action="store_true", help="show |x| / max |x| of the whole map")
    add(
        "--rollout", action="store_true", help="follow the attention through all blocks of the stage; implies --absnorm"
    )
    add_run_flags(parser)
    return parser


def _query(text: str) -> tuple[int, int] | str:
    """Read "X,Y" or "cls"."""
    if text == CLASS_TOKEN:
        return text
    try:
        x, y = (int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be X,Y in pixels, such as 16,8, or cls, got {text!r}") from None
    return x, y


def draw_all(args: argparse.Namespace) -> int:
    """Do what the command line says and return the exit code.

    Raises:
        UsageError, CheckpointError, PictureError: nothing can be done; one sentence says why.
    """
    from drawing import plan_outputs
    from pictures import PictureError, find_pictures, open_picture

    figure_class()  # says now if it is missing
    sources = find_pictures(args.image)
    outputs = plan_outputs(args.output, sources)
    set_threads(args.threads)
    network = load_network(args.model, args.checkpoint, read_size(args.img_size), args.device)
    mixers, title = _choose(network, args)
    failures = 0
    for source in sources:
        try:
            _draw(network, mixers, open_picture(source), args, title, outputs[source])
            note(f"written: {outputs[source]}")
        except PictureError as error:
            failures += 1
            note(f"error: {error}")
    return 0 if not failures else 1 if failures < len(sources) else 2


def _choose(network: Classifier, args: argparse.Namespace) -> tuple[list[nn.Module], str]:
    """Return the mixers to record and the title that says which they are."""
    from analyze.recording import mixers_by_stage
    from flags import UsageError

    stages = mixers_by_stage(network.model)
    if not stages:
        raise UsageError(
            f"{network.model_name} has no selective scans, so it has no maps of them; take a Vim or a VMamba, such as "
            "vmamba_tiny_s1l8"
        )
    only = len(stages) == 1
    stage = _index("--stage", (0 if only else min(2, len(stages) - 1)) if args.stage is None else args.stage, stages)
    blocks = stages[stage]
    block = _index("--block", (-1 if only else min(1, len(blocks) - 1)) if args.block is None else args.block, blocks)
    where = f"{network.model_name}, " + ("" if only else f"stage {stage}, ")
    if args.rollout:
        return blocks, f"{where}rollout through {len(blocks)} blocks, mode {args.mode}"
    return [blocks[block]], f"{where}block {block}, mode {args.mode}"


def _index(flag: str, value: int, items: Sequence[Any]) -> int:
    from flags import UsageError

    if not -len(items) <= value < len(items):
        raise UsageError(f"{flag} {value} is not there: the last one is {len(items) - 1}, counted from 0")
    return value % len(items)


def _draw(
    network: Classifier, mixers: list[nn.Module], picture: Image.Image, args: argparse.Namespace, title: str, path: Path
) -> None:
    """Record one picture, draw its maps and write them.

    Raises:
        PictureError: the network gives no numbers that can be drawn.
    """
    from analyze.panels import draw_rows
    from analyze.recording import record
    from pictures import PictureError

    seen = network.transform.crop(picture)
    batch = network.transform(picture)[None].to(network.device)
    with running(network):
        recordings = record(network.model, batch, mixers)
        rows = _rows(recordings, args, seen.size)
    if not all(bool(heat.values.isfinite().all()) for row in rows for heat in row.maps):
        raise PictureError("the maps hold numbers that are not finite: the weights are damaged, or of another network")
    trained = "" if network.source else " (random weights)"
    norm = ", (x - min) / (max - min)" if args.norm else ", |x| / max |x|" if args.absnorm or args.rollout else ""
    write_figure(draw_rows(seen, rows, f"{title}{norm}{trained}"), path)


def _rows(recordings: Sequence[Recording], args: argparse.Namespace, size: tuple[int, int]) -> list[Row]:
    """Compute the maps of every query: (width, height) is the size of the model's input in pixels."""
    from tqdm import tqdm

    from analyze.attention import check_map_name, map_names
    from analyze.panels import HeatMap, Row

    last = recordings[-1]
    names = args.ret or [f"a{k}" for k in range(len(last.directions))] + ["all"]
    for name in names:
        check_map_name(name, map_names(last))
    queries = args.query or [CLASS_TOKEN if last.class_rows else (size[0] // 2, size[1] // 2)]
    tokens = [_tokens(query, last, size) for query in queries]
    total = len(names) * (len(recordings) if args.rollout else 1)
    with tqdm(total=total, desc="maps", unit="map", leave=False, disable=None) as bar:
        maps = [_maps(recordings, name, tokens, args, bar.update) for name in names]
    return [
        Row(
            "query: class token" if query == CLASS_TOKEN else f"query: {query[0]},{query[1]}",
            None if query == CLASS_TOKEN else query,
            [
                HeatMap(_describe(name, last), found[number].reshape(last.grid), not name.startswith("ao"))
                for name, found in zip(names, maps, strict=True)
            ],
        )
        for number, query in enumerate(queries)
    ]


def _tokens(query: tuple[int, int] | str, recording: Recording, size: tuple[int, int]) -> list[int]:
    """Return the tokens of a query: one patch, or the class tokens."""
    from flags import UsageError

    if isinstance(query, str):
        if not recording.class_rows:
            raise UsageError("this model has no class token; give --query as X,Y")
        return list(recording.class_rows)
    (x, y), (width, height), (rows, columns) = query, size, recording.grid
    if not (0 <= x < width and 0 <= y < height):
        raise UsageError(f"--query {x},{y} lies outside the model's input of {width} x {height} pixels")
    return [recording.patch_tokens[y * rows // height * columns + x * columns // width]]


def _maps(
    recordings: Sequence[Recording],
    name: str,
    tokens: Sequence[list[int]],
    args: argparse.Namespace,
    advance: Callable[[], object],
) -> list[Tensor]:
    """Return one map, as the values of the patches, for each query; the mean of its tokens' if these are several.

    `advance` is called after each (l, l) map of a block, or its rows if no more is needed.
    """
    import torch

    from analyze.attention import attention_map, attention_row, rollout

    absnorm = 1 if args.norm else 2 if args.absnorm or args.rollout else 0
    last = recordings[-1]
    raw = last.directions[int(name[2:])] if name.startswith("ao") else None
    shown = last.patch_tokens if raw is None else sorted(raw.places[last.patch_tokens].tolist())
    if not (absnorm or name == "nall"):
        rows = [torch.stack([attention_row(last, token, args.mode, name) for token in some]) for some in tokens]
        advance()
        return [row.mean(0)[shown] for row in rows]

    def whole(recording: Recording) -> Tensor:
        found = attention_map(recording, args.mode, name, absnorm)
        advance()
        return found

    found = rollout(map(whole, recordings)) if args.rollout else whole(last)
    at = [some if raw is None else raw.places[some].tolist() for some in tokens]
    return [found[some].mean(0)[shown] for some in at]


def _describe(name: str, recording: Recording) -> str:
    if name in ("all", "nall"):
        return {"all": "all: sum of the directions", "nall": "nall: mean of the normalised"}[name]
    words = recording.directions[int(name.removeprefix("ao").removeprefix("a"))].name
    return f"{name}: {words}" + (", as it runs" if name.startswith("ao") else "")


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return run_script(build_parser(), draw_all, arguments)


if __name__ == "__main__":
    sys.exit(run())
