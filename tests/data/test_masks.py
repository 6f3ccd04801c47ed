"""Which tokens are trained, written down by hand for every template, and as transformers marks them."""

from __future__ import annotations

from itertools import groupby

import numpy as np
import pytest

from tests.data.test_templates import CONVERSATIONS, KINDS, assistant, system, user
from tests.data.tiny_tokenizers import make_tokenizer
from trueup.data.chat_template import flatten
from trueup.data.templates import TEMPLATES, load_template

TALK = (system("SYS"), user("Q1"), assistant("A1"), user("Q2"), assistant("A2"))
_QWEN = (
    "<|im_start|>system\nSYS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n⟦A1<|im_end|>⟧\n"
    "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n⟦A2<|im_end|>⟧"
)
#: Every sequence of TALK; what is between ⟦ and ⟧ is trained, and nothing else.
TRAINED = {
    "qwen": [_QWEN],
    "qwen3": [  # drops earlier thoughts, so each answer is an example of its own
        "<|im_start|>system\nSYS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n"
        "<think>\n\n</think>\n\n⟦A1<|im_end|>⟧",
        "<|im_start|>system\nSYS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦A2<|im_end|>⟧",
    ],
    "qwen3_nothink": [_QWEN],
    "chatml": [_QWEN],
    "llama2": ["<s>[INST] <<SYS>>\nSYS\n<</SYS>>\n\nQ1 [/INST]⟦ A1 </s>⟧<s>[INST] Q2 [/INST]⟦ A2 </s>⟧"],
    "llama3": [
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nSYS<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nQ1<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦A1<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nQ2<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦A2<|eot_id|>⟧"
    ],
    "mistral": ["<s>[INST] SYS\n\nQ1[/INST]⟦ A1</s>⟧[INST] Q2[/INST]⟦ A2</s>⟧"],
    "gemma": [
        "<bos><start_of_turn>user\nSYS\n\nQ1<end_of_turn>\n<start_of_turn>model\n⟦A1<end_of_turn>⟧\n"
        "<start_of_turn>user\nQ2<end_of_turn>\n<start_of_turn>model\n⟦A2<end_of_turn>⟧"
    ],
    "glm4": ["[gMASK]<sop><|system|>\nSYS<|user|>\nQ1<|assistant|>⟦\nA1<|user|>⟧\nQ2<|assistant|>⟦\nA2<|user|>⟧"],
    "chatglm3": [
        "[gMASK]sop<|system|>\n SYS<|user|>\n Q1<|assistant|>⟦\n A1<|user|>⟧\n Q2<|assistant|>⟦\n A2<|user|>⟧"
    ],
    "baichuan2": ["SYS<reserved_106>Q1<reserved_107>⟦A1⟧<reserved_106>Q2<reserved_107>⟦A2</s>⟧"],
    "phi": [
        "<|system|>\nSYS<|end|>\n<|user|>\nQ1<|end|>\n<|assistant|>\n⟦A1<|end|>⟧\n"
        "<|user|>\nQ2<|end|>\n<|assistant|>\n⟦A2<|end|>⟧"
    ],
    "deepseek": [
        "<｜begin▁of▁sentence｜>SYS\n\nUser: Q1\n\nAssistant:⟦ A1<｜end▁of▁sentence｜>⟧"
        "User: Q2\n\nAssistant:⟦ A2<｜end▁of▁sentence｜>⟧"
    ],
    "deepseek3": [
        "<｜begin▁of▁sentence｜>SYS<｜User｜>Q1<｜Assistant｜>⟦A1<｜end▁of▁sentence｜>⟧"
        "<｜User｜>Q2<｜Assistant｜>⟦A2<｜end▁of▁sentence｜>⟧"
    ],
    "alpaca": [
        "<s>SYS\n\n### Instruction:\nQ1\n\n### Response:\n⟦A1</s>⟧\n\n### Instruction:\nQ2\n\n### Response:\n⟦A2</s>⟧"
    ],
    "vicuna": ["<s>SYS USER: Q1 ASSISTANT:⟦ A1</s>⟧USER: Q2 ASSISTANT:⟦ A2</s>⟧"],
    "default": [
        "System: SYS<|endoftext|>\nHuman: Q1<|endoftext|>\nAssistant:⟦A1<|endoftext|>⟧\n"
        "Human: Q2<|endoftext|>\nAssistant:⟦A2<|endoftext|>⟧"
    ],
    "empty": ["SYSQ1⟦A1⟧Q2⟦A2<|endoftext|>⟧"],
}


def encoded(template, messages) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, mask) of every sequence of a conversation."""
    return [flatten(spans, template.spans.encode([spans])[0]) for spans in template.chat_spans(messages)]


def marked(template, ids: np.ndarray, mask: np.ndarray) -> str:
    """The tokens as text, trained ones between brackets."""
    runs = groupby(zip(ids.tolist(), mask.tolist(), strict=True), key=lambda pair: pair[1])
    texts = [(trained, template.tokenizer.decode([token for token, _ in run])) for trained, run in runs]
    return "".join(f"⟦{text}⟧" if trained else text for trained, text in texts)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_trained_tokens_of_every_template_are_those_written_here(name: str):
    template = load_template(make_tokenizer(name), name, enable_thinking=False)
    assert [marked(template, *sequence) for sequence in encoded(template, TALK)] == TRAINED[name]


# --- as transformers marks them -------------------------------------------------------------------

#: Templates that mark their answers themselves, with what ends them.
MARKING = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}"
    "{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "llama3": "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|eot_id|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
    "phi": "{% for m in messages %}{{ '<|' + m.role + '|>\\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|end|>' }}{% endif %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}",
    "deepseek3": "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% else %}{{ '<｜Assistant｜>' }}"
    "{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}",
}


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MARKING)
def test_masks_are_those_of_transformers_where_a_template_marks_its_answers(name: str, kind: str, conversation: str):
    messages = CONVERSATIONS[conversation]
    tokenizer = make_tokenizer(name, kind)
    tokenizer.chat_template = MARKING[name]
    ((ids, mask),) = encoded(load_template(tokenizer, None), messages)
    theirs = tokenizer.apply_chat_template(
        [message.to_dict() for message in messages], return_dict=True, return_assistant_tokens_mask=True
    )
    assert ids.tolist() == theirs["input_ids"][: len(ids)], "what follows the last answer is nobody's to learn"
    assert mask.astype(int).tolist() == theirs["assistant_masks"][: len(ids)]
    assert mask[-1] and not any(theirs["assistant_masks"][len(ids) :])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MARKING)
def test_a_template_without_marks_trains_what_it_would_mark(name: str, kind: str):
    plain = MARKING[name].replace("{% generation %}", "").replace("{% endgeneration %}", "")
    for messages in CONVERSATIONS.values():
        found = []
        for source in (MARKING[name], plain):
            tokenizer = make_tokenizer(name, kind)
            tokenizer.chat_template = source
            found.append([(i.tolist(), m.tolist()) for i, m in encoded(load_template(tokenizer, None), messages)])
        assert found[0] == found[1]
