"""The status page: the models, their queues and last metrics, and the memory of the server."""

from __future__ import annotations

import math
import time
from html import escape
from typing import Any

from lossfns.server.service import Service, resident_bytes
from lossfns.version import __version__

REFRESH_SECONDS = 2

STYLE = """
:root { color-scheme: light dark; --line: #8884; --faint: #888; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
dl { display: flex; flex-wrap: wrap; gap: .5rem 2.5rem; margin: 0; }
dt { color: var(--faint); font-size: .85rem; } dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; width: 100%; } .wide { overflow-x: auto; }
th, td { text-align: left; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--faint); font-weight: normal; font-size: .85rem; }
td.number { font-variant-numeric: tabular-nums; } code { font-size: .85rem; overflow-wrap: anywhere; }
.none { color: var(--faint); }
"""


def status(service: Service) -> dict[str, Any]:
    """Return what the page shows, as plain data."""
    return {
        "version": __version__,
        "state": "stopping" if service.stopping else "running",
        "seconds": round(time.monotonic() - service.started, 1),
        "sessions": sum(not session.finished for session in service.sessions.values()),
        "base_models": [m.model_name for m in service.local.get_server_capabilities().supported_models],
        "models": [
            {
                "model_id": model.model_id,
                "base_model": model.base_model,
                "requests": model.next_seq - 1 - (model.running is not None),
                "running": model.running.kind if model.running else None,
                "waiting": len(model.waiting),
                "metrics": {k: x for last in model.metrics.values() for k, x in last.items() if math.isfinite(x)},
                "idle_seconds": round(time.time() - model.last_request, 1),
            }
            for model in service.models.values()
        ],
        "samplers": len(service.samplers),
        "samplers_loaded": sum(sampler.client is not None for sampler in service.samplers.values()),
        "results": len(service.futures.by_id),
        "result_bytes": service.futures.bytes,
        "memory_bytes": resident_bytes(),
    }


def page(service: Service) -> str:
    """Return the page as HTML, which loads itself again every few seconds."""
    now = status(service)
    facts = {
        "server": f"{now['state']} for {span(now['seconds'])}",
        "memory": size(now["memory_bytes"]),
        "sessions": str(now["sessions"]),
        "models": str(len(now["models"])),
        "requests that wait": str(sum(model["waiting"] for model in now["models"])),
        "samplers": f"{now['samplers']} ({now['samplers_loaded']} loaded)",
        "results kept": f"{now['results']} ({size(now['result_bytes'])})",
    }
    facts_html = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    names = ", ".join(f"<code>{escape(name)}</code>" for name in now["base_models"])
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>lossfns serve</title>'
        f'<meta http-equiv="refresh" content="{REFRESH_SECONDS}">'
        f'<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
        f"<style>{STYLE}</style></head><body>"
        f"<h1>lossfns serve {escape(now['version'])}</h1><dl>{facts_html}</dl>"
        f"<h2>Base models</h2><p>{names}</p><h2>Models</h2>{table(now['models'])}"
        f'<p class="none">The same as JSON: <a href="/status.json">status.json</a></p></body></html>'
    )


def table(models: list[dict[str, Any]]) -> str:
    if not models:
        return '<p class="none">none yet: create_lora_training_client creates one</p>'
    head = "".join(f"<th>{name}</th>" for name in ("model", "base", "done", "waiting", "running", "last metrics"))
    rows = []
    for model in models:
        metrics = "<br>".join(f"{escape(name)} {x:.5g}" for name, x in sorted(model["metrics"].items()))
        running = model["running"] or f'<span class="none">idle {span(model["idle_seconds"])}</span>'
        cells = (
            f"<td><code>{escape(model['model_id'])}</code></td><td>{escape(model['base_model'])}</td>"
            f'<td class="number">{model["requests"]}</td><td class="number">{model["waiting"]}</td>'
            f'<td>{running}</td><td class="number">{metrics}</td>'
        )
        rows.append(f"<tr>{cells}</tr>")
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def span(seconds: float) -> str:
    """Return seconds as text."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def size(count: int | None) -> str:
    """Return a number of bytes as text."""
    return (
        "not known" if count is None else f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
    )
