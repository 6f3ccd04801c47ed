"""Self-contained HTML pages: one file, nothing fetched, readable by day and by night, on a phone and on paper."""

from __future__ import annotations

from html import escape

_STYLE = """
:root { color-scheme: light dark; --soft: #8883; --text: #1c1c1e; --back: #fff; --card: #f6f7f9; --good: #157347;
  --bad: #b02a37; --trained: #bfe8cf; --cut: #f6c9ce; --masked: #626974; --first: #2f6fdb; --second: #d9782d;
  --kept: #3f9d72; --warn: #c98a16; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e6e6; --back: #16181c; --card: #1f2228; --good: #58c48c;
  --bad: #f0808a; --trained: #1d4d35; --cut: #5c252c; --masked: #9aa0aa; --first: #6ea4ff; --second: #f0a060;
  --kept: #58b98a; --warn: #e3b04b; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back); max-width: 64rem;
  margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1rem 0 .2rem; }
pre, .tokens { font: 13px/1.6 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.tokens { border: 1px solid var(--soft); border-radius: 6px; padding: .6rem; }
.tokens span { border-radius: 3px; } .tokens span:hover { outline: 1px solid currentColor; }
.trained { background: var(--trained); } .masked { color: var(--masked); }
.truncated { background: var(--cut); text-decoration: line-through; }
.good { color: var(--good); } .bad { color: var(--bad); } .soft { color: var(--masked); }
table { border-collapse: collapse; } td, th { padding: .15rem .8rem .15rem 0; text-align: left; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
@media print { body { margin: 0; } section, .card { break-inside: avoid; } }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # pictures that are in the page itself


def page(title: str, body: str, style: str = "") -> str:
    """A whole page. `body` and `style`, CSS of its own, stand as they are; `title` is text.

    Its content policy forbids scripts and whatever would have to be fetched.
    """
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{escape(title)}</title><style>{_STYLE}{style}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def preformatted(text: str) -> str:
    """Text as it stands."""
    return f"<pre>{escape(text)}</pre>"
