"""Self-contained HTML pages: one file, no script from elsewhere, readable by day and by night."""

from __future__ import annotations

from html import escape

_STYLE = """
:root { color-scheme: light dark; --soft: #8883; --text: #1c1c1e; --back: #fff; --good: #157347; --bad: #b02a37;
  --trained: #bfe8cf; --cut: #f6c9ce; --masked: #6b7280; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e6e6; --back: #16181c; --good: #58c48c; --bad: #f0808a;
  --trained: #1d4d35; --cut: #5c252c; --masked: #9aa0aa; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back); max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; } h3 { font-size: 1rem; margin: 1rem 0 .2rem; }
pre, .tokens { font: 13px/1.6 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.tokens { border: 1px solid var(--soft); border-radius: 6px; padding: .6rem; }
.tokens span { border-radius: 3px; } .tokens span:hover { outline: 1px solid currentColor; }
.trained { background: var(--trained); } .masked { color: var(--masked); }
.truncated { background: var(--cut); text-decoration: line-through; }
.good { color: var(--good); } .bad { color: var(--bad); } .soft { color: var(--masked); }
table { border-collapse: collapse; } td, th { padding: .15rem .8rem .15rem 0; text-align: left; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
"""


def page(title: str, body: str) -> str:
    """A whole page. `body` is HTML, `title` is text."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def preformatted(text: str) -> str:
    """Text as it stands."""
    return f"<pre>{escape(text)}</pre>"
