"""Datasets on Hugging Face, ModelScope and Modelers, each through its own library."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from trueup.data.files import first_line
from trueup.data.registry import DatasetSpec
from trueup.errors import ConfigError, DataError, ModelError
from trueup.network import mind_the_hub


def load_from_hub(
    spec: DatasetSpec, token: str | None = None, cache_dir: str | Path | None = None, streaming: bool = False
) -> Any:
    """A hub's dataset, as a `datasets.Dataset` (or `IterableDataset`). `subset: a+b` is both, one after the other.

    Raises:
        DataError: no such split or subset. ModelError: whatever else keeps it from coming (C17).
    """
    loader = {"modelscope": _load_modelscope, "modelers": _load_modelers}.get(spec.hub, _load_huggingface)
    subsets = (spec.subset or "").split("+")
    options = {"streaming": True} if streaming else {}
    try:
        parts = [loader(replace(spec, subset=subset or None), token, cache_dir, **options) for subset in subsets]
        if len(parts) == 1:
            return parts[0]
        from datasets import concatenate_datasets

        return concatenate_datasets(parts)
    except (DataError, ModelError):
        raise
    except ImportError as error:
        raise ModelError(
            f"dataset {spec.hub_id!r} is on {spec.hub}, whose client is not installed",
            fix="pip install 'trueup[hubs]'",
        ) from error
    except Exception as error:  # hubs' clients raise a zoo; each means: this did not come
        raise _hub_problem(spec, error) from error


class HubRows:
    """Rows of a streamed dataset of a hub: iterate for (row, None); `place` is where the next row begins."""

    def __init__(self, dataset: Any, name: str, place: Any = None) -> None:
        self._dataset, self._name = dataset, name
        if place is not None:
            dataset.load_state_dict(place)
        self._rows = iter(dataset)

    @property
    def place(self) -> Any:
        return self._dataset.state_dict()

    def __iter__(self) -> Iterator[tuple[dict[str, Any], None]]:
        return self

    def __next__(self) -> tuple[dict[str, Any], None]:
        return dict(next(self._rows)), None

    def where(self, line: int | None) -> str:
        return self._name

    def close(self) -> None:
        """Nothing is held open between rows."""


def stream_from_hub(
    spec: DatasetSpec, token: str | None = None, cache_dir: str | Path | None = None, place: Any = None
) -> HubRows:
    """A hub's dataset, fetched while it is read, from a place of an earlier reading. Raises as `load_from_hub`."""
    if "+" in (spec.subset or ""):
        raise ConfigError(
            f"dataset {spec.name!r}: several subsets cannot be streamed as one", where=spec.origin,
            fix="list each subset as a dataset of its own, or set streaming: false",
        )  # fmt: skip
    return HubRows(load_from_hub(spec, token, cache_dir, streaming=True), f"{spec.hub}: {spec.hub_id}", place)


def _load_huggingface(spec: DatasetSpec, token: str | None, cache_dir, **options):
    from datasets import load_dataset

    mind_the_hub()
    return load_dataset(
        spec.hub_id,
        name=spec.subset,
        data_dir=spec.folder,
        split=spec.split,
        token=token,
        cache_dir=str(cache_dir) if cache_dir else None,
        **options,
    )


def _load_modelscope(spec: DatasetSpec, token: str | None, cache_dir, streaming: bool = False):
    from modelscope import MsDataset  # pyright: ignore[reportMissingImports]

    dataset = MsDataset.load(
        spec.hub_id,
        subset_name=spec.subset,
        data_dir=spec.folder,
        split=spec.split,
        token=token,
        cache_dir=str(cache_dir) if cache_dir else None,
        **({"use_streaming": True} if streaming else {}),
    )
    return dataset.to_hf_dataset() if hasattr(dataset, "to_hf_dataset") else dataset


def _load_modelers(spec: DatasetSpec, token: str | None, cache_dir, **options):
    """Modelers' own dataset class needs a numpy from before 2: its files are fetched, and read like local ones."""
    from datasets import load_dataset
    from openmind_hub import snapshot_download  # pyright: ignore[reportMissingImports]

    directory = snapshot_download(
        spec.hub_id, repo_type="dataset", token=token, cache_dir=str(cache_dir) if cache_dir else None
    )
    return load_dataset(directory, name=spec.subset, data_dir=spec.folder, split=spec.split, **options)


def _hub_problem(spec: DatasetSpec, error: Exception) -> Exception:
    """What a hub client's complaint means for the user (C17). The token itself is never shown."""
    name, text = type(error).__name__, first_line(error)
    where = f"dataset {spec.hub_id!r} on {spec.hub}"
    key = {"modelscope": "ms_hub_token", "modelers": "om_hub_token"}.get(spec.hub, "hf_hub_token")
    if isinstance(error, ValueError) and "split" in text.lower():
        return DataError(text, where=where, fix="set `split` in its entry of dataset_info.json")
    if isinstance(error, ValueError) and "config" in text.lower():
        return DataError(text, where=where, fix="set `subset` in its entry of dataset_info.json")
    if "Gated" in name or "gated" in text or "401" in text or "403" in text:
        return ModelError(
            "access is refused: the dataset is private or gated",
            where=where,
            fix=f"accept its terms on the hub, then set {key} to a token of that account",
        )
    if "NotFound" in name and "offline" not in text.lower() and "reach" not in text.lower():
        return ModelError(f"not found: {text}", where=where, fix="check owner/name and split")
    get = f"trueup data get {spec.catalogue or spec.hub_id}"
    return ModelError(
        f"the hub cannot be reached ({name}: {text})",
        where=where,
        fix="check the network; or put the data files into a local folder of that name, "
        f"or pass their path as `dataset:`; `{get}`, once and with a network, keeps a copy for offline use",
    )
