"""The data report as a page: what became of every row, what is worth a look, and how long the rows are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from trueup.data.histogram import Histogram
from trueup.data.page import page

_STYLE = """
header p { margin: .2rem 0 1.2rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .7rem; }
.card { background: var(--card); border-radius: 10px; padding: .7rem .9rem; }
.tiles b { display: block; font-size: 1.45rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.looks { list-style: none; padding: 0; margin: 0; display: grid; gap: .5rem; }
.looks li { background: var(--card); border-left: 4px solid var(--warn); border-radius: 6px; padding: .5rem .8rem; }
.looks li.note { border-color: var(--soft); } .looks li.fine { border-color: var(--kept); }
.bar { display: flex; height: 1rem; gap: 2px; margin: .5rem 0; border-radius: 5px; overflow: hidden; }
.bar span { min-width: 3px; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; }
.legend i, .stats i { display: inline-block; width: .7rem; height: .7rem; border-radius: 3px; margin-right: .4rem; }
.losses { display: grid; gap: .7rem; margin: .8rem 0 0; }
.losses div { border-top: 1px solid var(--soft); padding-top: .5rem; }
.losses p { margin: .1rem 0; } .losses q { color: var(--masked); }
.ids { font: 12.5px/1.5 ui-monospace, monospace; color: var(--masked); }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: .9rem; }
.panels .tall { grid-row: span 2; } .panels .tall .plot { height: 12rem; }
.panels h3 { margin: 0; } .panels p { margin: .4rem 0 0; }
.plot { display: block; width: 100%; height: 7.5rem; margin-top: .6rem; border-bottom: 1px solid var(--masked); }
.plot .hit { fill: transparent; } .plot .hit:hover { fill: var(--soft); }
.plot line { stroke: var(--bad); stroke-dasharray: 4 3; vector-effect: non-scaling-stroke; }
.axis { position: relative; height: 1.2rem; font-size: 12px; color: var(--masked); }
.axis span { position: absolute; transform: translateX(-50%); white-space: nowrap; }
.axis span:first-child { transform: none; } .axis span:last-child { transform: translateX(-100%); }
.stats { width: 100%; margin-top: .5rem; font-size: 14px; } .stats th { font-weight: 500; color: var(--masked); }
.stats td:last-child, .stats th:last-child { padding-right: 0; }
.epoch { display: grid; grid-template-columns: max-content 1fr max-content; gap: .35rem .8rem; align-items: center; }
.epoch span { height: 1rem; border-radius: 4px; }
.epoch b { font-variant-numeric: tabular-nums; font-weight: 500; text-align: right; }
.epoch + p { margin: .5rem 0 0; }
"""

#: What a dropped row is drawn in, the most frequent reason first.
_SHADES = ("var(--bad)", "var(--warn)", "var(--second)", "var(--masked)")
_COLOURS = {"chosen": "var(--first)", "rejected": "var(--second)", "best": "var(--first)", "worst": "var(--second)"}
#: Parts that are drawn over each other.
_TOGETHER = (("chosen", "rejected"), ("best", "worst"))
_LAYOUTS = {"padded": "padded batches", "separate": "a row an answer", "shared": "prompts shared"}
_IDS, _FEW_IDS = 20, 4

Lengths = Mapping[str, Mapping[int, int]]  # part → how many rows have so many tokens


def report_page(report: Mapping[str, Any], lengths: Mapping[str, Lengths]) -> str:
    """A page of `DataReport.to_dict()`; `lengths` holds those of each dataset."""
    return page("Data report", "\n".join(_parts(report, lengths)), _STYLE)


def _parts(report: Mapping[str, Any], lengths: Mapping[str, Lengths]) -> Iterator[str]:
    yield _head(report)
    yield _tiles(report)
    yield f'<section><h2>Worth a look</h2><ul class="looks">{"".join(_looks(report))}</ul></section>'
    if report["epoch_tokens"]:
        yield f"<section><h2>Tokens an epoch</h2>{_epoch(report['epoch_tokens'])}</section>"
    for name, d in report["datasets"].items():
        yield f"<section><h2>{escape(name)}</h2>{_dataset(d)}</section>"
        if lengths.get(name):
            panels = "".join(_panels(d, lengths[name], report["cutoff_len"]))
            yield f'<section class="panels" style="margin-top:.9rem">{panels}</section>'


def _head(report: Mapping[str, Any]) -> str:
    said = [f"{escape(name)} {count:,}" for name, count in report["splits"].items()]
    said += [f"at most {report['cutoff_len']:,} tokens an example"] if report["cutoff_len"] else []
    return f'<header><p class="soft">{" · ".join(said)}</p></header>'


def _tiles(report: Mapping[str, Any]) -> str:
    datasets = list(report["datasets"].values())
    read, kept = (sum(d[key] for d in datasets) for key in ("read", "kept"))
    tiles = [
        ("rows read", read, ""),
        ("kept", kept, f"{_percent(kept, read)} of them"),
        ("dropped", sum(map(_dropped, datasets)), "with their reasons below"),
        ("cut to length", sum(d["truncated_rows"] for d in datasets), "in the answer; never in the question"),
        ("duplicates", report["duplicates"]["count"], "kept"),
    ]
    return f'<div class="tiles">{"".join(_tile(*tile) for tile in tiles)}</div>'


def _tile(what: str, count: int, more: str) -> str:
    small = f'<small class="soft">{more}</small>' if count and more else ""
    return f'<div class="card"><b>{count:,}</b>{what}<br>{small}</div>'


def _looks(report: Mapping[str, Any]) -> Iterator[str]:
    """What to know before training, then what else was noted."""
    found = [text for name, d in report["datasets"].items() for text in _lost(name, d)]
    found += [
        f"{rows['count']:,} {words}: {_ids(rows)}" + (f" ({escape(rows['excerpt'])})" if rows["excerpt"] else "")
        for key, words in (
            ("reversed_pairs", "pairs contradict another row: chosen and rejected are swapped"),
            ("duplicates", "rows say what an earlier row says"),
            ("repeated_ids", "rows have the id of an earlier row"),
            ("train_eval_overlap", "evaluation rows ask what is trained on"),
        )
        if (rows := report[key])["count"]
    ]
    found += [
        f"<b>{escape(name)}</b>: {escape(text)}" for name, d in report["datasets"].items() for text in d["findings"]
    ]
    yield from (f"<li>{text}</li>" for text in found)
    yield from (f'<li class="note">{escape(note)}</li>' for note in report["notes"])
    if not found:
        yield '<li class="fine">No duplicates, no contradictions, nothing out of balance.</li>'


def _lost(name: str, d: Mapping[str, Any]) -> Iterator[str]:
    if d["dropped"]:
        reasons = ", ".join(f"{rows['count']:,} {why}" for why, rows in _reasons(d))
        yield f"<b>{escape(name)}</b>: {_dropped(d):,} of {d['read']:,} rows are left out ({escape(reasons)})"
    if d["truncated_rows"]:
        yield f"<b>{escape(name)}</b>: {d['truncated_rows']:,} rows lose a part of an answer to cutoff_len"


def _reasons(d: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Why rows were dropped, the most frequent reason first."""
    return sorted(d["dropped"].items(), key=lambda item: -item[1]["count"])


def _epoch(tokens: Mapping[str, int]) -> str:
    """The three layouts as bars."""
    most = max(*tokens.values(), 1)
    colours = {"shared": "var(--kept)"}
    rows = "".join(
        f'<div>{words}</div><span style="width:{100 * tokens[layout] / most:.1f}%;'
        f'background:{colours.get(layout, "var(--masked)")}"></span><b>{tokens[layout]:,}</b>'
        for layout, words in _LAYOUTS.items()
    )
    times = tokens["padded"] / max(tokens["shared"], 1)
    saved = f"<p>{times:.1f} times fewer tokens than in padded batches.</p>" if times >= 1.05 else ""
    return f'<div class="card"><div class="epoch">{rows}</div>{saved}</div>'


# ---- one dataset ---------------------------------------------------------------------------------


def _dataset(d: Mapping[str, Any]) -> str:
    read = f"{d['read']:,} of {d['available']:,} rows read" if d["read"] != d["available"] else f"{d['read']:,} rows"
    dropped = _reasons(d)
    shades = [_SHADES[min(i, len(_SHADES) - 1)] for i in range(len(dropped))]
    parts = [("kept", d["kept"], "var(--kept)")]
    parts += [(why, rows["count"], shade) for (why, rows), shade in zip(dropped, shades, strict=True)]
    losses = [
        *((f"dropped: {why}", rows) for why, rows in dropped),
        *((f"{part} cut", rows) for part, rows in sorted(d["truncated"].items())),
        *((words, d[key]) for key, words in _PAIRINGS if d[key]["count"]),
    ]
    more = [_bar(parts, d["read"]), _labels(d["labels"])]
    if losses:
        more.append(f'<div class="losses">{"".join(_loss(what, rows, d["read"]) for what, rows in losses)}</div>')
    origin = f' <span class="soft">· {escape(d["origin"])}</span>' if d["origin"] else ""
    return f'<div class="card">{read}{origin}{"".join(more)}</div>'


_PAIRINGS = (
    ("duplicates", "duplicates, kept"),
    ("repeated_ids", "ids that an earlier row has, kept"),
    ("reversed_pairs", "pairs whose reverse is there too"),
    ("train_eval_overlap", "evaluation rows whose prompt is trained on"),
)


def _bar(parts: Sequence[tuple[str, int, str]], of: int) -> str:
    """Shares as a bar, and as words below it."""
    shown = [part for part in parts if part[1]]
    spans = "".join(f'<span style="flex:{count} 0 0;background:{colour}"></span>' for _, count, colour in shown)
    words = "".join(
        f'<span><i style="background:{colour}"></i>{escape(what)} {count:,}'
        f' <span class="soft">{_percent(count, of)}</span></span>'
        for what, count, colour in parts
    )
    return f'<div class="bar">{spans}</div><div class="legend">{words}</div>'


def _labels(labels: Mapping[str, int]) -> str:
    colours = {"desirable": "var(--first)", "undesirable": "var(--second)"}
    parts = [(label, labels.get(label, 0), colour) for label, colour in colours.items()]
    return _bar(parts, sum(labels.values())) if labels else ""


def _loss(what: str, rows: Mapping[str, Any], of: int) -> str:
    excerpt = f"<p><q>{escape(rows['excerpt'])}</q></p>" if rows["excerpt"] else ""
    share = f'<span class="soft">{_percent(rows["count"], of)}</span>'
    head = f"<p><b>{rows['count']:,}</b> {escape(what)} {share}</p>"
    return f'<div>{head}<p class="ids">{_ids(rows, bare=True)}</p>{excerpt}</div>'


def _ids(rows: Mapping[str, Any], bare: bool = False) -> str:
    """The first ids; `bare`, without their dataset's name."""
    shown = [row.rpartition(":")[2] if bare else row for row in rows["rows"][: _IDS if bare else _FEW_IDS]]
    more = f" … and {rows['count'] - len(shown):,} more" if rows["count"] > len(shown) else ""
    return escape(", ".join(shown)) + more


def _percent(count: int, of: int) -> str:
    share = 100 * count / max(of, 1)
    if count and share < 0.1:
        return "under 0.1 %"
    return f"{share:.0f} %" if share >= 10 or share == int(share) else f"{share:.1f} %"


def _dropped(d: Mapping[str, Any]) -> int:
    return sum(rows["count"] for rows in d["dropped"].values())


# ---- lengths -------------------------------------------------------------------------------------


def _panels(d: Mapping[str, Any], lengths: Lengths, cutoff_len: int | None) -> Iterator[str]:
    """A histogram for each part, of better and worse answers in one."""
    drawn: set[str] = set()
    sides = d["sides"]
    for part in lengths:
        parts = next((both for both in _TOGETHER if part in both), (part,))
        if part in drawn:
            continue
        drawn.update(parts)
        whole = part == "text" or (part == "total" and not sides)
        words = _sides(sides, parts) if len(parts) > 1 and sides else ""
        yield _panel(parts, {name: lengths[name] for name in parts}, d["tokens"], cutoff_len if whole else None, words)


def _panel(
    parts: Sequence[str], lengths: Lengths, tokens: Mapping[str, Any], cutoff_len: int | None, words: str
) -> str:
    colours = [_COLOURS.get(part, "var(--first)") for part in parts]
    plot = Histogram.of(list(lengths.values())).svg(list(parts), colours, cutoff_len)
    rows = "".join(
        f'<tr><td><i style="background:{colour}"></i>{escape(part)}</td>'
        + "".join(f'<td class="number">{round(tokens[part][key]):,}</td>' for key in ("p50", "p95", "max", "mean"))
        + "</tr>"
        for part, colour in zip(parts, colours, strict=True)
    )
    head = "".join(f'<th class="number">{key}</th>' for key in ("p50", "p95", "max", "mean"))
    table = f'<table class="stats"><tr><th></th>{head}</tr>{rows}</table>'
    tall = " tall" if len(parts) > 1 else ""
    return f'<div class="card{tall}"><h3>{escape(" and ".join(parts))}, tokens</h3>{plot}{table}{words}</div>'


def _sides(sides: Mapping[str, float], parts: Sequence[str]) -> str:
    """In how many pairs which side is the longer one."""
    pairs = int(sides["pairs"])
    longer, equal = (round(sides[key] * pairs) for key in ("chosen_longer", "equally_long"))
    shares = [
        (f"{parts[0]} longer", longer, "var(--first)"),
        ("equally long", equal, "var(--masked)"),
        (f"{parts[1]} longer", pairs - longer - equal, "var(--second)"),
    ]
    ratio = f"<p>On average {parts[0]} is {sides['mean_ratio']:.2f} times as long as {parts[1]}.</p>"
    return _bar(shares, pairs) + ratio
