"""The base model of what is published: which revision, under which licence, and whether it is what was trained on."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from rlhf_recipes import model_files
from rlhf_recipes.errors import Refusal
from rlhf_recipes.publish import contents
from rlhf_recipes.run_folder import CONFIG, read_config, read_json
from rlhf_recipes.training.card import without_folder

# Licences that let a work built on theirs have another one.
PERMISSIVE = ("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "isc", "cc0-1.0", "unlicense")
LICENCE_KEYS = ("license", "license_name", "license_link")


def describe(source: contents.Source, licence: str | None, api) -> dict[str, Any]:
    """What a card says of the base.

    Args:
        source: the run of a training.
        licence: `license` of the command line, or None.
        api: huggingface_hub.HfApi, or None where the Hub is not asked.

    Returns:
        `id`, `revision` (commit on the Hub, None where it was not asked), `license`, `license_name`, `license_link`,
        `origin` (what the weights were made from, where they are not the Hub's), and `same`: whether the weights that
        were trained on are the Hub's, None where that is not known.

    Raises:
        Refusal: the base is not on the Hub, its licence is not known, or it does not allow the given one.
    """
    node = OmegaConf.create(source.config["model"])
    folder = local_folder(node)
    base = {"id": node.id, "revision": node.revision, "same": None, "origin": _origin(folder)}
    terms = _local_terms(folder)
    if api is not None:
        info = _ask(api, node.id, node.revision or _cached_commit(folder, node.id))
        base["revision"] = _cached_commit(folder, node.id) or info.sha
        base["same"] = node.path is None or _are_the_hubs(folder, info)
        terms = _terms(info.card_data) or terms
    return base | _carried_over(node.id, terms, licence)


def describe_generator(source: contents.Source, licence: str | None, api) -> dict[str, Any]:
    """The terms of a data set: the generator's, where its prompts are the clinic set, which allows any, and where the
    pairs that it has taken over of earlier runs are of the same.

    Raises:
        Refusal: nothing here knows the terms of the prompts, or of the model behind a server.
    """
    if licence:
        return {"license": licence, "license_name": None, "license_link": None}
    config = source.config
    answered_by = (config.get("model") or {}).get("id")
    advice = "are not known here. Look them up, then recipes/publish.py with license=<id>."
    if not _of_clinic_by(answered_by, config):
        raise Refusal(
            f"license: the terms of the prompts (data.path={without_folder(config['data']['path'])}) and of the "
            f"replies {advice}"
        )
    for folder in config.get("earlier") or []:
        earlier = read_config(Path(folder)) if (Path(folder) / CONFIG).is_file() else {}
        if not _of_clinic_by(answered_by, earlier):
            raise Refusal(f"license: the terms of the pairs of earlier={without_folder(folder)} {advice}")
    return describe(source, None, api)


def _of_clinic_by(model_id: str | None, config: dict[str, Any]) -> bool:
    """Whether a run of recipes/cai.py, by its config, has had prompts of the clinic set answered by a model here."""
    found = (
        (config.get(group) or {}).get(key) for group, key in (("data", "path"), ("generator", "kind"), ("model", "id"))
    )
    return tuple(found) == ("clinic", "local", model_id)


def local_folder(node) -> Path | None:
    """Where the weights that were trained on lie, None where this machine does not have them."""
    if node.path:
        folder = Path(model_files.folder_or_id(node))
        return folder if folder.is_dir() else None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(node.id, "config.json", revision=node.revision)
    return Path(cached).parent if isinstance(cached, str) else None


def _cached_commit(folder: Path | None, model_id: str) -> str | None:
    """In the cache of the Hub's client a model lies in `models--<owner>--<name>/snapshots/<commit>`."""
    cached = f"models--{model_id.replace('/', '--')}/snapshots"
    return folder.name if folder and folder.parent.as_posix().endswith(f"/{cached}") else None


def _ask(api, repo_id: str, revision: str | None):
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        return api.model_info(repo_id, revision=revision, files_metadata=True)
    except RevisionNotFoundError as error:
        raise Refusal(f"model.revision={revision}: {repo_id} has no such revision on the Hub.") from error
    except RepositoryNotFoundError as error:
        raise Refusal(
            f"model.id={repo_id}: the base is not on the Hub, or your token may not see it, so nobody could load the "
            "adapter. Publish the base first."
        ) from error


def _are_the_hubs(folder: Path | None, info) -> bool:
    """Whether every file of weights in a folder is one that the Hub has; it may have others, in other formats."""
    theirs = {file.lfs.sha256 for file in info.siblings or [] if file.lfs}
    own = {contents.sha256(file) for file in folder.glob("*.safetensors")} if folder else set()
    return bool(own) and own <= theirs


def _origin(folder: Path | None) -> str | None:
    """What the embedded model says of its weights."""
    file = folder / "ORIGIN.json" if folder else None
    if not file or not file.is_file():
        return None
    origin = read_json(file)
    return f"{origin.get('weights')} (package {origin.get('package')})"


def _local_terms(folder: Path | None) -> dict[str, str]:
    """Licence that a model folder states: in ORIGIN.json, or in the metadata of its card."""
    if folder and (folder / "ORIGIN.json").is_file():
        return {"license": read_json(folder / "ORIGIN.json").get("license")}
    if folder and (folder / "README.md").is_file():
        from huggingface_hub import ModelCard

        return _terms(ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data)
    return {}


def _terms(metadata) -> dict[str, str]:
    """The licence in the metadata of a card, which may be missing."""
    return {key: metadata.get(key) for key in LICENCE_KEYS if metadata and metadata.get(key)}


def _carried_over(base: str, terms: dict[str, str], given: str | None) -> dict[str, str | None]:
    """The licence of what is published: the base's, or the given one where the base's lets it."""
    theirs = terms.get("license")
    if isinstance(theirs, list):
        theirs = theirs[0] if len(theirs) == 1 else None
    if not theirs and not given:
        raise Refusal(
            f"license: {base} states none, and what is built on it needs one. Look up its terms, then "
            "recipes/publish.py with license=<id>."
        )
    if given and theirs and given != theirs and theirs not in PERMISSIVE:
        raise Refusal(
            f"license={given}: {base} is under {theirs}, whose terms hold for what is built on it. Leave license out."
        )
    if given and given != theirs:
        return {"license": given, "license_name": None, "license_link": None}
    return {key: terms.get(key) for key in LICENCE_KEYS} | {"license": theirs}
