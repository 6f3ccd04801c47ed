"""The benchmark's chat template for ms-swift, given to it with `--external_plugins`."""

from swift.template import TemplateMeta, register_template

register_template(
    TemplateMeta(
        "bench",
        prefix=[],
        system_prefix=["<|im_start|>system\n{{SYSTEM}}<|im_end|>"],
        prompt=["<|im_start|>user\n{{QUERY}}<|im_end|><|im_start|>assistant\n"],
        chat_sep=["<|im_end|>"],
        suffix=["<|im_end|>"],
    )
)
