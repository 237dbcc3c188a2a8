"""Helpers for the HTML reports: their style, and pictures that are embedded in the page."""

from __future__ import annotations

import base64
import html
import io

from .drawing import close

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 60rem; padding: 1rem; color: #1d2433; background: #fff }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2rem }
table { border-collapse: collapse; margin: .5rem 0; display: block; overflow-x: auto }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #d8dde6 } th:first-child, td:first-child { text-align: left }
img { max-width: 100%; height: auto } .note { color: #5a6475; font-size: .9rem }
"""


def image_tag(figure, description: str) -> str:
    """Return an ``<img>`` element with the figure as an embedded PNG, and close the figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    close(figure)
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
