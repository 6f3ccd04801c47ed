"""The page that asks for the token: plain HTML, before anything of the studio is handed out."""

from __future__ import annotations

from html import escape

from starlette.responses import HTMLResponse

from trueup.web.words import preferred, say

_PAGE = """<!doctype html><html lang="{language}"><head><meta charset="utf-8"><title>trueup</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root {{ color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }}
body {{ display: grid; place-items: center; min-height: 100vh; margin: 0; background: light-dark(#f6f7f9, #101318) }}
form {{ width: min(22rem, 90vw); padding: 2rem; border-radius: 14px; background: light-dark(#fff, #181c23);
  box-shadow: 0 1px 3px #0002, 0 8px 32px #0001 }}
h1 {{ font-size: 1.25rem; margin: 0 0 1rem }} p {{ margin: .5rem 0 0; color: light-dark(#b3261e, #ff9a92) }}
input, button {{ font: inherit; width: 100%; box-sizing: border-box; padding: .6rem .75rem; border-radius: 8px }}
input {{ border: 1px solid #8886; margin: .25rem 0 1rem; background: transparent; color: inherit }}
button {{ border: 0; background: #3451d1; color: #fff; font-weight: 600; cursor: pointer }}
</style></head><body><main><form method="post" action="/login"><h1>trueup</h1><label>{label}
<input name="token" type="password" autocomplete="current-password" required autofocus></label>
<button>{button}</button>{wrong}</form></main></body></html>"""


def login_page(accept_language: str, wrong: str | None = None, status: int = 200) -> HTMLResponse:
    """The form; `wrong`: why the last try failed ("token", "slow")."""
    language = preferred(accept_language)
    note = f'<p role="alert">{escape(say(f"frame.login_{wrong}", language))}</p>' if wrong else ""
    label, button = escape(say("frame.login_label", language)), escape(say("frame.login_button", language))
    text = _PAGE.format(language=language, label=label, button=button, wrong=note)
    return HTMLResponse(text, status, {"cache-control": "no-store"})
