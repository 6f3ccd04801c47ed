"""A causal language model seen as a function from forests to log-probabilities.

Two paths give the same numbers. *Shared*: the forest in one row, through `models/attention.py`. *Unshared*: one
right-padded row a sequence with an ordinary mask, for architectures whose attention cannot take a layout.
`verify_layout` decides which, by comparing with plain forwards of the loaded model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from trueup.errors import ModelError
from trueup.models.attention import FOREST_ATTENTION, kernels_for
from trueup.models.layout import ForestLayout
from trueup.models.logprobs import Head, token_logps
from trueup.models.noise import noisy, row_lengths
from trueup.models.offload import offloading
from trueup.types import Forest, Segment

log = logging.getLogger("trueup")


class Policy:
    """The model under training (or a reference), with its backbone, its head and its layout.

    Attributes:
        model: what holds the parameters; a PeftModel when adapters are attached.
        base: the transformers model inside.
        shared: whether forests run in the shared layout.
        layout_note: why they do not, where they were found not to.
        auto_class, task_type: what it is to transformers and to peft.
        always_trained: modules that train whole, whatever else trains.
        noise_alpha: of NEFTune, in training mode; None for no noise.
        boosted: whether it has fused layers, and adapters that are added get them, too.
        gap: of fused layers to its own, as compared at load (`models/trial.py`); None where they were not.
    """

    auto_class = AutoModelForCausalLM
    task_type = "CAUSAL_LM"
    always_trained: tuple[str, ...] = ()

    @classmethod
    def prepare(cls, config: PretrainedConfig) -> None:
        """Change a model's config before its weights are loaded; a language model's is right as it is."""

    def pad_with(self, token: int | None) -> None:
        """Hear which token pads; nothing is padded here, but the files of some models have to name it."""

    def __init__(self, base: PreTrainedModel, model: nn.Module | None = None) -> None:
        self.base = base
        self.model = model if model is not None else base
        self.plain_attention: str = base.config._attn_implementation
        self.shared = False
        self.layout_note: str | None = None
        self.noise_alpha: float | None = None
        self.boosted = True
        self.gap: float | None = None
        self.offloads = False  # whether activations wait for the backward on the host
        self.gathered = False  # which kernel takes the shared layout (`ForestLayout`)
        self._layout: ForestLayout | None = None  # of the last batch in the shared layout

    @property
    def device(self) -> torch.device:
        return self.base.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def head_elements(self) -> int | None:
        """Weights of one attention head's projection; None where there are no heads."""
        text = self.base.config.get_text_config()
        heads = getattr(text, "num_attention_heads", None)
        columns = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else None)
        return columns * text.hidden_size if columns else None

    @property
    def head(self) -> Head:
        """The output projection as it is now (adapters may have wrapped it since loading)."""
        return head_of(self.base)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Names → parameters the optimizer owns, in the model's order."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def token_logps(self, forest: Forest) -> Tensor:
        """log-probabilities [N] (fp32) of the forest's targets; `forest` may live on any device."""
        forest = forest.to(self.device)
        return token_logps(self.hidden(forest), self.head, forest.target)

    def hidden(self, forest: Forest) -> Tensor:
        """Hidden states [N, H] at the positions the forest reads."""
        with offloading(self.model) if self.offloads and torch.is_grad_enabled() else nullcontext():
            return self._shared_hidden(forest) if self.shared else self._unshared_hidden(forest)

    def _backbone(self, **inputs) -> Tensor:
        backbone = self.base.get_decoder()
        return backbone(use_cache=False, **inputs).last_hidden_state

    def _noise(self, lengths: Callable[[], Tensor]) -> AbstractContextManager[None]:
        """What a forward pass runs in: noise in training mode, where it is asked for. `lengths`: of tokens' rows."""
        if not (self.noise_alpha and self.model.training):
            return nullcontext()
        return noisy(self.base.get_input_embeddings(), self.noise_alpha, lengths())

    def _shared_hidden(self, forest: Forest) -> Tensor:
        self._layout = layout = ForestLayout(forest.segments, forest.input_ids.device, self.gathered)
        inputs = {"input_ids": forest.input_ids[None], "position_ids": forest.position_ids[None], "forest": layout}
        with self._noise(lambda: row_lengths(forest)[None]):
            hidden = self._backbone(**inputs)
        return hidden[0, forest.read_at]

    def _unshared_hidden(self, forest: Forest) -> Tensor:
        rows = [
            torch.cat([forest.input_ids[s.start : s.stop] for s in map(forest.segments.__getitem__, path)])
            for path in forest.paths
        ]
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        # Right padding is never attended to by real tokens (causal), and its own outputs are never read.
        input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        columns = torch.arange(input_ids.shape[1], device=self.device)
        with self._noise(lambda: lengths[:, None].float()):
            hidden = self._backbone(
                input_ids=input_ids,
                attention_mask=(columns < lengths[:, None]).long(),
                position_ids=columns.expand_as(input_ids),
            )
        return hidden[forest.owner, forest.position_ids[forest.read_at]]

    @contextmanager
    def generating(self) -> Iterator[PreTrainedModel]:
        """The transformers model set up for `generate`: eval mode and its own attention."""
        training = self.model.training
        self.base.set_attn_implementation(self.plain_attention)
        self.model.eval()
        try:
            yield self.base
        finally:
            self.model.train(training)
            if self.shared:
                self.base.set_attn_implementation(FOREST_ATTENTION)

    @torch.no_grad()
    def verify_layout(self, plain: str | None = None) -> str | None:
        """Choose the shared layout if it reproduces plain forwards; otherwise say why it does not.

        One forest of a prompt and two answers is compared with a plain forward of the two sequences.

        Args:
            plain: why the shared layout is not to be tried at all.

        Returns:
            None when the shared layout is in use, else the reason it is not.

        Raises:
            ModelError: even the unshared path does not reproduce the model's own logits.
        """
        training = self.model.training
        self.model.eval()
        try:
            forest, expected = self._probe()
            self.shared = False
            unshared = self._unshared_probe(forest)
            tolerance = 1e-3 if self.dtype == torch.float32 else 0.25
            if _gap(unshared, expected) > tolerance:
                raise ModelError(
                    f"{type(self.base).__name__} computes its logits in a way that is not known here: "
                    f"log-probabilities differ by {_gap(unshared, expected):.2g}",
                    where="model_name_or_path",
                    expected=f"differences below {tolerance}",
                    fix="please report the architecture; until then use another model",
                )
            reason = plain
            for gathered in () if plain else kernels_for(self.device, self.dtype):
                self.gathered = gathered
                reason = self._try_shared(forest, unshared)
                if reason is None:
                    break
                log.info("the %s kernel does not fit: %s", "varlen" if gathered else "segments", reason)
        finally:
            self.model.train(training)
        if reason:
            self.base.set_attn_implementation(self.plain_attention)
        self.shared, self.layout_note = reason is None, reason
        return reason

    def _unshared_probe(self, forest: Forest) -> Tensor:
        try:
            return self._read(forest)
        except (TypeError, KeyError, RuntimeError, NotImplementedError, AttributeError) as error:
            raise ModelError(
                f"{type(self.base).__name__} cannot be run as a decoder with a head: {type(error).__name__}: {error}",
                where="model_name_or_path",
                expected="a causal language model of text",
                fix="where precisions clash, as in Mamba's on a CPU, set bf16: false",
            ) from error

    def _try_shared(self, forest: Forest, expected: Tensor) -> str | None:
        try:
            self.base.set_attn_implementation(FOREST_ATTENTION)
            self.shared = True
            gap = _gap(self._read(forest), expected)
            assert self._layout is not None
            config = self.base.config.get_text_config()
            if reason := _unseen_window(config, self._layout.windows) or _unasked(config, self._layout.calls):
                return reason
            # Kernels round differently, in bf16 by more the surer a model is; what a sibling's tokens would change is
            # the measure of how much is too much. It takes a forward, so it is asked for only where it can matter.
            exact = self.dtype == torch.float32
            limit = 1e-4 if exact else 0.1
            if gap > limit and not exact:
                limit = max(limit, 0.2 * _gap(self._read(_leaking(forest)), expected))
        except (ValueError, TypeError, KeyError, RuntimeError, NotImplementedError, AttributeError) as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        return None if gap <= limit else f"log-probabilities differ from plain forwards by {gap:.2g}"

    def _probe(self) -> tuple[Forest, Tensor]:
        prompt, chosen, rejected = 7, 6, 5
        total = prompt + chosen + rejected
        vocab = self.base.get_input_embeddings().weight.shape[0]
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(min(vocab, 1000), (total,), generator=generator)
        fork = prompt + chosen
        positions = torch.cat([torch.arange(fork), torch.arange(prompt, prompt + rejected)])
        read_at = torch.cat(
            [
                torch.arange(prompt - 1, fork - 1),
                torch.tensor([prompt - 1]),
                torch.arange(fork, total - 1),
            ]
        )
        forest = Forest(
            ids, positions,
            (Segment(0, prompt, -1), Segment(prompt, fork, 0), Segment(fork, total, 0)),
            read_at, ids[prompt:], torch.tensor([0] * chosen + [1] * rejected), 2, ((0, 1), (0, 2)),
        ).to(self.device)  # fmt: skip
        asked, first, second = forest.input_ids.split([prompt, chosen, rejected])
        # One token more makes the rows equally long, so that they need no mask; nothing before it sees it.
        rows = torch.stack([torch.cat([asked, first]), torch.cat([asked, second, first[-1:]])])
        plain = self._read_plainly(rows, prompt)
        return forest, torch.cat([plain[0], plain[1, :rejected]])

    def _read(self, forest: Forest) -> Tensor:
        """[N] what the check at load compares."""
        return self.token_logps(forest)

    def _read_plainly(self, rows: Tensor, first: int) -> Tensor:
        """[B, T - first] the same of sequences [B, T] from token `first` on, by the model's own forward."""
        logits = self.base(input_ids=rows, use_cache=False).logits[:, first - 1 : -1].float()
        return torch.log_softmax(logits, -1).gather(2, rows[:, first:, None]).squeeze(2)


def _unasked(config, calls: int) -> str | None:
    """Why a model that has layers of its own kind cannot share prompts. Counted, because the numbers of a model whose
    weights are new tell no wrong mask from rounding.
    """
    layers = int(getattr(config, "num_hidden_layers", 1))
    return None if calls >= layers else f"{layers - calls} of its {layers} layers do not ask for an attention kernel"


def _unseen_window(config, windows: set[int]) -> str | None:
    """Why a model whose masks are not plainly causal cannot share prompts: its kernel is not told the window."""
    kinds = set(getattr(config, "layer_types", None) or ())
    if others := kinds - {"full_attention", "sliding_attention"}:
        return f"its layers use {', '.join(sorted(others))}"
    sliding = "sliding_attention" in kinds
    if not kinds:
        sliding = bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True)
    chunked = bool(getattr(config, "attention_chunk_size", None))
    return "its sliding window is in the mask alone" if (sliding and not windows) or chunked else None


def _leaking(forest: Forest) -> Forest:
    """The probe with a fault: its second answer sees the first."""
    prompt, first, second = forest.segments
    return replace(forest, segments=(prompt, first, replace(second, parent=1)))


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def head_of(base: PreTrainedModel) -> Head:
    """The head of a causal LM: its projection, and the scaling or capping its architecture applies."""
    config = base.config.get_text_config()
    scale = 1.0
    if getattr(config, "logit_scale", None):  # Cohere
        scale = float(config.logit_scale)
    if getattr(config, "logits_scaling", None):  # Granite
        scale = 1.0 / float(config.logits_scaling)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(base.get_output_embeddings(), scale, softcap)
