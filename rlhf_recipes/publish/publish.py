"""Publish a run on the Hub, and prove that what lies there is what was trained.

    checks -> gather -> 32 numbers -> card -> upload (its card says: not proven) -> download into an empty cache ->
    hashes -> 32 numbers in a fresh process -> the card says: proven -> tag, public -> "published"

Whatever ends in between leaves a repo whose card says that it is not proven, or broken. The same command goes on.
"""

import hashlib
import json
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rlhf_recipes import models
from rlhf_recipes.commands import command
from rlhf_recipes.config import CONF
from rlhf_recipes.errors import Refusal
from rlhf_recipes.overrides import written
from rlhf_recipes.publish import base_model, card, checks, contents, manifest, merge, round_trip, upload
from rlhf_recipes.run import Run, environment, relative, resolved
from rlhf_recipes.run_folder import read_json, write_atomically
from rlhf_recipes.stats import Estimate

PLACEHOLDER = "<user>/<name>"


class Mismatch(Exception):
    """What came back is not what went."""


@dataclass(frozen=True)
class _Ready:
    """What is to be published: `folder` has its files, and the round trip must find the numbers `expected` again."""

    source: contents.Source
    facts: card.Facts
    expected: dict[str, Any]
    folder: Path

    def seal(self, proof: dict[str, Any] | str | None) -> None:
        """Write the card, and the manifest of all files with it."""
        write_atomically(self.folder / contents.CARD, card.write(self.source, self.facts, proof))
        manifest.write(self.folder)


def publish(cfg: DictConfig) -> dict[str, Any]:
    """Publish what `cfg.run` or `cfg.pairs` names to `cfg.repo_id`, or into `cfg.folder` as a dry run.

    Returns:
        `where` (link or folder), `revision` (None for a folder), `uploaded` (whether anything was sent), `proof` (what
        the round trip found; None where an earlier one has proven these files), `files` (path -> SHA-256).

    Raises:
        Refusal: it is refused, or fails; says what state the repo is in.
    """
    checks.options(cfg)
    source = contents.find(cfg.run, cfg.pairs)
    evaluation, page = checks.evaluation(cfg.evaluation, source, cfg.force)
    checks.source(source, cfg.force)
    if cfg.folder:
        checks.place(Path(cfg.folder), [source.dir, cfg.evaluation], cfg.get("output_dir"))
    target = connect(cfg, source.repo_type) if cfg.repo_id else None
    with upload.state_in_errors(target) if target else nullcontext(), tempfile.TemporaryDirectory() as scratch:
        staged = Path(scratch) / "files"
        staged.mkdir()
        base = terms(source, cfg.license, target and target.api)
        facts = card.Facts(cfg.repo_id or PLACEHOLDER, base, evaluation)
        contents.gather(source, facts.base, page, staged)
        seen: dict[str, str] = {}
        checks.files(staged, cfg.max_file_gib, cfg.force, seen)  # before a model loads; once more when all is there
        if target:
            upload.refuse_collisions(target, {*seen, contents.CARD, contents.PROBE})
        expected = _measure(source, facts, cfg, staged)
        facts.dtype = expected.get("dtype")
        digests = [contents.hashes(staged), card.write(source, facts, None)]
        facts.fingerprint = hashlib.sha256(json.dumps(digests).encode()).hexdigest()
        ready = _Ready(source, facts, expected, staged)
        ready.seal(None)
        checks.files(staged, cfg.max_file_gib, cfg.force, seen)
        return _upload(ready, target, cfg) if target else _dry_run(ready, Path(cfg.folder))


def terms(source: contents.Source, licence: str | None, api) -> dict[str, Any]:
    return (base_model.describe_generator if source.key == "pairs" else base_model.describe)(source, licence, api)


def connect(cfg: DictConfig, repo_type: str) -> upload.Target:
    """The repo that `cfg` names, after all that can be known without writing to it."""
    return upload.connect(cfg.repo_id, repo_type, cfg.revision, cfg.tag, cfg.public, cfg.force)


def start(cfg: DictConfig) -> Run:
    """The run of recipes/publish.py, whose folder takes the record of what was published last.

    Raises:
        Refusal: the folder is another's, or another process writes it.
    """
    environment()
    run = Run(relative(Path(cfg.output_dir)), "publish", resolved(cfg))
    run.hold(only="publish")
    return run


def record(run: Run, cfg: DictConfig, published: dict[str, Any]) -> float | None:
    """Write result.json, print where all is.

    Returns:
        The largest difference that the round trip found.
    """
    found = published["proof"] or {}
    largest = found.get("largest")
    after = Estimate(largest, None, None, found.get("n", 0), found.get("n", 0))
    main = {"name": "round_trip_difference", "before": None, "after": after}
    result = run.record(main=main, **published)
    run.write_config()
    run.write_result(result)
    print_outcome(cfg, published)
    return largest


def print_outcome(cfg: DictConfig, published: dict[str, Any]) -> None:
    """Print what the round trip found, and where all is."""
    found = published["proof"]
    if found:
        print(f"  proof     {card.found(found)}")
    if published["revision"]:
        print(f"published {published['where']}", flush=True)
        return
    print(f"  folder    {published['where']}: what would be uploaded; nothing was")
    print(f"  next      {command('publish')} {_options(cfg)} repo_id={PLACEHOLDER}", flush=True)


def _options(cfg: DictConfig) -> str:
    """What was asked of a dry run, beside its folder, as it is typed."""
    defaults = OmegaConf.load(CONF / "publish.yaml")
    keys = [key for key in defaults if key not in ("defaults", "hydra", "folder") and cfg[key] != defaults[key]]
    typed = (written(key, cfg[key]) if isinstance(cfg[key], str) else f"{key}={json.dumps(cfg[key])}" for key in keys)
    return " ".join(typed)


def _measure(source: contents.Source, facts: card.Facts, cfg: DictConfig, staged: Path) -> dict[str, Any]:
    """The numbers that the round trip must find again; also merges, and compares the base with that on the Hub."""
    if source.key == "pairs":
        return round_trip.rows(staged, source.splits)
    reward = source.recipe == "reward"
    numbers = _probe(source)
    if facts.base["same"] is False:
        facts.base["drift"] = _drift_on_public_base(source, facts.base, numbers, cfg.max_base_drift)
    if cfg.merged:
        merge.write(source, staged)
        merged = round_trip.measure(round_trip.task(staged, source.config, reward=reward, merged=True))
        facts.merged = merge.report(round_trip.drift(numbers, merged), reward, cfg.max_merge_drift)
        numbers = merged | {"effect": numbers["effect"]}
    write_atomically(staged / contents.PROBE, json.dumps(numbers, indent=1) + "\n")
    return numbers


def _probe(source: contents.Source) -> dict[str, Any]:
    """The numbers of the run's adapter on the base that it was trained on; kept in the run's folder, for this machine
    and as many threads."""
    path, digest = source.dir / contents.PROBE, source.result["adapter_sha256"]
    if path.is_file():
        kept = read_json(path)
        dtype = str(models.compute_dtype(OmegaConf.create(source.config["model"]))).removeprefix("torch.")
        same = {
            "adapter_sha256": digest,
            "probes": round_trip.probes_sha256(),
            "machine": round_trip.machine(),
            "dtype": dtype,
        }
        if {key: kept.get(key) for key in same} == same:
            return kept
    task = round_trip.task(source.adapter, source.config, reward=source.recipe == "reward")
    numbers = {"adapter_sha256": digest, **round_trip.measure(task)}
    write_atomically(path, json.dumps(numbers, indent=1) + "\n")
    return numbers


def _drift_on_public_base(source: contents.Source, origin: dict, numbers: dict, limit: float) -> float:
    """How far the numbers are with the weights that the Hub has under the base's name.

    Raises:
        Refusal: too far, so that the adapter would not be for anybody else what it was here.
    """
    model = {**source.config["model"], "path": None, "revision": origin["revision"]}
    task = round_trip.task(source.adapter, {**source.config, "model": model}, reward=source.recipe == "reward")
    drift = round_trip.drift(numbers, round_trip.measure(task))
    if not drift <= limit:
        raise Refusal(
            f"{source.key}={source.dir}: was trained on other weights than {origin['id']} has on the Hub; with those "
            f"its numbers differ by {drift:.4f} (nats per token, or units of the score), more than "
            f"max_base_drift={limit}. Train on the Hub's weights, or raise the limit."
        )
    return drift


def _upload(ready: _Ready, target: upload.Target, cfg: DictConfig) -> dict[str, Any]:
    """From the first word to the Hub that changes something to the last; see the head of this module."""
    upload.make(target)
    branch, revision = _published_before(ready, target, cfg.create_pr)
    sent, found = False, None
    if revision is None:
        upload.refuse_moved_tag(target)
        message = cfg.commit_message or f"{ready.source.recipe}: {ready.facts.fingerprint[:12]}"
        asks = cfg.create_pr and branch == target.revision
        revision, sent, pull_request = upload.commit(target, ready.folder, message, branch, asks)
        if asks and not pull_request:
            raise Refusal(
                f"create_pr=true: {branch} of {target.repo_id} has these files already, not proven. Leave it out, to "
                "prove them there."
            )
        branch = pull_request or branch
        target.state = f"Revision {revision[:12]} is there; its card says 'not proven'."
        print(f"uploaded  {target.repo_id} at {revision[:12]}, to be downloaded and loaded", flush=True)
        found = _come_back(ready, target, revision, branch)
        ready.seal(found)
        revision, _, _ = upload.commit(target, ready.folder, f"{message}, proven", branch)
        _, remote = upload.remote_files(target, revision)
        if wrong := upload.differing(ready.folder, remote):
            raise Refusal(f"repo_id={target.repo_id}: {wrong[0]} is not what was sent. Run the same command again.")
    target.state = f"Revision {revision[:12]} is there and proven."
    if cfg.tag:
        upload.tag(target, cfg.tag, revision)
    if cfg.public and target.private:
        upload.make_public(target)
    where = target.link(revision if branch == target.revision else branch)
    return {"where": where, "revision": revision, "uploaded": sent, "proof": found,
            "files": contents.hashes(ready.folder), "base_model": ready.source.config["model"]["id"]}  # fmt: skip


def _published_before(ready: _Ready, target: upload.Target, create_pr: bool) -> tuple[str, str | None]:
    """Where an earlier publication has put exactly these files.

    Returns:
        The branch, or with `create_pr` the pull request that was opened for them, and its revision if they are proven
        there. Where they are nowhere, the branch.
    """
    changing = {contents.CARD, manifest.MANIFEST}  # the manifest has the card's hash
    begun = target.revision
    for ref in [target.revision, *(upload.pull_requests(target) if create_pr else [])]:
        revision, remote = upload.remote_files(target, ref)
        if not set(upload.differing(ready.folder, remote)) <= changing <= remote.keys():
            continue
        with tempfile.TemporaryDirectory() as cache:
            folder = upload.download(target, revision, Path(cache), [contents.CARD])
            text = (folder / contents.CARD).read_text(encoding="utf-8")
        if card.is_proven(text, ready.facts.fingerprint):
            where = "" if ref == target.revision else f" in {ref}"
            print(f"unchanged {target.repo_id} has these files{where}, proven: nothing is uploaded", flush=True)
            return ref, revision
        if ref != target.revision and upload.is_ours(target, revision, remote):
            begun = ref
    return begun, None


def _come_back(ready: _Ready, target: upload.Target, revision: str, branch: str) -> dict[str, Any]:
    """Download the revision into an empty cache and look at it; what is not as it was is marked broken."""
    try:
        with tempfile.TemporaryDirectory() as cache:
            folder = upload.download(target, revision, Path(cache))
            return _round_trip(ready, contents.hashes(ready.folder), folder)
    except Mismatch as mismatch:
        target.state = f"Revision {revision[:12]} is there and broken ({mismatch}) Its card says 'not proven'."
        ready.seal(str(mismatch))
        upload.commit(target, ready.folder, "broken: not what was uploaded", branch)
        target.state = f"Revision {revision[:12]} is there; its card says 'broken'."
        raise Refusal(
            f"repo_id={target.repo_id}: not published. {mismatch} {target.state} Run the same command again."
        ) from None


def _round_trip(ready: _Ready, sent: dict[str, str], folder: Path) -> dict[str, Any]:
    """Compare files and numbers of a folder with what was to be published.

    Raises:
        Mismatch: says what differs.
    """
    source, came = ready.source, contents.hashes(folder)
    for path, digest in sent.items():
        if came.get(path) != digest:
            raise Mismatch(f"{path} came back with SHA-256 {str(came.get(path))[:12]}, not {digest[:12]}.")
    reward, merged = source.recipe == "reward", bool(ready.facts.merged)
    if source.key == "pairs":
        task = {"folder": str(folder), "splits": source.splits}
    else:
        task = round_trip.task(folder, source.config, reward=reward, merged=merged)
    try:
        came = round_trip.in_fresh_process(task)
    except Refusal as error:
        raise Mismatch(f"{error}.") from error
    if source.key == "pairs":
        for split, found in came.items():
            if found != ready.expected[split]:
                raise Mismatch(f"{split} came back with other rows ({found[0]}, not {ready.expected[split][0]}).")
        return {"n": sum(count for count, _ in came.values()), "files": len(sent), "what": "rows"}
    compared = round_trip.compare(ready.expected, came)
    if not compared["passed"]:
        raise Mismatch(
            f"of {compared['n']} numbers one differs by {compared['largest']:.4g} {compared['unit']}, more than "
            f"{compared['allowed']:.4g}."
        )
    return {**compared, "files": len(sent), "what": "scores" if reward else "log-probabilities"}


def _dry_run(ready: _Ready, folder: Path) -> dict[str, Any]:
    """The same without a Hub: what would be uploaded lies in a folder, and is loaded from there.

    Raises:
        Refusal: what lies there is not what was trained.
    """
    sent = contents.hashes(ready.folder)
    manifest.replace(folder, ready.folder)
    try:
        found = _round_trip(ready, sent, folder)
    except Mismatch as mismatch:
        raise Refusal(f"folder={folder}: {mismatch} Look at the run before it is published.") from None
    return {"where": str(folder), "revision": None, "uploaded": False, "proof": found, "files": sent,
            "base_model": ready.source.config["model"]["id"]}  # fmt: skip
