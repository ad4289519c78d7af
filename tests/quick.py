"""What a test process does once, or less of, because no test sees the difference."""

import copy
import dataclasses
import functools
import gc
import json
import os
import pickle
import sys
from base64 import b64decode
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

EMPTY = b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)  # a PNG of one pixel


def parse_yaml_once() -> None:
    """OmegaConf parses the same files anew for each composition, by a parser in Python."""
    import yaml
    from omegaconf import _utils

    load, loader, parsed = yaml.load, _utils.get_yaml_loader(), {}

    def load_once(stream, Loader):
        if Loader is not loader:
            return load(stream, Loader)
        text = stream if isinstance(stream, str) else stream.read()
        if text not in parsed:
            if text is not stream:
                stream.seek(0)  # whose name an error shows
            parsed[text] = load(stream, Loader)
        return parsed[text]  # of which OmegaConf makes nodes of its own

    yaml.load, _utils.get_yaml_loader = load_once, lambda: loader


def parse_overrides_once() -> None:
    """The same few, by a parser in Python; and the types of the same dataclasses."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import _utils

    parse, parsed = OverridesParser.parse_rule, {}

    def parse_once(self, s, rule_name):
        if (s, rule_name) not in parsed:
            parsed[s, rule_name] = parse(self, s, rule_name)
        return copy.copy(parsed[s, rule_name])  # whose loader is set by who reads it

    OverridesParser.parse_rule = parse_once
    _utils.get_type_hints = functools.cache(_utils.get_type_hints)


def copies(node) -> functools.partial:
    """What copies it: pickle, in a fifth of the time of a deep copy, but where submitit has brought a class again."""
    try:
        return functools.partial(pickle.loads, pickle.dumps(node))
    except pickle.PicklingError:
        return functools.partial(copy.deepcopy, node)


def mask_copies() -> None:
    """A part of a config is a copy by `copies`, less the rest."""
    from omegaconf import OmegaConf

    def masked_copy(conf, keys):
        copied = copies(conf)()
        for flag in ("struct", "readonly"):
            copied._set_flag(flag, None)
        for key in set(copied) - ({keys} if isinstance(keys, str) else set(keys)):
            del copied.__dict__["_content"][key]
        return copied

    OmegaConf.masked_copy = staticmethod(masked_copy)


@functools.cache
def compose_once() -> None:
    """Hydra lists the same defaults and merges the same files anew, whichever single keys are set afterwards.

    What is kept depends on the recipe and its groups alone; where a config is from elsewhere, Hydra does all of it.
    """
    from hydra._internal import config_loader_impl
    from hydra._internal.config_repository import CachingConfigRepository
    from hydra._internal.defaults_list import DefaultsList
    from omegaconf import _utils, base

    from rlhf_recipes.config import CONF

    parse_yaml_once()
    parse_overrides_once()
    mask_copies()
    loader = config_loader_impl.ConfigLoaderImpl
    list_defaults, merge = config_loader_impl.create_defaults_list, loader._compose_config_from_defaults_list
    load_single, listed, merged, looked_up = loader._load_single_config, {}, {}, {}

    def is_from_elsewhere(repo):
        return any(source.scheme() == "file" and Path(source.path) != CONF for source in repo.get_sources())

    def look_up_once(look_up):
        def once(repo, config_path):
            if is_from_elsewhere(repo):
                return look_up(repo, config_path)
            key = (look_up.__name__, config_path)
            if key not in looked_up:
                looked_up[key] = look_up(repo, config_path)
            return copy.copy(looked_up[key])  # whose fields are set anew by who reads them

        return once

    for look_up in ("load_config", "group_exists", "config_exists"):
        setattr(CachingConfigRepository, look_up, look_up_once(getattr(CachingConfigRepository, look_up)))

    def load_apart(self, default, repo):
        found = load_single(self, default, repo)
        if not default.package:  # what has one is copied into it
            found.config = copy.deepcopy(found.config)
        return found

    def list_once(repo, config_name, overrides_list, prepend_hydra, skip_missing):
        if is_from_elsewhere(repo):
            return list_defaults(repo, config_name, overrides_list, prepend_hydra, skip_missing)
        given = [override for override in overrides_list if not override.is_sweep_override()]
        groups = [each for each in given if repo.group_exists(each.key_or_group) and type(each.value()) is not dict]
        key = (config_name, *(each.input_line for each in groups))
        if key not in listed:  # no default of ours is missing: there is none to skip
            listed[key] = list_defaults(repo, config_name, overrides_list, prepend_hydra, skip_missing=False)
        keys = [override for override in given if override not in groups]
        return DefaultsList(listed[key].defaults, listed[key].defaults_tree, keys, listed[key].overrides)

    def merge_once(self, defaults, repo):
        key = next((key for key, each in listed.items() if each.defaults is defaults), None)
        if key is None:
            return merge(self, defaults, repo)
        if key not in merged:
            merged[key] = copies(merge(self, defaults, repo))
        return merged[key]()

    config_loader_impl.create_defaults_list, loader._compose_config_from_defaults_list = list_once, merge_once
    loader._load_single_config = load_apart
    base.parse = _utils.parse = functools.cache(base.parse)  # of interpolations


def sync_nothing() -> None:
    """Here processes are killed, and no machine loses its power: what they have written stays."""
    os.fsync = lambda _: None


@functools.cache
def settle() -> None:
    """Once the libraries are imported: what they do again for every run."""
    from jinja2 import Environment

    Environment.compile = functools.cache(Environment.compile)  # for the cards of TRL and PEFT in each checkpoint
    installed = metadata.Distribution  # whose files TRL and `run.versions` parse
    installed.from_name = functools.cache(installed.from_name)
    installed.metadata = property(functools.cache(installed.metadata.fget))
    name_maps_by_chance()
    read_the_clinic_once()
    collect_less()


def read_the_clinic_once() -> None:
    """The rows inside the package, which most runs take, are read and looked at anew by each."""
    from omegaconf import OmegaConf

    from rlhf_recipes import ranks
    from rlhf_recipes.data import load

    read, known = load._load, {}

    @functools.wraps(read)
    def read_once(node, sides, labelled=False, whole=False):
        data = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
        if data.get("path") != "clinic" or ranks.world_size() > 1:
            return read(node, sides, labelled, whole)
        key = json.dumps([data, sides, labelled, whole], sort_keys=True)
        if key not in known:
            known[key] = read(node, sides, labelled, whole)
        return dataclasses.replace(known[key], report=copy.deepcopy(known[key].report))

    load._load = read_once


def name_maps_by_chance() -> None:
    """What `Dataset.map` makes of a run's own rows, which go with its process, is looked up by nobody; for a name
    datasets pickles the function and all that it reads, and it writes a file."""
    from datasets import Dataset
    from datasets.fingerprint import generate_random_fingerprint

    from rlhf_recipes.data.rows import PREFIX

    original = Dataset.map

    @functools.wraps(original)
    def mapped(self, *args, **kwargs):
        if "cache_file_name" not in kwargs and all(PREFIX in file["filename"] for file in self.cache_files):
            kwargs = {"new_fingerprint": generate_random_fingerprint(), "keep_in_memory": True} | kwargs
        return original(self, *args, **kwargs)

    Dataset.map = mapped


def collect_less() -> None:
    """What is imported stays; a full collection that looks at all of it takes half a second, and Accelerate asks for
    one before each training and each evaluation."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)
    if memory := sys.modules.get("accelerate.utils.memory"):
        memory.gc = SimpleNamespace(collect=lambda: 0)


@contextmanager
def pictures_sketched():
    """A run's own pictures, and those of its page, are empty ones: to lay them out takes longer than what is drawn."""
    from markupsafe import Markup

    from rlhf_recipes import drawing
    from rlhf_recipes.audit import page as audits_page
    from rlhf_recipes.cai import report
    from rlhf_recipes.evaluation import checkpoints, frontier, page
    from rlhf_recipes.training import curves, doctor_plot

    def sketch(*given):
        next(each for each in given if isinstance(each, Path)).write_bytes(EMPTY)

    def figure(caption, alt, *_, **__):
        return {"caption": caption, "alt": alt, "svg": Markup("<svg></svg>")}

    files = ((curves, "plot_curves"), (doctor_plot, "plot"), (frontier, "plot"), (report, "draw_funnel"))
    with ExitStack() as sketched:
        for owner, name in files:
            sketched.enter_context(patch.object(owner, name, sketch))
        for owner in (drawing, page, checkpoints, audits_page):
            sketched.enter_context(patch.object(owner, "figure", figure))
        yield
