"""The report of a load: one HTML file that needs nothing else, for screens, phones and paper."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from benchmarks.load import chart
from benchmarks.load.callers import Closed, Open
from benchmarks.load.chart import COLORS, Series
from benchmarks.load.percentiles import Estimate
from benchmarks.load.server_side import MIB, ServerTimes
from benchmarks.load.sweep import Point

SHOWN = (50, 95, 99, 99.9)

STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5d6675; --rule: #d9dde3; --paper: #fff;
  --c0: #1f6fb2; --c1: #d1651b; --c2: #2c8a4b; --c3: #8a4bb0; --c4: #b0304a; --c5: #7a6a1c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #9aa4b2; --rule: #343c48; --paper: #14181e;
  --c0: #69b3f0; --c1: #f2a35e; --c2: #6ecf8c; --c3: #c596ea; --c4: #f0849a; --c5: #d8c65a; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 78rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.6em; margin: 0 0 .3rem } h2 { font-size: 1.2em; margin: 2.2rem 0 .6rem }
p, figcaption, small, .key { color: var(--soft) } p { max-width: 46rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap }
th, td { text-align: right; padding: .3rem .7rem; border-bottom: 1px solid var(--rule) }
th { font-weight: 600; vertical-align: bottom } th:first-child, td:first-child { text-align: left; padding-left: 0 }
td small { display: block; font-size: .75rem; max-width: 12rem; white-space: normal; margin-left: auto }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); gap: 1.2rem }
figure { margin: 1rem 0 0; break-inside: avoid } figcaption { font-weight: 600; color: var(--ink) }
svg { width: 100%; height: auto; display: block } svg text { font-size: 12px; fill: var(--soft) }
.grid { stroke: var(--rule); fill: none } .line { fill: none; stroke-width: 2 }
.line-0 { stroke: var(--c0); color: var(--c0) } .line-1 { stroke: var(--c1); color: var(--c1) }
.line-2 { stroke: var(--c2); color: var(--c2) } .line-3 { stroke: var(--c3); color: var(--c3) }
.line-4 { stroke: var(--c4); color: var(--c4) } .line-5 { stroke: var(--c5); color: var(--c5) }
circle { fill: var(--paper); stroke-width: 2 }
.key { display: flex; flex-wrap: wrap; gap: 0 1rem } .key b { font-weight: 400; color: var(--soft) }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem } dt { color: var(--soft) }
dd { margin: 0; overflow-wrap: anywhere }
@media print { body { max-width: none; font-size: 9px; padding: 0 } .charts { grid-template-columns: 1fr 1fr 1fr }
  .wide { overflow: visible } th, td { padding: .2rem .4rem } th { white-space: normal } td small { font-size: .8em } }
"""


def render(points: Sequence[Point], about: dict[str, Any]) -> str:
    """Return the page.

    Args:
        points: All that was measured.
        about: Endpoint, plan and environment, as text or numbers under their names; one that holds more of the like is
            a line of them.
    """
    closed = [point for point in points if isinstance(point.load, Closed)]
    opened = [point for point in points if isinstance(point.load, Open)]
    sections = [_closed(closed), _opened(opened), _server(points), _about(about)]
    title = f"Load on {about['model']} at {about['address']}"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>\n"
        f"<h1>{escape(title)}</h1>\n<p>{escape(about['method'])}</p>\n{''.join(sections)}</body></html>\n"
    )


def _closed(points: Sequence[Point]) -> str:
    if not points:
        return ""
    columns = ["in flight", "images each", "images/s"]
    header = [*columns, *(f"p{percent:g} ms" for percent in SHOWN), "not answered", *_costs(points)]
    rows = [
        [str(in_flight), str(point.images), _rate(point), *_latencies(point), _failures(point), *_cost(point)]
        for in_flight, point in _in_flight(points)
    ]
    latencies, processors, memory = [], [], []
    for images in sorted({point.images for point in points}):
        group = [point for point in points if point.images == images]
        each = "1 image" if images == 1 else f"{images} images"
        for percent in (50, 99):
            found = [(point.images_per_second, found.value) for point, found in _found(group, percent)]
            latencies.append(Series(f"p{percent}, {each}", found))
        weighed = [(in_flight, point, point.usage) for in_flight, point in _in_flight(group) if point.usage]
        processors.append(Series(each, [(in_flight, point.cpu_ms_per_image or 0) for in_flight, point, _ in weighed]))
        memory.append(Series(each, [(in_flight, usage.peak_bytes / MIB) for in_flight, _, usage in weighed]))
    return _section(
        "So many requests in flight",
        "The next request goes out when one is answered. Latency in milliseconds, below it the interval that holds the "
        "true percentile with a confidence of 95 %, with ? where the samples are too few to know a bound; images per "
        "second as the median of the rounds, below it the lowest and the highest.",
        _table(header, rows),
        _figure("Latency over throughput", "images per second", "ms", latencies, log=True),
        _figure("What an image costs the server", "requests in flight", "CPU ms", processors),
        _figure("Memory of the server", "requests in flight", "MiB at most", memory),
    )


def _opened(points: Sequence[Point]) -> str:
    if not points:
        return ""
    offered = [(point, point.load.rate * point.images) for point in points if isinstance(point.load, Open)]
    columns = ["offered images/s", "answered/s", "in time/s"]
    header = [*columns, *(f"p{percent:g} ms" for percent in SHOWN), "not answered", "sent late ms", *_costs(points)]
    rows = [
        [
            f"{rate:,.0f}",
            _rate(point),
            f"{point.good_per_second:,.0f}",
            *_latencies(point),
            _failures(point),
            f"{point.late_ms:.2f}",
            *_cost(point),
        ]
        for point, rate in offered
    ]
    rates = {id(point): rate for point, rate in offered}
    latencies = [
        Series(f"p{percent:g}", [(rates[id(point)], found.value) for point, found in _found(points, percent)])
        for percent in (50, 99, 99.9)
    ]
    answers = [
        Series("offered", [(rate, rate) for _, rate in offered]),
        Series("answered", [(rate, point.images_per_second) for point, rate in offered]),
        Series("in time", [(rate, point.good_per_second) for point, rate in offered]),
    ]
    refused = [
        Series("not answered", [(rate, 100 * _refused_share(point)) for point, rate in offered]),
    ]
    return _section(
        "So many requests a second",
        "Requests go out at times that were drawn before, whatever becomes of those already sent, and latency counts "
        "from those times: a server that falls behind cannot slow the load down. Sent late is how far the load itself "
        "fell behind, at the 99th percentile.",
        _table(header, rows),
        _figure("Latency over offered rate", "offered images per second", "ms", latencies, log=True),
        _figure("Answers over offered rate", "offered images per second", "images per second", answers),
        _figure("Requests not answered", "offered images per second", "%", refused),
    )


def _server(points: Sequence[Point]) -> str:
    total, rows = ServerTimes(), []
    for point in points:
        if point.split and point.split.requests:
            total.add(point.split)
            means, batches = point.split.mean_ms(), point.split.batches.items()
            calls = sum(count for _, (count, _) in batches)
            mean = sum(size * count for size, (count, _) in batches) / calls if calls else 0
            rows.append([_name(point), *(f"{ms:.2f}" for ms in means.values()), f"{mean:.1f}"])
    if not rows:
        return ""
    cost = total.cost_ms()
    names = [f"{name} ms" for name in total.ns]
    return _section(
        "Where the server's time went",
        "By the server's own count: the mean of an answered request, and the images of a batch. Warm-up is included.",
        _table(["load", *names, "images a batch"], rows),
        _figure("What a batch costs", "images in the batch", "ms", [Series("compute", list(cost.items()))]),
        _figure(
            "What an image of it costs",
            "images in the batch",
            "ms",
            [Series("compute per image", [(size, ms / size) for size, ms in cost.items()])],
        ),
    )


def _about(about: dict[str, Any]) -> str:
    rows = []
    for name, value in about.items():
        text = ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else str(value)
        if text and name != "method":
            rows.append(f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(text)}</dd>")
    return f"<h2>Measured with</h2>\n<dl>{''.join(rows)}</dl>\n"


def _section(title: str, text: str, table: str, *figures: str) -> str:
    return f'<h2>{title}</h2>\n<p>{text}</p>\n{table}<div class="charts">{"".join(figures)}</div>\n'


def _table(header: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; a second line of a cell is small."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n'


def _cell(text: str) -> str:
    first, _, second = text.partition("\n")
    return f"<td>{escape(first)}{f'<small>{escape(second)}</small>' if second else ''}</td>"


def _figure(title: str, x_label: str, y_label: str, lines: Sequence[Series], log: bool = False) -> str:
    drawn = chart.draw(title, x_label, y_label, lines, log)
    if not drawn:
        return ""
    lines = [line for line in lines if line.points]
    names = [
        f'<span class="line-{number % COLORS}">● <b>{escape(line.name)}</b></span>' for number, line in enumerate(lines)
    ]
    key = f'<div class="key">{"".join(names)}</div>' if len(lines) > 1 else ""
    return f"<figure><figcaption>{title}</figcaption>{key}{drawn}</figure>\n"


def _found(points: Sequence[Point], percent: float) -> list[tuple[Point, Estimate]]:
    return [(point, found) for point in points if (found := point.percentile(percent))]


def _in_flight(points: Sequence[Point]) -> list[tuple[int, Point]]:
    return [(point.load.in_flight, point) for point in points if isinstance(point.load, Closed)]


def _name(point: Point) -> str:
    load = point.load
    if isinstance(load, Closed):
        return f"{load.in_flight} in flight of {point.images}"
    return f"{load.rate * point.images:,.0f} images/s"


def _rate(point: Point) -> str:
    rates = [sample.images_per_second for sample in point.samples]
    return f"{point.images_per_second:,.0f}\n{min(rates):,.0f} to {max(rates):,.0f}"


def _latencies(point: Point) -> list[str]:
    return [_latency(point.percentile(percent)) for percent in SHOWN]


def _latency(found: Estimate | None) -> str:
    if found is None:
        return "-"
    low, high = ("?" if bound is None else f"{bound:.2f}" for bound in (found.low, found.high))
    return f"{found.value:.2f}\n{low} to {high}"


def _failures(point: Point) -> str:
    if not point.failures:
        return "0"
    names = ", ".join(f"{count:,} {name}" for name, count in point.failures.most_common())
    return f"{_refused_share(point):.1%}\n{names}"


def _refused_share(point: Point) -> float:
    refused = point.failures.total()
    total = refused + sum(len(sample.latencies_ms) for sample in point.samples)
    return refused / total if total else 0.0


def _costs(points: Sequence[Point]) -> list[str]:
    return ["CPU ms/image", "peak MiB"] if any(point.usage for point in points) else []


def _cost(point: Point) -> list[str]:
    if not point.usage:
        return []
    return [f"{point.cpu_ms_per_image or 0:.2f}", f"{point.usage.peak_bytes / MIB:,.0f}"]
