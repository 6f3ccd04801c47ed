"""`trueup export`: adapters folded into their base, written for others, and compared with what they came from.

The order is what makes the comparison mean something: base and adapters beside one another are asked first; then the
adapters are folded in and asked again; then the weights are rounded and written; and what is read back from the files
is asked last. Only one of these models is in memory at a time.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from trueup import __version__
from trueup.config.schema import RunConfig
from trueup.errors import ModelError
from trueup.inference.export import push as hub
from trueup.inference.export.calibration import calibration_texts
from trueup.inference.export.card import Stage, card, public_name, read_stage
from trueup.inference.export.ollama import modelfile
from trueup.inference.export.plan import Plan, make_plan
from trueup.inference.export.probe import Difference, Rows, ask, difference, probe_rows
from trueup.inference.export.stage import staged
from trueup.models.expansion import insert_blocks
from trueup.models.merging import cast, fold, load_beside, load_gguf, load_written, round_weights
from trueup.models.plain import tidy_generation
from trueup.models.requantise import quantise_awq, quantise_bitsandbytes, quantise_gptq
from trueup.models.reward import HEAD, RewardModel, check_trained
from trueup.models.rope import context_of
from trueup.training import durable

log = logging.getLogger("trueup")

REPORT = "export.json"
#: shares of the largest logit. Folding is exact but for the order of sums; files hold what was in memory; inserted
#: blocks add 0.
_FOLDED, _WRITTEN, _INSERTED = 5e-3, 1e-4, 1e-6


@dataclass
class Exported:
    """What was written, and how far it is from base and adapters.

    Attributes:
        differences: name of what was read back ("model", "gguf", "quantised") → its distance from base and adapters.
        files: name → bytes.
        url: of the repository it was pushed to.
    """

    directory: Path
    facts: dict[str, Any]
    differences: dict[str, Difference] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    url: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "directory": str(self.directory),
            **self.facts,
            "largest_logit_difference": {name: found.to_dict() for name, found in self.differences.items()},
            "files": self.files,
            "url": self.url,
        }

    def render(self) -> str:
        size = sum(self.files.values()) / 1e9
        weights = [name for name in self.files if name.endswith((".safetensors", ".gguf"))]
        lines = [f"wrote {self.directory}: {len(self.files)} files, {size:.2f} GB ({', '.join(weights)})"]
        lines += [f"  {key}: {_shown(value)}" for key, value in self.facts.items()]
        lines += [
            f"  largest logit difference of the {name} from base + adapter: {found}"
            for name, found in self.differences.items()
        ]
        return "\n".join(lines + ([f"  pushed to {self.url}"] if self.url else []))


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def export(cfg: RunConfig) -> Exported:
    """Write what a config asks for.

    Raises:
        UserError: something is wrong; then nothing is at export_dir that was not there before.
    """
    plan = make_plan(cfg)
    _say(plan)
    done = Exported(plan.target, _facts(plan))
    texts = _calibration(plan)
    with staged(plan.target, cfg.export.overwrite_export_dir) as stage:
        write(stage, plan, lambda: _beside(plan), done)
        if cfg.export.export_quantization_bit:
            _quantise(stage, plan, texts, done)
        _write_companions(stage, plan, done)
    if cfg.export.export_hub_model_id:
        done.url = hub.push(plan.target, cfg)
    return done


def _say(plan: Plan) -> None:
    export = plan.cfg.export
    if "export_size" in plan.cfg.explicit:
        log.info(
            "export_size: %g means files of at most %g GB; bits are set by export_quantization_bit",
            export.export_size, export.export_size,
        )  # fmt: skip
    if export.export_quantization_method in ("gptq", "awq"):
        log.warning("quantising by %s has not been measured by us", export.export_quantization_method)
    if export.export_quantization_method == "gptq" and "export_quantization_method" not in plan.cfg.explicit:
        log.info("export_quantization_dataset is set: quantised by GPTQ (export_quantization_method)")
    for stage in _stages(plan):
        if bits := stage.config.get("quantization_bit"):
            log.info("the adapter was trained on weights of %s bits, and is folded into the unquantised ones", bits)


def _facts(plan: Plan) -> dict[str, Any]:
    """How it is written, for people and for export.json; no path of this machine among them."""
    export = plan.cfg.export
    facts: dict[str, Any] = {"base": public_name(plan.root)}
    if plan.starts:
        facts["adapters"] = [public_name(path) for path in plan.starts]
    if len(plan.starts) > 1 or plan.combination.weights:
        facts["merge"] = plan.combination.method
    if plan.combination.weights:
        facts["weights"] = list(plan.combination.weights)
    facts |= {"dtype": str(plan.dtype).removeprefix("torch."), "template": plan.template.name}
    if export.export_quantization_bit:
        facts["quantised"] = f"{export.export_quantization_bit} bits by {export.export_quantization_method}"
    if export.num_expand:
        facts["inserted blocks"] = export.num_expand
    if export.export_gguf:
        facts["gguf"] = export.export_gguf
    return facts


def _calibration(plan: Plan) -> list[str]:
    """Texts for the quantisers that want some, read before hours are spent."""
    wanted = plan.cfg.export.export_quantization_method in ("gptq", "awq")
    return calibration_texts(plan.cfg, plan.template) if wanted else []


def _beside(plan: Plan) -> PreTrainedModel:
    model = load_beside(
        plan.cfg.model, plan.root, plan.location, plan.starts, plan.combination, plan.device, plan.kind
    )  # fmt: skip
    if plan.is_reward:
        base = model.get_base_model() if plan.starts else model
        scorer = RewardModel(base, model)
        check_trained(scorer, plan.root)
        if scorer.pad_id is None:
            scorer.pad_with(plan.tokenizer.pad_token_id)
    return model


def write_merged(
    stage: Path, plan: Plan, beside: Callable[[], Any], folded: Callable[[PreTrainedModel], None] = lambda _: None
) -> None:
    """`write` for a program that has a model in its hands already; with export.json, and without the rest."""
    done = Exported(plan.target, _facts(plan))
    write(stage, plan, beside, done, folded)
    _write_report(stage, done)
    log.info("largest logit difference of %s from base + adapter: %s", plan.target, done.differences["model"])


def write(
    stage: Path,
    plan: Plan,
    beside: Callable[[], Any],
    done: Exported,
    folded: Callable[[PreTrainedModel], None] = lambda _: None,
) -> None:
    """The model, folded and rounded, with tokenizer, template and generation settings, and its GGUF file.

    Args:
        beside: makes the base with its adapters beside it, in fp32.
        folded: is shown the merged model before it is rounded.

    Raises:
        ModelError: what was folded, or what was read back, is not what it was made from.
    """
    model = beside()
    rows = _rows(plan, model)
    before = ask(model, rows)
    merged = fold(model)
    del model
    _require(difference(before, ask(merged, rows)), _FOLDED, "folding the adapters in changed the model")
    folded(merged)
    if plan.cfg.export.num_expand:
        shallow = ask(merged, rows)
        insert_blocks(merged, plan.cfg.export.num_expand)
        _require(difference(shallow, ask(merged, rows)), _INSERTED, "the inserted blocks changed the model")
    if not plan.is_reward:
        tidy_generation(merged, plan.template.stop_ids)
    if plan.cfg.export.export_gguf:
        _write_gguf(stage, plan, merged)
    keep = HEAD if plan.is_reward else None
    round_weights(merged, plan.dtype, keep)
    rounded = ask(merged, rows)
    cast(merged, plan.dtype, keep)
    merged.save_pretrained(stage, max_shard_size=plan.shard_bytes)
    plan.tokenizer.save_pretrained(stage)
    del merged
    # Read in fp32, so that the difference is of the weights, and not of how a machine computes in 16 bits.
    after = ask(load_written(stage, plan.cfg.model, plan.device, torch.float32, plan.kind), rows)
    _require(difference(rounded, after), _WRITTEN, "what was written is not what was folded")
    packed = plan.cfg.export.export_quantization_bit
    done.differences["model before quantising" if packed else "model"] = difference(before, after)
    if plan.cfg.export.export_gguf:
        read = load_gguf(stage, _gguf_name(plan), plan.device)
        done.differences["gguf"] = difference(before, ask(read, rows))
    plan.before[:] = before


def _rows(plan: Plan, model: Any) -> Rows:
    return probe_rows(plan.tokenizer, plan.template, model.get_input_embeddings().weight.shape[0])


def _require(found: Difference, tolerance: float, what: str) -> None:
    if not found.within(tolerance):
        raise ModelError(
            f"{what}: logits differ by {found}", where="export_dir", expected=f"at most {tolerance:g} of the largest",
            fix="nothing was kept; this is a fault in a library or in trueup: please report it with this line",
        )  # fmt: skip


def _gguf_name(plan: Plan) -> str:
    return f"{plan.target.name}-{plan.cfg.export.export_gguf}.gguf"


def _write_gguf(stage: Path, plan: Plan, merged: PreTrainedModel) -> None:
    from trueup.inference.export.gguf_file import GgufModel, check_rounding, write_gguf

    kind = str(plan.cfg.export.export_gguf)
    about = GgufModel(plan.target.name, plan.tokenizer, plan.template.stop_ids[0], plan.tokenizer.chat_template, kind)
    write_gguf(stage / _gguf_name(plan), merged, about)
    check_rounding(stage / _gguf_name(plan), merged, kind)


def _quantise(stage: Path, plan: Plan, texts: list[str], done: Exported) -> None:
    """Quantised weights in the place of the full ones."""
    export, full = plan.cfg.export, stage / ".full"
    full.mkdir()
    for path in list(stage.iterdir()):
        if path != full and path.suffix != ".gguf":
            path.rename(full / path.name)
    bits, longest = int(export.export_quantization_bit or 0), export.export_quantization_maxlen
    match export.export_quantization_method:
        case "gptq":
            quantise_gptq(full, stage, bits, texts, longest)
        case "awq":
            quantise_awq(full, stage, texts, longest)
        case _:
            quantise_bitsandbytes(full, stage, bits, plan.device, plan.dtype, plan.kind, plan.shard_bytes)
    plan.tokenizer.save_pretrained(stage)
    if not (stage / "generation_config.json").exists() and (full / "generation_config.json").exists():
        shutil.copy2(full / "generation_config.json", stage)
    shutil.rmtree(full)
    read = load_written(stage, plan.cfg.model, plan.device, plan.dtype, plan.kind)
    done.differences["quantised model"] = difference(plan.before, ask(read, _rows(plan, read)))


def _write_companions(stage: Path, plan: Plan, done: Exported) -> None:
    """Modelfile, card and report."""
    export, stops = plan.cfg.export, plan.tokenizer.convert_ids_to_tokens(list(plan.template.stop_ids))
    if not plan.is_reward:
        source = f"./{_gguf_name(plan)}" if export.export_gguf else "."
        context = context_of(plan.shape.config, 2048)
        text = modelfile(source, plan.template, stops, context, plan.cfg.data.default_system)
        (stage / "Modelfile").write_text(text, encoding="utf-8")
    shown = {key: _shown(value) for key, value in done.facts.items()}
    shown |= {f"largest logit difference ({name})": str(found) for name, found in done.differences.items()}
    text = card(plan.target.name, public_name(plan.root), _stages(plan), shown, plan.is_reward, _use(plan))
    (stage / "README.md").write_text(text, encoding="utf-8")
    _write_report(stage, done)
    done.files = {path.relative_to(stage).as_posix(): path.stat().st_size for path in durable.walk_files(stage)}


def _write_report(stage: Path, done: Exported) -> None:
    report = done.to_dict()
    for private in ("directory", "files", "url"):
        report.pop(private)
    durable.write_json(stage / REPORT, {"trueup": __version__, **report})


def _stages(plan: Plan) -> list[Stage]:
    places = [Path(place) for place in dict.fromkeys([plan.location, *plan.starts])]
    return [stage for place in places if place.is_dir() and (stage := read_stage(place))]


def _use(plan: Plan) -> str:
    name = plan.cfg.export.export_hub_model_id or plan.target.name
    if plan.is_reward:
        loads = f'model = AutoModelForSequenceClassification.from_pretrained("{name}")'
        return f"```python\nfrom transformers import AutoModelForSequenceClassification\n\n{loads}\n```"
    lines = ["```bash", f"trueup chat --model_name_or_path {name}"]
    if plan.cfg.export.export_gguf:
        lines.append(f"llama-cli -m {_gguf_name(plan)}")
    lines += [f"ollama create {plan.target.name} -f Modelfile", "```"]
    return "\n".join(lines)
