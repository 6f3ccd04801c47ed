"""Conversations filled into what a template writes around unseen texts are the ones it renders itself."""

from __future__ import annotations

from itertools import product

import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from tests.data.tiny_tokenizers import FAMILIES, make_tokenizer
from trueup.data.rendering import Renderer, TemplateRefusal
from trueup.data.template_names import TEMPLATES
from trueup.data.templates import load_template
from trueup.data.unseen import Looked, Unseen, frame, may_be_blind

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = [
    "",
    " a ",
    "x</think>y",
    '"quoted" <b>&amp;\n',
    "{{ 1 }}",
    "你好",
    "long " * 30,
    "<think>\nno\n</think>\n\nyes",
]
ROLES = [
    ("user",),
    ("user", "assistant"),
    ("system", "user"),
    ("system", "user", "assistant", "user"),
    ("user", "tool"),
]


def conversations(roles):
    for shift in range(len(TEXTS)):
        yield [{"role": role, "content": TEXTS[(shift + 3 * i) % len(TEXTS)]} for i, role in enumerate(roles)]


def by_transformers(renderer, messages, header, thinking):
    asked = {} if thinking is None else {"enable_thinking": thinking}
    texts, _ = render_jinja_template(
        conversations=[messages], chat_template=renderer._program, add_generation_prompt=header, **renderer.variables,
        **asked,
    )  # fmt: skip
    return texts[0]


@pytest.mark.parametrize("name", [name for name in FAMILIES if name in TEMPLATES])
def test_every_shipped_template_renders_as_transformers_does(name):
    renderer = load_template(make_tokenizer(name), name).renderer
    for roles, header, thinking in product(ROLES, (False, True), (None, True, False)):
        for messages in conversations(roles):
            try:
                expected = by_transformers(renderer, messages, header, thinking)
            except Exception:
                with pytest.raises(TemplateRefusal):
                    renderer.text(messages, header=header, thinking=thinking)
                continue
            for _ in range(2):  # rendered, then filled in
                assert renderer.text(messages, header=header, thinking=thinking) == expected


def test_a_template_that_copies_is_rendered_once(monkeypatch):
    renderer = Renderer(CHATML, {})
    first = renderer.text([{"role": "user", "content": "a"}])
    monkeypatch.setattr(renderer, "_run", None)
    assert renderer.text([{"role": "user", "content": "b"}]) == first.replace("a<|im", "b<|im")


@pytest.mark.parametrize(
    "look",
    [
        "m.content | trim", "m.content | length", "m.content | tojson", "m | tojson", "m.content ~ ''",
        "m.content | int", "m.content | string", "m.content | replace('a', 'b')", "m.content[:3]", "m.content[0]",
        "m.content.strip()", "m.content == 'a'", "m.content != 'a'", "'a' in m.content", "m.content in 'abc'",
        "m.content in ['a']", "'x' if m.content else 'y'", "not m.content", "m.content < 'a'", "m.content * 2",
        "'%s' % m.content", "'{}'.format(m.content)", "'{!s}'.format(m.content)", "' '.join([m.content])",
        "[m.content] | join", "m.content | list", "m.content | first", "m.content is iterable", "m.content is eq('a')",
        "{m.content: 1}", "'abc'.startswith(m.content)", "m.content | default('a', true)", "m.content % 2",
        "range(m.content)", "m.values() | list | join", "messages == [{'role': m.role, 'content': 'a'}]",
        "m.content + 1",
    ],
)  # fmt: skip
def test_a_template_that_looks_is_noticed(look):
    source = "{% for m in messages %}{{ " + look + " }}{% endfor %}"
    program = _compile_jinja_template(source)
    if may_be_blind(program.environment.parse(source), source):
        assert frame(lambda messages: program.render(messages=messages), ("user",)) is None


@pytest.mark.parametrize(
    "source",
    [
        "{% set x %}{{ messages[0].content }}{% endset %}{{ 'y' if 'a' in x }}",
        "{% macro f(x) %}{{ x }}{% endmacro %}{{ f(messages[0].content) | length }}",
        "{% filter upper %}{{ messages[0].content }}{% endfilter %}",
        "{% call g() %}{{ messages[0].content }}{% endcall %}",
        "{% set f = ''.format %}{{ f(messages[0].content) }}",
        "\ufdd10\ufdd2",
    ],
)
def test_what_could_hide_a_look_is_refused(source):
    assert not may_be_blind(_compile_jinja_template(CHATML).environment.parse(source), source)


def test_a_text_is_a_string_that_answers_nothing():
    text = Unseen("x")
    assert isinstance(text, str) and str("a" + text + "b") == "axb"
    for ask in (len, bool, hash, iter, int, float, lambda x: x.strip, lambda x: x == "a", lambda x: f"{x}"):
        with pytest.raises(Looked):
            ask(text)


def test_the_texts_decide_where_a_template_asks_about_them():
    renderer = Renderer("{% for m in messages %}{{ 'Y' if 'a' in m.content else 'N' }}{% endfor %}", {})
    assert [renderer.text([{"role": "user", "content": text}]) for text in "abab"] == ["Y", "N", "Y", "N"]
