"""The report of `resnet load`: one self-contained HTML file, for screens, phones and paper."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from benchmarks.load.generator import ClosedLoop, OpenLoop
from benchmarks.load.percentiles import Estimate
from benchmarks.load.report import chart
from benchmarks.load.report.chart import COLORS, Series
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
        points: All points that were measured.
        about: Endpoint, method and environment: text and numbers by name; a nested dictionary is shown on one line.
    """
    closed = [point for point in points if isinstance(point.load, ClosedLoop)]
    opened = [point for point in points if isinstance(point.load, OpenLoop)]
    sections = [_render_closed(closed), _render_open(opened), _render_server(points), _render_about(about)]
    title = f"Load on {about['model']} at {about['address']}"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>\n"
        f"<h1>{escape(title)}</h1>\n<p>{escape(about['method'])}</p>\n{''.join(sections)}</body></html>\n"
    )


def _render_closed(points: Sequence[Point]) -> str:
    if not points:
        return ""
    columns = ["in flight", "images per request", "images/s"]
    header = [*columns, *(f"p{percent:g} ms" for percent in SHOWN), "not answered", *_usage_header(points)]
    rows = [
        [str(in_flight), str(point.images), _rate(point), *_latencies(point), _failures(point), *_usage_cells(point)]
        for in_flight, point in _in_flight(points)
    ]
    latencies, cpu, memory = [], [], []
    for images in sorted({point.images for point in points}):
        group = [point for point in points if point.images == images]
        name = "1 image" if images == 1 else f"{images} images"
        for percent in (50, 99):
            line = [(point.images_per_second, estimate.value) for point, estimate in _estimates(group, percent)]
            latencies.append(Series(f"p{percent}, {name}", line))
        used = [(in_flight, point, point.usage) for in_flight, point in _in_flight(group) if point.usage]
        cpu.append(Series(name, [(in_flight, point.cpu_ms_per_image or 0) for in_flight, point, _ in used]))
        memory.append(Series(name, [(in_flight, usage.peak_bytes / MIB) for in_flight, _, usage in used]))
    return _section(
        "Closed loop: constant requests in flight",
        "The next request is sent when one is answered. Latency is in milliseconds, with its 95 % confidence interval "
        "below; ? marks a bound for which there are too few samples. Images per second are the median of the rounds, "
        "with the lowest and the highest round below.",
        _table(header, rows),
        _figure("Latency over throughput", "images per second", "ms", latencies, log=True),
        _figure("CPU time per image", "requests in flight", "CPU ms", cpu),
        _figure("Peak memory of the server", "requests in flight", "MiB", memory),
    )


def _render_open(points: Sequence[Point]) -> str:
    if not points:
        return ""
    offered = [(point, point.load.rate * point.images) for point in points if isinstance(point.load, OpenLoop)]
    columns = ["offered images/s", "answered/s", "in time/s"]
    header = [
        *columns,
        *(f"p{percent:g} ms" for percent in SHOWN),
        "not answered",
        "sent late ms",
        *_usage_header(points),
    ]
    rows = [
        [
            f"{rate:,.0f}",
            _rate(point),
            f"{point.good_per_second:,.0f}",
            *_latencies(point),
            _failures(point),
            f"{point.late_ms:.2f}",
            *_usage_cells(point),
        ]
        for point, rate in offered
    ]
    rates = {id(point): rate for point, rate in offered}
    latencies = [
        Series(f"p{percent:g}", [(rates[id(point)], estimate.value) for point, estimate in _estimates(points, percent)])
        for percent in (50, 99, 99.9)
    ]
    answers = [
        Series("offered", [(rate, rate) for _, rate in offered]),
        Series("answered", [(rate, point.images_per_second) for point, rate in offered]),
        Series("in time", [(rate, point.good_per_second) for point, rate in offered]),
    ]
    failures = [Series("not answered", [(rate, 100 * _failure_share(point)) for point, rate in offered])]
    return _section(
        "Open loop: constant rate of requests",
        "Requests are sent at times drawn in advance, whether earlier ones are answered or not, and latency counts "
        "from those times: a server that falls behind cannot slow the load down. Sent late is the 99th percentile of "
        "the delay of the load generator itself.",
        _table(header, rows),
        _figure("Latency over offered rate", "offered images per second", "ms", latencies, log=True),
        _figure("Answers over offered rate", "offered images per second", "images per second", answers),
        _figure("Requests not answered", "offered images per second", "%", failures),
    )


def _render_server(points: Sequence[Point]) -> str:
    total, rows = ServerTimes(), []
    for point in points:
        if point.server_times and point.server_times.requests:
            total.add(point.server_times)
            means, batches = point.server_times.mean_ms(), point.server_times.batches.items()
            runs = sum(count for _, (count, _) in batches)
            mean = sum(size * count for size, (count, _) in batches) / runs if runs else 0
            rows.append([_name(point), *(f"{ms:.2f}" for ms in means.values()), f"{mean:.1f}"])
    if not rows:
        return ""
    batch_ms = total.batch_ms()
    names = [f"{stage} ms" for stage in total.ns]
    return _section(
        "Where the server's time went",
        "By the server's own statistics: mean times of an answered request, and the mean batch size. Warm-up is "
        "included.",
        _table(["load", *names, "images per batch"], rows),
        _figure("Compute time of a batch", "images per batch", "ms", [Series("compute", list(batch_ms.items()))]),
        _figure(
            "Compute time per image",
            "images per batch",
            "ms",
            [Series("compute per image", [(size, ms / size) for size, ms in batch_ms.items()])],
        ),
    )


def _render_about(about: dict[str, Any]) -> str:
    rows = []
    for name, value in about.items():
        text = ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else str(value)
        if text and name != "method":
            rows.append(f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(text)}</dd>")
    return f"<h2>Measured with</h2>\n<dl>{''.join(rows)}</dl>\n"


def _section(title: str, text: str, table: str, *figures: str) -> str:
    return f'<h2>{title}</h2>\n<p>{text}</p>\n{table}<div class="charts">{"".join(figures)}</div>\n'


def _table(header: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; the second line of a cell is set in small type."""
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


def _estimates(points: Sequence[Point], percent: float) -> list[tuple[Point, Estimate]]:
    return [(point, estimate) for point in points if (estimate := point.percentile(percent))]


def _in_flight(points: Sequence[Point]) -> list[tuple[int, Point]]:
    return [(point.load.in_flight, point) for point in points if isinstance(point.load, ClosedLoop)]


def _name(point: Point) -> str:
    load = point.load
    if isinstance(load, ClosedLoop):
        return f"{load.in_flight} in flight of {point.images}"
    return f"{load.rate * point.images:,.0f} images/s"


def _rate(point: Point) -> str:
    rates = [sample.images_per_second for sample in point.samples]
    return f"{point.images_per_second:,.0f}\n{min(rates):,.0f} to {max(rates):,.0f}"


def _latencies(point: Point) -> list[str]:
    return [_latency(point.percentile(percent)) for percent in SHOWN]


def _latency(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    low, high = ("?" if bound is None else f"{bound:.2f}" for bound in (estimate.low, estimate.high))
    return f"{estimate.value:.2f}\n{low} to {high}"


def _failures(point: Point) -> str:
    if not point.failures:
        return "0"
    counts = ", ".join(f"{count:,} {status}" for status, count in point.failures.most_common())
    return f"{_failure_share(point):.1%}\n{counts}"


def _failure_share(point: Point) -> float:
    failures = point.failures.total()
    total = failures + sum(len(sample.latencies_ms) for sample in point.samples)
    return failures / total if total else 0.0


def _usage_header(points: Sequence[Point]) -> list[str]:
    return ["CPU ms/image", "peak MiB"] if any(point.usage for point in points) else []


def _usage_cells(point: Point) -> list[str]:
    if not point.usage:
        return []
    return [f"{point.cpu_ms_per_image or 0:.2f}", f"{point.usage.peak_bytes / MIB:,.0f}"]
