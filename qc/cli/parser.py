"""Every command and option of ``qc``. Imports nothing but argparse, so that ``qc --help`` answers at once."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable

__all__ = ["build_parser"]

_MODEL = "a Hugging Face directory, an .onnx file, a .pt2 exported program, or builtin:tiny-llama"
_ARTIFACT = "an artifact: a directory that `qc compile -o` wrote"
_EXIT_CODES = (
    "exit codes: 0 done, 2 bad usage or input, 3 unsupported by the target, 4 a contract was broken, 130 interrupted, "
    "1 our bug"
)


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser; each command sets ``command`` to the function that runs it."""
    parser = argparse.ArgumentParser(
        prog="qc",
        description="A quantizing model compiler: model in, small, fast, measured artifact out.",
        epilog="start with: qc compile builtin:tiny-llama -o out. " + _EXIT_CODES,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    c = _command(commands, "compile", "compile a model into an artifact directory", "compile:run")
    c.add_argument("model", metavar="MODEL", help=_MODEL)
    c.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="DIR",
        help="where the artifact will stand; appears complete or not at all",
    )
    c.add_argument(
        "--target",
        default="ort-cpu",
        metavar="NAME[,NAME...]",
        help="what it shall run on, see `qc targets`; each of several gets a directory in DIR (default: %(default)s)",
    )
    how = c.add_mutually_exclusive_group()
    how.add_argument("--recipe", metavar="NAME|FILE", help="see `qc recipes` (default: the target's, w4 for most)")
    how.add_argument(
        "--passes", metavar="PIPELINE", help='in place of a recipe: "name{option=value},name"; see `qc passes`'
    )
    c.add_argument(
        "--calib",
        metavar="FILE",
        help="what to calibrate on: text (a sentence a line for encoders; it is measured on too), .jsonl with text, "
        "messages or input_ids (with target or labels for encoder-decoders), .npy token ids, .npz arrays, an image, or "
        "a directory of arrays or images; default: sample.txt beside the model, else random inputs",
    )
    c.add_argument(
        "--samples", type=_positive, metavar="N", help="calibrate on at most so many windows, texts or batches"
    )
    c.add_argument(
        "--memory",
        metavar="SIZE",
        help="refuse to start if more memory is needed, such as 8G; activations beyond it go to files",
    )
    c.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="REGEX",
        help="leave weights in float whose name in `qc report` matches anywhere (repeatable)",
    )
    c.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="PASS.OPTION=VALUE",
        help="change an option of the recipe, such as quantize-weights.group=64 (repeatable)",
    )
    c.add_argument("--seed", type=_natural, default=0, help="seed of everything random (default: %(default)s)")
    c.add_argument("--force", action="store_true", help="replace an artifact that stands at DIR")
    c.add_argument(
        "--resume", action="store_true", help="go on with the blocks that a killed compile to DIR has finished"
    )
    c.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    c.add_argument(
        "--no-verify", action="store_true", help="do not compare outputs after each pass (structure is always checked)"
    )
    _json(c)

    c = _command(commands, "run", "run an artifact: generate text, or map an .npz to an .npz", "run:run")
    c.add_argument("artifact", metavar="DIR", help=_ARTIFACT)
    what = c.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT", help="generate a continuation, or an encoder-decoder's answer")
    what.add_argument("--input", metavar="IN.npz", help="arrays by input name")
    c.add_argument("--output", metavar="OUT.npz", help="where the outputs go, with --input")
    c.add_argument("--max-tokens", type=_positive, default=64, metavar="N", help="with --prompt (default: %(default)s)")
    c.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="draw tokens, with logits divided by T; 0: always the likeliest (default: 0, or 1 with the next three)",
    )
    c.add_argument("--top-k", type=_natural, metavar="K", help="draw from the K likeliest tokens (default: from all)")
    c.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the likeliest that hold this share of the probability"
    )
    c.add_argument("--seed", type=_natural, metavar="N", help="of the draws; an equal one repeats a text (default: 0)")
    c.add_argument("--threads", type=_natural, default=0, metavar="N", help="0: one per core (default)")

    c = _command(commands, "eval", "measure accuracy against the float model", "evaluate:run")
    c.add_argument("model", metavar="DIR|MODEL", help="an artifact, or " + _MODEL)
    c.add_argument("--reference", metavar="MODEL", help="the float model to compare with: " + _MODEL)
    data = c.add_mutually_exclusive_group()
    data.add_argument(
        "--text",
        metavar="FILE",
        help="text or .jsonl as for `qc compile --calib`: perplexity, KL and top-1 agreement; for sentence encoders "
        "one sentence per line; default: sample.txt beside the model",
    )
    data.add_argument("--input", metavar="FILE.npz", help="arrays by input name: cosine, SQNR")
    c.add_argument(
        "--window",
        type=_positive,
        default=256,
        metavar="N",
        help="tokens in a window of the text (default: %(default)s)",
    )
    c.add_argument(
        "--windows", type=_positive, default=64, metavar="N", help="at most so many windows (default: %(default)s)"
    )
    c.add_argument("--threads", type=_natural, default=0, metavar="N", help="0: one per core (default)")
    _json(c)

    c = _command(commands, "bench", "measure speed; two artifacts are alternated in one process", "bench:run")
    c.add_argument("artifact", metavar="DIR", help=_ARTIFACT)
    c.add_argument("--vs", metavar="DIR2", help="compare with this artifact; ratios above 1: the first is faster")
    c.add_argument(
        "--threads", type=_natural, default=1, metavar="N", help="threads within an operator (default: %(default)s)"
    )
    _json(c)

    c = _command(commands, "inspect", "look into a model or an artifact", "inspect:run")
    c.add_argument("model", metavar="MODEL|DIR", help=_MODEL + ", or an artifact")
    c.add_argument("--sizes", action="store_true", help="where the bytes are (default)")
    c.add_argument("--blocks", action="store_true", help="the repeated blocks, found from the graph")
    c.add_argument("--groups", action="store_true", help="the channel groups: what may be done to which channels")
    c.add_argument("--outliers", action="store_true", help="channels of activations and weights that stand out")
    c.add_argument("--formats", action="store_true", help="the error of every weight in every format, at its bits")
    c.add_argument("--plot", metavar="FILE.svg", help="with --formats: error against bits as a picture")
    c.add_argument("--graph", action="store_true", help="the readable text form")
    _json(c)

    for name, about in (
        ("report", "print an artifact's report"),
        ("verify", "check every file of an artifact against its manifest, load it and run it"),
    ):
        c = _command(commands, name, about, f"artifact:{name}")
        c.add_argument("artifact", metavar="DIR", help=_ARTIFACT)
        _json(c)
    for name, about in (
        ("recipes", "list the recipes"),
        ("passes", "list the passes and their options"),
        ("targets", "list the targets"),
        ("formats", "list the weight formats"),
        ("doctor", "check this machine: versions, kernels, extras"),
    ):
        _json(_command(commands, name, about, f"listings:{name}"))
    return parser


def _natural(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected a whole number, 0 or more; found {text!r}")
    return int(text)


def _positive(text: str) -> int:
    number = _natural(text)
    if number == 0:
        raise argparse.ArgumentTypeError("expected a whole number, 1 or more; found 0")
    return number


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        import qc

        print(f"qc {qc.__version__}")
        parser.exit()


def _command(commands: argparse._SubParsersAction, name: str, about: str, where: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".", epilog=_EXIT_CODES)
    parser.set_defaults(command=_lazy(where))
    return parser


def _lazy(where: str) -> Callable[[argparse.Namespace], int | None]:
    """A function that imports ``module:function`` of this package when called."""
    module, _, function = where.partition(":")

    def call(arguments: argparse.Namespace) -> int | None:
        return getattr(importlib.import_module(f"qc.cli.{module}"), function)(arguments)

    return call


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="machine-readable output; its keys are stable")
