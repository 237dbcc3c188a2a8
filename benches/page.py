"""report.html of a file of results: a single file with sortable tables and embedded pictures."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path

from kdkernels.files import replaced_atomically
from kdkernels.plots.page import STYLE

from .pictures import draw, sweeps_of, title_of
from .tables import CONTENDER_LABELS, Entry, Table, about, rows_of, tables

MORE_STYLE = """
body { max-width: 90rem }
table { font-size: .85rem; font-variant-numeric: tabular-nums; max-height: 80vh; overflow-y: auto }
th, td { white-space: nowrap; padding: .25rem .6rem }
th { position: sticky; top: 0; background: #fff; z-index: 1 }
th:first-child, td:first-child { position: sticky; left: 0; background: #fff; max-width: 45vw; white-space: normal; min-width: 8rem }
th:first-child { z-index: 2 }
@media (min-width: 60rem) { th:first-child, td:first-child { min-width: 17rem } }
th button { font: inherit; font-weight: 600; border: 0; background: none; cursor: pointer; padding: 0; color: inherit }
th[aria-sort=ascending] button::after { content: " \\25b2" } th[aria-sort=descending] button::after { content: " \\25bc" }
td.slower { color: #c92a2a; font-weight: 600 }
nav a { margin-right: 1rem } label { display: block; margin: .5rem 0 } input { font: inherit; padding: .2rem .4rem; max-width: 100% }
"""
SCRIPT = """
for (const table of document.querySelectorAll("table.sorts")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") !== "descending";
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = row => { const cell = row.cells[column], v = cell.dataset.value; return v === undefined ? null : Number(v); };
    const rows = [...body.rows], numeric = rows.some(row => key(row) !== null);
    rows.sort((a, b) => {
      if (!numeric) return (down ? -1 : 1) * a.cells[column].textContent.localeCompare(b.cells[column].textContent, "en", {numeric: true});
      const x = key(a), y = key(b);
      if (x === null || y === null) return (x === null) - (y === null);
      return down ? y - x : x - y;
    });
    body.append(...rows);
  }));
}
document.querySelector("#filter").addEventListener("input", event => {
  const words = event.target.value.toLowerCase().split(/\\s+/);
  for (const row of document.querySelectorAll("table.sorts tbody tr"))
    row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word));
});
"""


def write_page(path: Path, result: dict) -> Path:
    """Write the page, completely or not at all, and return its path."""
    rows = rows_of(result)
    op_tables = tables(rows)
    smoke = rows[0]["mode"] == "smoke"
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><title>kdkernels benchmarks</title><style>{STYLE}{MORE_STYLE}</style></head><body>
<h1>Times of kdkernels against references, peers and hardware limits</h1>
{"<p><b>Smoke run on tiny inputs: no number here means anything.</b></p>" if smoke else ""}
<p class="note">{html.escape(about(result)).replace("`", "")}.
A ratio is the time of a contender divided by the time of the fused op: above 1, the fused op is faster. It is the median over interleaved
rounds, with its 95 % interval. Errors are measured against float64. Click a column heading to sort.</p>
<h2 id="worst">The smallest ratios to eager and Inductor</h2>
{_table(_worst(rows))}
<nav>{"".join(f'<a href="#t{i}">{html.escape(t.title)}</a>' for i, t in enumerate(op_tables))}<a href="#growth">Sweeps</a></nav>
<label>Filter the rows: <input id="filter" type="search" placeholder="128 x 100 forward"></label>
{"".join(f'<h2 id="t{i}">{html.escape(t.title)}</h2>{_table(t)}' for i, t in enumerate(op_tables))}
<h2 id="growth">Time and memory against the size of the inputs</h2>
{"".join(_picture(op, sweeps, result) for op, sweeps in sweeps_of(result).items()) or "<p>No sweep was measured.</p>"}
<script>{SCRIPT}</script></body></html>
"""
    with replaced_atomically(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def smallest_ratios(rows: list[dict], count: int = 5) -> list[tuple[float, dict, str]]:
    """Return the ``count`` smallest ratios of eager and Inductor, as (ratio, row, peer).

    Backward rows are left out, because some ops compute the gradient in the forward. Whole steps
    are left out, because the networks take most of their time.
    """
    found = [
        (row["ratios"][peer][0], row, peer)
        for row in rows
        for peer in ("eager", "Inductor")
        if peer in row["ratios"] and row["direction"] not in ("backward", "step")
    ]
    return sorted(found, key=lambda item: item[0])[:count]


def _worst(rows: list[dict]) -> Table:
    lines = [
        [Entry(f"{row['op']}: {row['cell']}"), Entry(row["direction"]), Entry(CONTENDER_LABELS.get(peer, peer)), Entry(f"{ratio:.2f}x", ratio)]
        for ratio, row, peer in smallest_ratios(rows, 10)
    ]
    return Table("", ["input", "direction", "peer", "ratio"], lines)


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col"><button type="button">{html.escape(name)}</button></th>' for name in table.columns)
    body = "".join("<tr>" + "".join(map(_cell, line)) + "</tr>\n" for line in table.rows)
    return f'<table class="sorts"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _cell(entry: Entry) -> str:
    slower = "x" in entry.text and entry.value is not None and entry.value < 1 and entry.text.startswith("0.")
    value = "" if entry.value is None else f' data-value="{entry.value!r}"'
    return f"<td{value}{' class=slower' if slower else ''}>{html.escape(entry.text)}</td>"


def _picture(op: str, sweeps: dict, result: dict) -> str:
    import matplotlib.pyplot as plt

    figure, buffer = draw(sweeps, title_of(op, result)), io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<p><img alt="time and memory of {html.escape(op)} against the size of its inputs" src="data:image/svg+xml;base64,{data}"></p>'
