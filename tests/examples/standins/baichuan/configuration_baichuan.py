"""A stand-in for the code in Baichuan 2's repositories: their names of settings, in a tenth of the lines."""

from transformers import PretrainedConfig


class BaichuanConfig(PretrainedConfig):
    model_type = "baichuan"

    def __init__(
        self, vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        model_max_length=4096, rms_norm_eps=1e-6, **rest,
    ):  # fmt: skip
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.model_max_length = model_max_length
        self.rms_norm_eps = rms_norm_eps
        self.hidden_act = "silu"
        super().__init__(**{"tie_word_embeddings": False, **rest})
