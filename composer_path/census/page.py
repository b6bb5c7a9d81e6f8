"""A census as one page that needs nothing else: no script, no font, no other file. It goes with light and dark."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from html import escape

from composer_path.census.census import Census
from composer_path.census.report import rows_of
from composer_path.census.tally import HISTOGRAMS, bin_of
from composer_path.conversion.record_file import place_of
from composer_path.printable import printable, printable_lines

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2433; --quiet: #5c6475; --line: #d5d9e2; --bar: #7a4fa3; --paper: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaf0; --quiet: #a3abbd; --line: #394052; --bar: #b48be0; --paper: #171b24; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 68rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } td, th { text-align: left; padding: .15rem 1.5rem .15rem 0; vertical-align: top; }
td + td { font-variant-numeric: tabular-nums; } tr + tr td { border-top: 1px solid var(--line); }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr)); gap: .8rem; }
figure { margin: 0; } figcaption, .note { color: var(--quiet); font-size: .8rem; }
figure img { display: block; max-width: 100%; border: 1px solid var(--line); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: 1.2rem 2rem; }
svg { width: 100%; height: auto; } svg rect { fill: var(--bar); } svg text { fill: var(--quiet); font-size: 11px; }
"""
_WIDTH, _HEIGHT = 320, 120  # of a chart


def page_of(census: Census) -> str:
    """The page's HTML. Whatever comes from the data is escaped; it holds no text of a conversation and no file name."""
    title = f"Census of {escape(printable(census.name))}"
    body = "\n".join(_body(census))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width"><meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<style>{_STYLE}</style></head>\n<body><h1>{title}</h1>\n{printable_lines(body)}\n</body></html>\n"
    )


def _body(census: Census) -> Iterator[str]:
    yield _table(rows_of(census))
    problems = census.rejections.problems
    if problems:
        yield f"<h2>What would be refused</h2><p class=note>{len(census.rejections):,} records; the first of them:</p>"
        yield f"<ul>{''.join(f'<li>{escape(str(error))}</li>' for _, _, error in problems[:20])}</ul>"
    repeated = [(kind, one) for kind, found in census.repetitions.items() for one in found.most]
    if repeated:
        yield "<h2>What comes several times</h2>"
        yield _table(
            (f"{kind}, first in {place_of(one.first, None)}", f"{one.times:,} times") for kind, one in repeated
        )
    yield "<h2>How much of what</h2><div class=charts>"
    for name, counts in census.tally.histograms.items():
        if counts:
            yield f"<figure>{_chart(HISTOGRAMS[name], counts)}<figcaption>{HISTOGRAMS[name]}</figcaption></figure>"
    yield "</div>"
    if census.tally.thumbnails:
        yield "<h2>Some of the pictures</h2><div class=pictures>"
        for one in census.tally.thumbnails:
            what = f"{one.where}, picture {one.index + 1}: {one.width} by {one.height}"
            words = escape(what, quote=True)
            yield f'<figure><img src="{one.address}" alt="{words}"><figcaption>{words}</figcaption></figure>'
        yield "</div>"


def _table(rows: Iterator[tuple[str, str]]) -> str:
    cells = (f"<tr><td>{escape(name.strip())}</td><td>{escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{''.join(cells)}</table>"


def _chart(title: str, counts: Counter[int]) -> str:
    """Bars, one for each bin between the lowest and the highest, as wide as each other."""
    lows = list(_bins(min(counts), max(counts)))
    most, width = max(counts.values()), _WIDTH / len(lows)
    bars = []
    for number, low in enumerate(lows):
        height = (_HEIGHT - 24) * counts[low] / most
        bars.append(
            f'<rect x="{number * width:.2f}" y="{_HEIGHT - 14 - height:.2f}" width="{max(0.5, width - 1):.2f}" '
            f'height="{height:.2f}"><title>from {low:,}: {counts[low]:,}</title></rect>'
        )
    ends = f'<text x="0" y="{_HEIGHT}">{lows[0]:,}</text>'
    if len(lows) > 1:
        ends += f'<text x="{_WIDTH}" y="{_HEIGHT}" text-anchor="end">{lows[-1]:,}</text>'
    label = f"{title}: from {lows[0]:,} to {lows[-1]:,}, at most {most:,} in one bar"
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(bars)}{ends}</svg>'


def _bins(low: int, high: int) -> Iterator[int]:
    """The bins from one to another."""
    while low <= high:
        yield low
        low = bin_of(low + (1 << max(0, low.bit_length() - 3)))
