"""``qc compile``."""

from __future__ import annotations

import argparse
from pathlib import Path

from qc.backends.target import backend_for, split_targets
from qc.cli.output import accuracy_rows, byte_size, print_json, print_table
from qc.cli.progress import choose_progress
from qc.compiler import CompileResult, compile, compile_all, directory_of  # noqa: A004  the product verb
from qc.plan import parse_bytes
from qc.progress import Progress

__all__ = ["run"]


def run(arguments: argparse.Namespace) -> int:
    """Compiles for one target or several, and prints a table for each."""
    targets = split_targets(arguments.target)
    options = {
        "recipe": arguments.recipe,
        "passes": arguments.passes,
        "calib": arguments.calib,
        "samples": arguments.samples,
        "memory": parse_bytes(arguments.memory) if arguments.memory is not None else None,
        "exclude": arguments.exclude,
        "settings": arguments.settings,
        "seed": arguments.seed,
        "force": arguments.force,
        "resume": arguments.resume,
        "dry_run": arguments.dry_run,
        "verify": not arguments.no_verify,
        "progress": Progress() if arguments.json else choose_progress(),
    }
    if len(targets) == 1:
        result = compile(arguments.model, arguments.output, target=arguments.target, **options)
        if arguments.json:
            print_json(_data(result, arguments.output))
        elif result.artifact is not None:
            _print(result, arguments.output)
        return 0
    results = compile_all(arguments.model, arguments.output, targets, **options)
    places = {target: str(Path(arguments.output) / directory_of(target)) for target in targets}
    if arguments.json:
        print_json({"targets": {target: _data(result, places[target]) for target, result in results.items()}})
        return 0
    for target, result in results.items():
        if result.artifact is not None:
            print(f"\n{target}")
            _print(result, places[target])
    return 0


def _data(result: CompileResult, output: str) -> dict[str, object]:
    plan = result.plan
    return {
        "artifact": None if result.artifact is None else str(Path(output)),
        "plan": {
            "parameters": plan.parameters,
            "source_bytes": plan.source_bytes,
            "artifact_bytes": plan.artifact_bytes,
            "memory_bytes": plan.memory_bytes,
            "disk_bytes": plan.disk_bytes,
            "in_parts": plan.in_parts,
            "passes": [str(s) for s in plan.steps],
        },
        "report": dict(result.report),
        "speed": dict(result.speed),
        "seconds": dict(result.seconds),
    }


def _print(result: CompileResult, output: str) -> None:
    summary, coverage = result.report["summary"], result.report["coverage"]
    left = [s for s in result.report["sites"] if s["outcome"] == "skipped" and s["pass"].startswith("quantize")]
    rows = [
        ("artifact", output),
        ("size", f"{byte_size(summary['artifact_bytes'])} (source weights {byte_size(summary['source_bytes'])})"),
        *accuracy_rows(result.report["accuracy"]),
        (
            "speed here",
            ", ".join(_SPEED[key].format(v) for key, v in result.speed.items()) or _no_speed(result, output),
        ),
        ("kernels", f"{coverage['on_target']} nodes on target, {coverage['off_target']} on a slow path"),
        ("left in float", " ".join([f"{s['site']} ({s['reason']})" for s in left[:1]] + _more(left)) or "none"),
        ("time", ", ".join(f"{k} {v:.1f} s" for k, v in result.seconds.items())),
    ]
    print_table("", ("", ""), rows)
    text = result.artifact is not None and result.artifact.signature.generates
    use = f"qc run {output} --prompt TEXT" if text else f"qc run {output} --input IN.npz"
    print(f"\nnext: qc report {output}; {use}; qc bench {output}")


def _no_speed(result: CompileResult, output: str) -> str:
    if result.plan.in_parts:
        return f"not measured: the artifact was loaded in parts, to save memory; qc bench {output}"
    if backend_for(result.artifact.manifest.target).target.simulated:
        return "not measured: it runs in a simulator"
    return "not measured: no inputs"


def _more(left: list[dict]) -> list[str]:
    return [f"and {len(left) - 1} more"] if len(left) > 1 else []


_SPEED = {
    "decode_tok_s": "decode {:.0f} tokens/s",
    "prefill_ms": "prefill of 64 tokens {:.1f} ms",
    "latency_ms": "{:.2f} ms on the probe batch",
}
