"""The four tables of the built-in task: columns, what people call them, rows to run queries on.

The rows are made so that a wrong query shows: every threshold a request can name is a value that
occurs, with rows on both sides of it, and every word has more rows than the largest LIMIT.
"""

from __future__ import annotations

import random
import sqlite3
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Literal

ROWS_PER_TABLE = 1200
FIRST_DAY = date(2020, 1, 1)


@dataclass(frozen=True)
class Column:
    """One column: `words` per language for text, a range of values for numbers and dates."""

    name: str
    en: str
    zh: str
    kind: Literal["label", "text", "number", "date"]
    words: dict[str, tuple[str, ...]] | None = None
    start: int = 0
    stop: int = 0
    step: int = 1
    # How a value is said without naming the column: is, is not; and what happened on a date.
    places: dict[str, tuple[str, str]] | None = None
    verb: dict[str, str] | None = None
    money: bool = False


@dataclass(frozen=True)
class Table:
    """One table: its nouns (English plural and singular, Chinese with measure word) and columns."""

    name: str
    en: str
    en_one: str
    zh: str
    measure: str
    columns: tuple[Column, ...]


def _text(name: str, en: str, zh: str, english: str, chinese: str, **more: object) -> Column:
    words = {"en": tuple(english.split(",")), "zh": tuple(chinese.split(","))}
    return Column(name, en, zh, "text", words=words, **more)  # type: ignore[arg-type]


def _number(name: str, en: str, zh: str, *span: int, money: bool = False) -> Column:
    return Column(name, en, zh, "number", None, *span, money=money)


def _date(name: str, en: str, zh: str, verb_en: str, verb_zh: str) -> Column:
    return Column(name, en, zh, "date", stop=ROWS_PER_TABLE, verb={"en": verb_en, "zh": verb_zh})


_PLACES = {"en": ("in {}", "outside {}"), "zh": ("在{}", "不在{}")}
_FROM = {"en": ("from {}", "not from {}"), "zh": ("来自{}", "不是来自{}")}

TABLES = (
    Table(
        "employees",
        "employees",
        "employee",
        "员工",
        "名",
        (
            Column("name", "name", "姓名", "label"),
            _text(
                "department",
                "department",
                "部门",
                "Sales,Finance,Marketing,Engineering,Design,Support,Legal,Research",
                "销售部,财务部,市场部,技术部,设计部,客服部,法务部,研发部",
                places={"en": ("in {}", "not in {}"), "zh": ("{}", "不在{}")},
            ),
            _text(
                "city",
                "city",
                "城市",
                "Beijing,Shanghai,London,Paris,Tokyo,Berlin,Boston,Sydney,Madrid,Toronto",
                "北京,上海,广州,深圳,杭州,成都,武汉,南京,西安,苏州",
                places=_PLACES,
            ),
            _number("salary", "salary", "薪水", 3000, 33000, 100, money=True),
            _number("age", "age", "年龄", 20, 60, 1),
            _date("hire_date", "hire date", "入职日期", "hired", "入职"),
        ),
    ),
    Table(
        "products",
        "products",
        "product",
        "商品",
        "件",
        (
            Column("name", "name", "名称", "label"),
            _text(
                "category",
                "category",
                "类别",
                "Books,Toys,Shoes,Phones,Furniture,Food,Clothing,Sports",
                "图书,玩具,鞋子,手机,家具,食品,服装,运动",
                places={"en": ("in {}", "not in {}"), "zh": ("{}类", "非{}类")},
            ),
            _text(
                "brand",
                "brand",
                "品牌",
                "Acme,Nova,Orion,Zenith,Lumen,Pixel,Delta,Maple",
                "星河,远山,青木,蓝海,晨光,飞鸟,长城,金桥",
                places=_FROM,
            ),
            _number("price", "price", "价格", 5, 1205, 5, money=True),
            _number("stock", "stock", "库存", 0, 600, 10),
            _number("rating", "rating", "评分", 1, 11, 1),
        ),
    ),
    Table(
        "orders",
        "orders",
        "order",
        "订单",
        "笔",
        (
            Column("customer", "customer", "客户", "label"),
            _text(
                "status",
                "status",
                "状态",
                "paid,shipped,pending,cancelled,refunded,delivered",
                "已付款,已发货,待处理,已取消,已退款,已送达",
                places={"en": ("that are {}", "that are not {}"), "zh": ("{}", "不是{}")},
            ),
            _text(
                "region",
                "region",
                "地区",
                "North,South,East,West,Europe,Asia",
                "华北,华南,华东,西部,东北,华中",
                places=_FROM,
            ),
            _number("amount", "amount", "金额", 50, 6050, 50, money=True),
            _number("quantity", "quantity", "数量", 1, 51, 1),
            _date("order_date", "order date", "下单日期", "placed", "下单"),
        ),
    ),
    Table(
        "students",
        "students",
        "student",
        "学生",
        "名",
        (
            Column("name", "name", "姓名", "label"),
            _text(
                "major",
                "major",
                "专业",
                "Physics,History,Biology,Law,Music,Economics,Chemistry,Medicine",
                "物理,历史,生物,法律,音乐,经济,化学,医学",
                places={"en": ("in {}", "not in {}"), "zh": ("{}专业", "非{}专业")},
            ),
            _text(
                "hometown",
                "hometown",
                "家乡",
                "Oxford,Dublin,Milan,Chicago,Seoul,Mumbai,Vienna,Lisbon",
                "长沙,青岛,厦门,大连,昆明,重庆,天津,桂林",
                places=_FROM,
            ),
            _number("score", "score", "成绩", 40, 101, 1),
            _number("credits", "credits", "学分", 0, 180, 5),
            _date("enroll_date", "enrolment date", "入学日期", "enrolled", "入学"),
        ),
    ),
)


def day(index: int) -> str:
    """The ISO date `index` days after the first one."""
    return (FIRST_DAY + timedelta(days=index)).isoformat()


def _cells(column: Column, rng: random.Random) -> list[object]:
    """One column's values over all rows: each possible value equally often, in random order."""
    match column.kind:
        case "label":
            values: list[object] = [f"{column.en} {i:04d}" for i in range(ROWS_PER_TABLE)]
        case "text":
            assert column.words is not None
            values = [*column.words["en"], *column.words["zh"]]
        case "number":
            values = list(range(column.start, column.stop, column.step))
        case "date":
            values = [day(i) for i in range(column.stop)]
    repeated = [values[i % len(values)] for i in range(ROWS_PER_TABLE)]
    rng.shuffle(repeated)
    return repeated


def create_database() -> sqlite3.Connection:
    """A new in-memory database with the four tables, the same rows every time."""
    connection = sqlite3.connect(":memory:")
    rng = random.Random(20)
    for table in TABLES:
        names = ", ".join(column.name for column in table.columns)
        marks = ", ".join("?" * len(table.columns))
        connection.execute(f"CREATE TABLE {table.name} ({names})")
        rows = zip(*(_cells(column, rng) for column in table.columns), strict=True)
        connection.executemany(f"INSERT INTO {table.name} VALUES ({marks})", rows)
    connection.commit()
    return connection
