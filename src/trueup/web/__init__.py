"""The studio: data, training, runs, chat, labelling, evaluation and export in a browser. Torch is never loaded here.

    run.py  app.py     listen; NiceGUI behind the guard        guard.py  login.py   who may ask
    frame.py  view.py  what surrounds a page; what a page gets  words/  phrases.py   what is said, in each language
    charts.py  series.py  curves: their look; a run's rows       plots.py  answers.py  what a run shows
    follow.py             files that grow                         forms.py  draft.py   a form from the config's schema
    workspace.py       where data, runs and configs lie          jobs.py              trainings as processes
    chores.py          evaluations and exports as processes   verb_form.py         their form
    rows.py  tokens.py  reports.py  uploads.py  fetches.py   datasets      labels.py  judged.py  agreement.py   labels
    speakers.py        models as processes, to talk to           talks.py             conversations, as files

**A page** is a module in `pages/`, found by being there, with its words in `words/<module>.json`:

```python
from nicegui import ui
from trueup.web.pages import page
from trueup.web.view import View

@page("/label", icon="how_to_vote", order=60)                        # title and menu entry: the word "label.title"
def label(view: View) -> None:                                         # may be async
    ui.label(view.t("label.greeting", name=name)).classes("muted")     # text is always a label's: never HTML

@page("/label/{dataset:path}", icon="how_to_vote", order=61, below="/label")
def one(view: View) -> None:
    path = view.workspace.data(view.path["dataset"])                   # an id → a path inside, or a page that says no
```

`words/label.json` is `{"title": {"en": "Label", "zh": "标注"}, "greeting": {"en": "Hi {name}", "zh": "{name}好"}}`;
tests/web/test_words.py holds that no language lacks a word.

**What a page gets.** `view.t(key, **values)` a word in the reader's language; `view.path`, `view.query` from the
address; `view.workspace` where things lie; `view.jobs` what runs. **What it keeps**: nothing. What a person chose is
in the address (`view.remember(key=value)` writes it there without a reload), what happened is in files. Every tab,
every reload and every new server then says the same. Use `ui.timer(1.0, refresh)` to look at files again.

**What it looks like.** `heading`, `card`, `row`, `button`, `state_badge`, `problems`, `empty`, `figure`, `copy_block`
of frame.py and the classes in `static/studio.css` (`muted`, `mono`, `grid-2`, `stack` …): no colours and no sizes
in a page; what only one page needs is in `static/<module>.css`. Every page begins with `heading(view, …)`. Charts come
from `charts.py` alone. Icons are Material's names. A button with only an icon says what it does by `label=`.

**What it may not do.** Load a model, or import torch (tests/web/test_studio.py looks): model work is a child process,
as jobs.py starts them (`view.jobs.run_json([...])` runs a verb of the command line with `--json` and awaits its
result). Take a path from the browser: `workspace.py` turns ids into paths. Put text of users or models into
`ui.html`, `ui.markdown` or JavaScript source.
"""
