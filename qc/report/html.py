"""The report as one self-contained page. Importing this needs the ``report`` extra (jinja2)."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping

import jinja2

__all__ = ["render"]

_FIGURES = (
    ("ppl", "perplexity", "{:.2f}"),
    ("ppl_reference", "perplexity in float", "{:.2f}"),
    ("kl", "KL to float, nats per token", "{:.4f}"),
    ("top1", "top-1 agreement with float", "{:.1%}"),
    ("cosine", "cosine to float, mean", "{:.4f}"),
    ("cosine_min", "cosine to float, smallest", "{:.4f}"),
    ("sqnr_db", "SQNR", "{:.1f} dB"),
)
"""What is shown of the accuracy: key, label, spelling."""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>qc report: {{ summary.recipe }} on {{ summary.target }}</title>
<style>
:root { color-scheme: light dark; --line: #8884; --mute: #777; --good: #2a8f4f; --warn: #b7791f; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; } .scroll { overflow-x: auto; }
th, td { text-align: left; padding: .3rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .8rem; }
.card { border: 1px solid var(--line); border-radius: .5rem; padding: .7rem 1rem; }
.card b { display: block; font-size: 1.35rem; } .card span, .mute { color: var(--mute); font-size: .85rem; }
.changed { color: var(--good); } .skipped { color: var(--warn); } code { font-size: .9em; overflow-wrap: anywhere; }
details summary { cursor: pointer; }
</style></head><body>
<h1>{{ summary.recipe }} <span class="mute">on {{ summary.target }}</span></h1>
<div class="cards">
<div class="card"><b>{{ summary.artifact_bytes | mib }}</b><span>artifact (weights and graph)</span></div>
<div class="card"><b>{{ summary.source_bytes | mib }}</b><span>source weights</span></div>
{% for label, value in figures -%}
<div class="card"><b>{{ value }}</b><span>{{ label }}</span></div>
{% endfor -%}
<div class="card"><b>{{ coverage.on_target }} / {{ coverage.on_target + coverage.off_target }}</b>
<span>nodes on the target's kernels</span></div>
</div>
{% if accuracy.measured_on %}<p class="mute">Accuracy measured on the artifact, in its runtime,
against the float model, on {{ accuracy.measured_on }}.</p>{% endif %}
<h2>Passes</h2><div class="scroll"><table>
<tr><th>pass</th><th>contract</th><th class="n">changed</th><th class="n">skipped</th>
<th>outputs before / after</th></tr>
{% for p in passes -%}
<tr><td><code>{{ p.spec }}</code>{% for n in p.notes %}<br><span class="mute">{{ n }}</span>{% endfor %}</td>
<td>{{ p.contract }}</td><td class="n">{{ p.sites.changed }}</td><td class="n">{{ p.sites.skipped }}</td>
<td>{% if p.differences %}{% set d = p.differences | first %}{{ d.output }}:
{{ "equal" if d.sqnr_db is none else "%.1f dB" | format(d.sqnr_db) }}{% else %}<span class="mute">unchanged</span>
{% endif %}</td></tr>
{% endfor %}</table></div>
{% for p in passes if p.blocks -%}
<h2>Blocks, against the float model</h2><div class="scroll"><table>
<tr><th>block</th><th class="n">input, dB</th><th class="n">output, dB</th></tr>
{% for b in p.blocks if b.after_db is not none -%}
<tr><td>{{ b.block }}</td><td class="n">{{ b.before_db | figure }}</td><td class="n">{{ b.after_db | figure }}</td></tr>
{% endfor %}</table></div>
{% endfor -%}
<h2>Weights, the worst first</h2><div class="scroll"><table>
<tr><th>site</th><th>format</th><th class="n">bits per weight</th><th class="n">SQNR, dB</th></tr>
{% for s in weights -%}
<tr><td><code>{{ s.site }}</code></td><td>{{ s.format }}</td><td class="n">{{ s.bits_per_weight | figure }}</td>
<td class="n">{{ s.sqnr_db | figure }}</td></tr>
{% else %}<tr><td colspan="4" class="mute">No weight was quantized.</td></tr>
{% endfor %}</table></div>
{% if exclude %}<p class="mute">To keep the worst one in float: <code>{{ exclude }}</code></p>{% endif %}
<h2>Left as it was, and why</h2><div class="scroll"><table>
{% for s in left -%}
<tr><td><code>{{ s.site }}</code></td><td>{{ s["pass"] }}</td><td class="skipped">{{ s.reason }}</td></tr>
{% else %}<tr><td class="mute">Every site was changed.</td></tr>
{% endfor %}</table></div>
<h2>Coverage</h2><div class="scroll"><table>
<tr><th>operator</th><th class="n">nodes</th><th>where</th><th>why</th></tr>
{% for n in coverage.nodes -%}
<tr><td><code>{{ n.op }}</code></td><td class="n">{{ n.count }}</td>
<td class="{{ 'changed' if n.on_target else 'skipped' }}">{{ "on target" if n.on_target else "slow path" }}</td>
<td>{{ n.reason }}</td></tr>
{% endfor %}</table></div>
{% if coverage.accelerators -%}
<h2>Accelerators</h2><div class="scroll"><table>
<tr><th></th><th>takes</th><th>if shapes were fixed</th><th>but not</th></tr>
{% for a in coverage.accelerators -%}
<tr><td>{{ a.name }}</td>{% for f in (a.as_is, a.fixed_shapes | default(none)) -%}
<td>{% if f %}{{ f.nodes }} of {{ f.of }} nodes in {{ f.partitions }} parts: {{ f.verdict }}{% endif %}</td>
{%- endfor %}<td>{{ a.unsupported | join(", ") }}</td></tr>
{% endfor %}</table></div>
{%- endif %}
</body></html>
"""


def render(report: Mapping[str, object]) -> str:
    """Returns the page of a report, with no reference to anything outside it."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["mib"] = lambda count: f"{count / (1 << 20):,.1f} MiB"
    environment.filters["figure"] = lambda value: "" if value is None else f"{value:.4g}"
    accuracy: Mapping = report["accuracy"]  # type: ignore[assignment]
    figures = [
        (label, spelling.format(accuracy[key])) for key, label, spelling in _FIGURES if accuracy.get(key) is not None
    ]
    sites: list[dict] = list(report["sites"])  # type: ignore[call-overload]
    weights = [s for s in sites if s["outcome"] == "changed" and s.get("bits_per_weight") is not None]
    weights.sort(key=lambda s: (s.get("sqnr_db") is None, s.get("sqnr_db")))
    worst = next((s["site"] for s in weights if s.get("sqnr_db") is not None), None)
    exclude = None if worst is None else f"--exclude {shlex.quote('^' + re.escape(worst) + '$')}"
    left = [s for s in sites if s["outcome"] == "skipped" and s["pass"].startswith("quantize")]
    return environment.from_string(_PAGE).render(**report, figures=figures, weights=weights, left=left, exclude=exclude)
