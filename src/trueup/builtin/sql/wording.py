"""How people ask for a query, and how a comment says what it does, in English and in Chinese."""

from __future__ import annotations

import random

from trueup.builtin.sql.query import Condition, Order, Query

_NUMBERS_EN = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
)
_NUMBERS_ZH = ("零", "一", "两", "三", "四", "五", "六", "七", "八", "九", "十")

_COMPARE_EN = {
    ">": ("above", "over", "greater than", "more than", "higher than"),
    ">=": ("at least", "no less than", "not below"),
    "<": ("below", "under", "less than", "lower than"),
    "<=": ("at most", "no more than", "not above"),
}
_COMPARE_ZH = {
    ">": ("大于{}", "高于{}", "超过{}"),
    ">=": ("不低于{}", "至少{}", "大于等于{}", "不少于{}"),
    "<": ("小于{}", "低于{}", "不到{}", "少于{}"),
    "<=": ("不超过{}", "最多{}", "小于等于{}", "不高于{}"),
}
_EQUAL_EN = {"=": ("",), "!=": ("not",)}
_DATE_EN = {
    ">": ("after", "later than"),
    ">=": ("on or after", "since", "from", "not before"),
    "<": ("before", "earlier than"),
    "<=": ("on or before", "no later than", "not after", "up to"),
}
_EQUAL_ZH = {"=": ("是{}", "为{}", "等于{}"), "!=": ("不是{}", "不为{}")}
_DATE_ZH = {
    ">": ("在{}之后", "晚于{}"),
    ">=": ("不早于{}", "从{}起", "在{}当天或之后"),
    "<": ("在{}之前", "早于{}"),
    "<=": ("不晚于{}", "截至{}", "在{}当天或之前"),
}


def ask(rng: random.Random, query: Query, language: str) -> str:
    """A request for `query` as a person may word it."""
    text = _ask_en(rng, query) if language == "en" else _ask_zh(rng, query)
    if language == "en" and rng.random() < 0.2:
        text = text[0].lower() + text[1:]
    if rng.random() < 0.25:
        text = text.rstrip(".。")
    return text


def comment(query: Query, language: str) -> str:
    """What `query` does, in one line; always in the same words."""
    return _comment_en(query) if language == "en" else _comment_zh(query)


# ---------------------------------------------------------------- English


def _ask_en(rng: random.Random, query: Query) -> str:
    columns = _columns_en(rng, query)
    condition = _condition_en(rng, query.condition)
    tail = _tail_en(rng, query)
    rows = f"{query.table.en}{condition}"
    if query.order and query.limit and rng.random() < 0.4:
        noun = query.table.en_one if query.limit == 1 else query.table.en
        number = "" if query.limit == 1 else f"{_number_en(rng, query.limit)} "
        rows, tail = f"the {number}{noun}{condition} with {_extreme_en(query.order)}", ""
    verb = rng.choice(
        (
            "Show",
            "List",
            "Give me",
            "Find",
            "Get",
            "Return",
            "Please list",
            "Show me",
            "I need",
            "Can you show",
            "I want to see",
            "Select",
        )
    )
    shape = rng.random()
    if shape < 0.5:
        return f"{verb} {columns} {rng.choice(('of', 'for'))} {rows}{tail}."
    if shape < 0.7:
        return f"For {rows}, {verb[0].lower() + verb[1:] if verb[0] != 'I' else verb} {columns}{tail}."
    if shape < 0.85:
        return f"{rows[0].upper() + rows[1:]}: {columns.removeprefix('the ')}{tail}."
    return f"{rng.choice(('What are', 'Could you get', 'May I have'))} {columns} of {rows}{tail}?"


def _columns_en(rng: random.Random, query: Query) -> str:
    if not query.columns:
        return rng.choice(("all columns", "every column", "everything", "all fields", "all details"))
    return f"{rng.choice(('the ', 'the ', ''))}{_listed_en(query)}"


def _listed_en(query: Query) -> str:
    names = [column.en for column in query.columns]
    return " and ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)


def _condition_en(rng: random.Random, condition: Condition | None) -> str:
    if condition is None:
        return ""
    column, value = condition.column, condition.value
    if column.kind == "text":
        assert column.places is not None
        negative = condition.operator == "!="
        quoted = f"'{value}'" if rng.random() < 0.15 else value
        if rng.random() < 0.5:
            return " " + column.places["en"][negative].format(quoted)
        named = rng.choice(("whose {} is {}", "where the {} is {}", "with {} {}"))
        return " " + named.format(column.en, f"not {quoted}" if negative else quoted)
    if column.kind == "date":
        assert column.verb is not None
        how = rng.choice(_DATE_EN[condition.operator])
        if rng.random() < 0.5:
            return f" {column.verb['en']} {how} {value}"
        return f" whose {column.en} is {how} {value}"
    how = rng.choice(_COMPARE_EN[condition.operator])
    amount = f"${value}" if column.money and rng.random() < 0.25 else value
    return rng.choice((" with {} {} {}", " whose {} is {} {}", " where {} is {} {}")).format(column.en, how, amount)


def _tail_en(rng: random.Random, query: Query) -> str:
    parts = []
    if query.order:
        parts.append(_order_en(rng, query.order))
    if query.limit:
        number = _number_en(rng, query.limit)
        parts.append(
            rng.choice(
                (
                    "limit {}",
                    "only the first {}",
                    "at most {} rows",
                    "top {}",
                    "just {} of them",
                    "no more than {} results",
                )
            ).format(number)
        )
    return "".join(f", {part}" for part in parts)


def _order_en(rng: random.Random, order: Order) -> str:
    name = order.column.en
    if order.column.kind == "date":
        down, up = ("newest first", "latest first"), ("oldest first", "earliest first")
    else:
        down, up = (
            ("highest first", "from high to low", "largest first"),
            ("lowest first", "from low to high"),
        )
    how = rng.choice((*down, "descending") if order.descending else (*up, "ascending"))
    return f"{rng.choice(('sorted by', 'ordered by', 'by', 'sort by'))} {name} {how}"


def _extreme_en(order: Order) -> str:
    if order.column.kind == "date":
        return f"the {'latest' if order.descending else 'earliest'} {order.column.en}"
    return f"the {'highest' if order.descending else 'lowest'} {order.column.en}"


def _number_en(rng: random.Random, number: int) -> str:
    return _NUMBERS_EN[number] if number <= 10 and rng.random() < 0.3 else str(number)


def _comment_en(query: Query) -> str:
    text = f"Get {_listed_en(query) or 'all columns'} of {query.table.en}"
    if query.condition:
        column, operator, value = (
            query.condition.column,
            query.condition.operator,
            query.condition.value,
        )
        words = {"text": _EQUAL_EN, "date": _DATE_EN}.get(column.kind, _COMPARE_EN)[operator][0]
        text += f" whose {column.en} is{words and ' '}{words} {value}"
    if query.order:
        text += f", {_extreme_en(query.order).removeprefix('the ')} first"
    if query.limit:
        text += f", at most {query.limit}"
    return text


# ---------------------------------------------------------------- Chinese


def _ask_zh(rng: random.Random, query: Query) -> str:
    columns = _columns_zh(rng, query)
    condition = _condition_zh(rng, query.condition)
    tail = _tail_zh(rng, query)
    rows = f"{condition}的{query.table.zh}" if condition else rng.choice(("所有", "全部")) + query.table.zh
    if query.order and query.limit and rng.random() < 0.4:
        number = _number_zh(rng, query.limit)
        noun = f"{_extreme_zh(query.order)}的{number}{query.table.measure}{query.table.zh}"
        rows, tail = (f"{condition}的{query.table.zh}中{noun}" if condition else noun), ""
    verb = rng.choice(("查询", "列出", "显示", "找出", "请给出", "帮我查一下", "我想看", "请列出", "给我", "查看"))
    shape = rng.random()
    if shape < 0.5:
        return f"{verb}{rows}的{columns}{tail}。"
    if shape < 0.7:
        return f"{rows}有哪些？{verb}{columns}{tail}。"
    if shape < 0.85:
        return f"对于{rows}，{verb}{columns}{tail}。"
    return f"{rows}：{columns}{tail}。"


def _columns_zh(rng: random.Random, query: Query) -> str:
    if not query.columns:
        return rng.choice(("全部信息", "所有列", "所有字段", "全部字段", "详细信息"))
    names = [column.zh for column in query.columns]
    return names[0] if len(names) == 1 else f"{'、'.join(names[:-1])}{rng.choice(('和', '以及'))}{names[-1]}"


def _condition_zh(rng: random.Random, condition: Condition | None) -> str:
    if condition is None:
        return ""
    column, value = condition.column, condition.value
    if column.kind == "text":
        assert column.places is not None
        negative = condition.operator == "!="
        quoted = f"“{value}”" if rng.random() < 0.15 else value
        if rng.random() < 0.5:
            return column.places["zh"][negative].format(quoted)
        return f"{column.zh}{rng.choice(_EQUAL_ZH[condition.operator]).format(quoted)}"
    if column.kind == "date":
        assert column.verb is not None
        said = _date_zh(value) if rng.random() < 0.3 else value
        how = rng.choice(_DATE_ZH[condition.operator]).format(said)
        return f"{how}{column.verb['zh']}" if rng.random() < 0.5 else f"{column.zh}{how}"
    amount = f"{value}元" if column.money and rng.random() < 0.3 else value
    return f"{column.zh}{rng.choice(_COMPARE_ZH[condition.operator]).format(amount)}"


def _tail_zh(rng: random.Random, query: Query) -> str:
    parts = []
    if query.order:
        parts.append(_order_zh(rng, query.order))
    if query.limit:
        number = _number_zh(rng, query.limit)
        parts.append(rng.choice(("只要前{}条", "取前{}条", "最多{}条", "限{}条", "只看{}条")).format(number))
    return "".join(f"，{part}" for part in parts)


def _order_zh(rng: random.Random, order: Order) -> str:
    if order.column.kind == "date":
        how = ("从新到旧", "从晚到早", "降序") if order.descending else ("从旧到新", "从早到晚", "升序")
    else:
        how = ("从高到低", "从大到小", "降序") if order.descending else ("从低到高", "从小到大", "升序")
    ending = rng.choice(("排列", "排序", ""))
    return f"{rng.choice(('按', '按照', '根据'))}{order.column.zh}{rng.choice(how)}{ending}"


def _extreme_zh(order: Order) -> str:
    high, low = ("最晚", "最早") if order.column.kind == "date" else ("最高", "最低")
    return f"{order.column.zh}{high if order.descending else low}"


def _number_zh(rng: random.Random, number: int) -> str:
    return _NUMBERS_ZH[number] if number <= 10 and rng.random() < 0.3 else str(number)


def _date_zh(value: str) -> str:
    year, month, day = value.split("-")
    return f"{year}年{int(month)}月{int(day)}日"


def _comment_zh(query: Query) -> str:
    text = f"查询{query.table.zh}的{'和'.join(column.zh for column in query.columns) or '所有列'}"
    if query.condition:
        column, operator, value = (
            query.condition.column,
            query.condition.operator,
            query.condition.value,
        )
        words = {"text": _EQUAL_ZH, "date": _DATE_ZH}.get(column.kind, _COMPARE_ZH)[operator][0]
        text += f"，{column.zh}{words.format(value)}"
    if query.order:
        text += f"，{_extreme_zh(query.order)}的在前"
    if query.limit:
        text += f"，最多{query.limit}条"
    return text
