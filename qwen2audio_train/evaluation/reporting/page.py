"""Style and frame of the report: one HTML page without external parts, for light and dark screens."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --page: #fbfaf8; --card: #ffffff; --ink: #1d1d22; --soft: #6b6a73; --rule: #e4e1db;
  --c0: #2563a8; --c1: #d3622a; --c2: #3a8a5c; --c3: #8a4fb0; --mark: #a19d95; }
@media (prefers-color-scheme: dark) { :root { --page: #15161a; --card: #1d1f25; --ink: #e9e7e2; --soft: #9c9aa3;
  --rule: #32343c; --c0: #74aef0; --c1: #f09a66; --c2: #73c797; --c3: #c294e6; --mark: #77757e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Noto Sans",
  "Noto Sans CJK SC", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 40px 28px 80px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 20px; margin: 44px 0 4px; letter-spacing: -0.005em; }
h3 { font-size: 14px; margin: 0 0 6px; font-weight: 600; overflow-wrap: anywhere; }
p { margin: 0 0 14px; color: var(--soft); max-width: 110ch; }
.tiles, .cards { display: grid; gap: 14px; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(148px, 1fr)); margin: 26px 0 0; }
.cards { grid-template-columns: repeat(auto-fit, minmax(270px, 1fr)); margin: 0 0 14px; }
.tile, .card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 14px 16px; }
.card + .card { margin-top: 14px; } .cards > .card { margin-top: 0; }
.tile b { display: block; font-size: 23px; line-height: 1.25; font-weight: 650; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.tile span, .note { color: var(--soft); font-size: 13px; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font: 11.5px system-ui, "Segoe UI", Roboto, "Noto Sans", "Noto Sans CJK SC", sans-serif; fill: var(--soft); }
svg text.label { fill: var(--ink); font-size: 13px; }
.grid { stroke: var(--rule); fill: none; }
.guide { stroke: var(--mark); stroke-dasharray: 4 4; fill: none; }
.mark { stroke: var(--mark); stroke-width: 2; fill: none; }
.line { fill: none; stroke-width: 1.9; stroke-linejoin: round; stroke-linecap: round; }
.faint { stroke-width: 1; opacity: 0.28; }
.dot { stroke: var(--card); stroke-width: 1.2; }
.line.c0 { stroke: var(--c0); } .line.c1 { stroke: var(--c1); }
.line.c2 { stroke: var(--c2); } .line.c3 { stroke: var(--c3); }
.line.c4 { stroke: var(--ink); stroke-dasharray: 5 3; }
.dot.c0 { fill: var(--c0); } .dot.c1 { fill: var(--c1); } .dot.c2 { fill: var(--c2); } .dot.c3 { fill: var(--c3); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; color: var(--soft); font-size: 13px; margin: 0 0 8px; }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 6px; margin-right: 6px; }
.legend i.tick { width: 2px; height: 13px; border-radius: 0; background: var(--mark); vertical-align: -2px; }
.mel { width: 100%; height: 112px; border-radius: 6px; display: block; margin: 0 0 10px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 12px; margin: 0; font-size: 14px; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
dd.right::after { content: " \\2713"; color: var(--c2); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--soft); font-weight: 500; }
th, td { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--rule); white-space: nowrap; vertical-align: top; }
td.part { padding-left: 16px; color: var(--soft); }
td.number, th.number { text-align: right; }
.below { margin: 12px 0 26px; } .below p { margin: 0; font-size: 13.5px; }
td .wrap { white-space: normal; font-size: 12px; line-height: 1.35; }
td small { color: var(--soft); font-size: 12px; }
details { margin: 10px 0; } summary { cursor: pointer; color: var(--soft); }
pre { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 14px; overflow-x: auto;
  font: 12.5px/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
footer { margin-top: 48px; color: var(--soft); font-size: 13px; }
"""


def page(title: str, sections: Sequence[str]) -> str:
    """The whole document."""
    body = "\n".join(sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def standalone_svg(chart: str, title: str) -> str:
    """A chart of this page as a file of its own, for a README: the style inside, on the card's background."""
    head, _, body = chart.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1).partition(">")
    named = f"<title>{escape(title)}</title><style>{STYLE} svg {{ background: var(--card); }}</style>"
    return f"{head}>{named}{body}\n"


def section(title: str, text: str, content: str) -> str:
    """A heading, a line that says how to read what follows, and that."""
    return f"<section>\n<h2>{escape(title)}</h2>\n<p>{escape(text)}</p>\n{content}\n</section>"


def card(title: str, content: str) -> str:
    return f'<div class="card">\n<h3>{escape(title)}</h3>\n{content}\n</div>'


def cards(contents: Sequence[str]) -> str:
    return f'<div class="cards">\n{"".join(contents)}\n</div>'


def tile(value: str, label: str, note: str = "") -> str:
    below = f"<br><span>{escape(note)}</span>" if note else ""
    return f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span>{below}</div>'


def legend(names: Sequence[str], marks: str = "") -> str:
    """What the series colours stand for, in their order, but for an empty name; `marks` explains the grey ticks."""
    shown = [(colour, name) for colour, name in enumerate(names) if name]
    entries = [f'<span><i style="background: var(--c{colour})"></i>{escape(name)}</span>' for colour, name in shown]
    if marks:
        entries.append(f'<span><i class="tick"></i>{escape(marks)}</span>')
    return f'<div class="legend">{"".join(entries)}</div>'


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table of ready HTML cells; columns in `numbers` are flush right."""

    def line(cells: Sequence[str], tag: str) -> str:
        inside = []
        for column, cell in enumerate(cells):
            style = ' class="number"' if column in numbers else ' class="part"' if cell.startswith("\u2003") else ""
            inside.append(f"<{tag}{style}>{cell.strip()}</{tag}>")
        return f"<tr>{''.join(inside)}</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table>\n<thead>{line(header, "th")}</thead>\n<tbody>{body}</tbody>\n</table></div>'
