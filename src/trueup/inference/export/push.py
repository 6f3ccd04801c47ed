"""An exported directory pushed to a hub: to a private repository unless a config says otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_token

from trueup.config.schema import RunConfig
from trueup.errors import ModelError, Problem


def check_push(cfg: RunConfig) -> list[Problem]:
    """What keeps an export from being pushed, as far as it can be known without a network."""
    if cfg.model.hub != "huggingface":
        return [
            Problem(
                f"exports are pushed to Hugging Face, and not to {cfg.model.hub}",
                "export_hub_model_id",
                fix="drop it, and upload export_dir with that hub's own command "
                "(`modelscope upload NAME export_dir`, `openmind-cli push`)",
            )  # fmt: skip
        ]
    if constants.HF_HUB_OFFLINE:
        return [
            Problem(
                "HF_HUB_OFFLINE is set, and pushing needs the network",
                "export_hub_model_id",
                fix="unset it, or drop export_hub_model_id",
            )  # fmt: skip
        ]
    if not (cfg.model.hf_hub_token or get_token()):
        return [
            Problem(
                "pushing needs an access token, and there is none",
                "export_hub_model_id",
                fix="run `hf auth login`, or set HF_TOKEN; a token in a file (hf_hub_token) is easily shared",
            )  # fmt: skip
        ]
    return []


def push(directory: Path, cfg: RunConfig) -> str:
    """Upload a directory; returns the address it has then.

    Raises:
        ModelError: the hub refused, or anybody could see what is to be private. The export itself stays where it is.
    """
    name, train = str(cfg.export.export_hub_model_id), cfg.train
    api: Any = HfApi(token=cfg.model.hf_hub_token)
    try:
        made = api.create_repo(name, private=train.hub_private_repo, exist_ok=True)
        found = str(getattr(made, "repo_id", name))
        if train.hub_private_repo and not api.repo_info(found).private:
            raise _public(directory, found)
        if train.hub_revision:
            api.create_branch(found, branch=train.hub_revision, exist_ok=True)
        api.upload_folder(
            repo_id=found, folder_path=str(directory), revision=train.hub_revision,
            commit_message="Exported with trueup",
        )  # fmt: skip
    except ModelError:
        raise
    except Exception as error:  # the client raises errors of several libraries
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"the export is in {directory}, but pushing it to {name} failed: {first_line}",
            where="export_hub_model_id", fix=f"once that is mended: hf upload {name} {directory}",
        ) from error  # fmt: skip
    return str(made)


def _public(directory: Path, name: str) -> ModelError:
    return ModelError(
        f"{name} was there already and is public; nothing was uploaded, and the export is in {directory}",
        where="hub_private_repo", expected="a private repository, unless a config says otherwise",
        fix=f"set hub_private_repo: false, or make it private, and then: hf upload {name} {directory}",
    )  # fmt: skip
