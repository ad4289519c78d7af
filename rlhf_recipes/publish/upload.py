"""Speaking to the Hub: who may write where, one commit for all files, what is retried, and what is said when it fails.

Every call that changes nothing, or the same when it is repeated, is retried. The commit is not: after a lost answer it
is looked up whether it has arrived, and it is sent again only on top of the revision that was seen. It touches only
what the manifest of that revision lists with the hashes that are there.
"""

import glob
import re
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_recipes import secrets
from rlhf_recipes.errors import Refusal, first_line, nearest
from rlhf_recipes.publish import contents
from rlhf_recipes.publish.manifest import MANIFEST, listed
from rlhf_recipes.text import line

ATTEMPTS, WAIT_SECONDS, LONGEST_WAIT = 4, 1.0, 60.0
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
MARK = "rlhf-recipes"  # tag of every card that is written here
KINDS = ("model", "dataset", "space")
ATTRIBUTES = ".gitattributes"  # the Hub's own
CREATED = re.compile(r"---\nlicense: [\w.-]+\n---\s*")  # a card as the Hub's page makes it with a new repo
MOST_REVISIONS = 50  # that are looked at before a repo is made public


@dataclass
class Target:
    """A repo to publish to.

    Attributes:
        api: huggingface_hub.HfApi.
        public: whether it may be, or become, public.
        force: whether it may hold files of others beside ours.
        private: as it is now; None where it is yet to be made.
        foreign: paths in it that are not ours to replace.
        tag: a tag that is to be set and is there, at the head of the branch: an earlier try may have set it.
        sent: commits of this publication -> paths of their files.
        state: what is in it, in a sentence, for whoever is told that something failed.
    """

    api: Any
    repo_id: str
    repo_type: str
    revision: str
    public: bool = False
    force: bool = False
    private: bool | None = None
    foreign: set[str] = field(default_factory=set)
    tag: str | None = None
    sent: dict[str, set[str]] = field(default_factory=dict)
    state: str = "Nothing was uploaded."

    def link(self, revision: str) -> str:
        prefix = "datasets/" if self.repo_type == "dataset" else ""
        return f"{self.api.endpoint}/{prefix}{self.repo_id}/tree/{revision}"


@contextmanager
def state_in_errors(target: Target):
    """What goes wrong between the client and the Hub as one line that says what state the repo is in."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise type(error)(f"Interrupted. {target.state} The same command goes on from there.") from None
    except Exception as error:
        if not _came_through_the_client(error):
            raise
        raise Refusal(f"repo_id={target.repo_id}: {reason(error)} {target.state}") from error


def reason(error: BaseException) -> str:
    """What the Hub or the network says, in a sentence, without anything that looks like a token."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = _status(error)
    if _caused_by(error, OfflineModeIsEnabled):
        return "the Hub may not be asked (HF_HUB_OFFLINE=1). Unset it."
    if status == 401:
        return "the Hub does not accept the token (401). Check HF_TOKEN, or `hf auth login`."
    if status == 403:
        return "the token may not do that (403). Give it write access to this repo."
    if status in (409, 412):
        return f"somebody else has changed it meanwhile ({status}). Run the same command again."
    if status == 429:
        return "the Hub asks to wait (429). Run the same command later."
    if status and status >= 500:
        return f"the Hub fails ({status}). Run the same command later."
    if status:
        return f"the Hub refuses ({status}): {line(secrets.redact(first_line(error)))}"
    if _is_network(error):
        return "the connection to the Hub was lost. Run the same command again."
    return f"{line(secrets.redact(first_line(error))).rstrip('.')}."


def retried(call: Callable[..., Any], *args, **kwargs):
    """The answer to a call that may be repeated without harm; a transient failure is waited out."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call(*args, **kwargs)
        except Exception as error:
            if attempt == ATTEMPTS or not _is_transient(error):
                raise
            _wait(attempt, error)


def connect(repo_id: str, repo_type: str, revision: str, tag: str | None, public: bool, force: bool) -> Target:
    """The repo, after everything that can be known without writing to it.

    Raises:
        Refusal: no token or a wrong one, no permission, a name that is taken by another kind of repo or by somebody
            else's files, a tag that is taken, or a public repo where `public` was not asked for.
    """
    from huggingface_hub import HfApi, get_token

    target = Target(HfApi(library_name=MARK), repo_id, repo_type, revision, public, force)
    if not get_token():
        raise Refusal(f"repo_id={repo_id}: no token. `hf auth login`, or the environment variable HF_TOKEN.")
    with state_in_errors(target):
        user = retried(target.api.whoami)
        _refuse_reader(repo_id, user)
        _refuse_other_kind(target)
        if not _look(target):
            _refuse_foreign_namespace(repo_id, user)
            return target
        target.state = "Nothing in it was changed."
        if public and target.private:
            _refuse_foreign_history(target)
        if tag:
            _refuse_taken_tag(target, tag)
    return target


def _look(target: Target) -> bool:
    """Whether the repo is there; where it is, see whose files it holds.

    Raises:
        Refusal: it is public where that was not asked for, or somebody else's.
    """
    info = _info(target, None)
    if info is None:
        return False
    retried(target.api.auth_check, target.repo_id, repo_type=target.repo_type, write=True)
    target.private = info.private
    if not info.private and not target.public:
        raise Refusal(f"repo_id={target.repo_id}: is public already. Add public=true, or choose another name.")
    there = target.revision == "main" or _info(target, target.revision) is not None
    commit, remote = remote_files(target, target.revision if there else "main")
    target.foreign = _foreign(target, commit, remote)
    if target.foreign and MANIFEST not in remote.keys() - target.foreign and not target.force:
        raise Refusal(
            f"repo_id={target.repo_id}: holds {len(target.foreign)} files that were not published from here "
            f"({line(min(target.foreign))}). Choose another name, or add to them with force=true."
        )
    return True


def refuse_collisions(target: Target, paths: set[str]) -> None:
    """Refuse to replace a file of the repo that is not as a publication of ours has left it.

    Raises:
        Refusal: names it.
    """
    if both := paths & target.foreign:
        raise Refusal(
            f"repo_id={target.repo_id}: {min(both)} was not published from here, or was changed there since, and is "
            "not replaced. Move it away there, or choose another name."
        )


def _foreign(target: Target, commit: str, remote: dict[str, str]) -> set[str]:
    """Paths of a commit that its manifest does not list with the hashes that they have."""
    others = remote.keys() - {ATTRIBUTES}
    if commit in target.sent:
        return others - target.sent[commit]
    with tempfile.TemporaryDirectory() as cache:
        if MANIFEST in others:
            known = listed(download(target, commit, Path(cache), [MANIFEST]))
            found = {path: remote[path] for path in known.keys() & others}
            if small := [path for path, digest in found.items() if len(digest) != 64]:  # git's hash, no SHA-256
                folder = download(target, commit, Path(cache), small)
                found |= {path: contents.sha256(folder / path) for path in small}
            ours = {path for path, digest in found.items() if digest in known[path]}
            return others - ours - ({MANIFEST} if known else set())
        if others == {contents.CARD}:
            folder = download(target, commit, Path(cache), [contents.CARD])
            if CREATED.fullmatch((folder / contents.CARD).read_text(encoding="utf-8", errors="replace")):
                return set()
    return set(others)


def is_ours(target: Target, commit: str, remote: dict[str, str]) -> bool:
    """Whether a commit has nothing of others that the branch does not have, nor changes anything of ours."""
    return _foreign(target, commit, remote) <= target.foreign


def pull_requests(target: Target) -> list[str]:
    """References of all that were ever opened."""
    place = {"repo_id": target.repo_id, "repo_type": target.repo_type}
    refs = retried(target.api.list_repo_refs, **place, include_pull_requests=True)
    return [each.ref for each in refs.pull_requests or []]


def _refuse_foreign_history(target: Target) -> None:
    """Whoever can see a repo can see all that was ever in it.

    Raises:
        Refusal: a revision holds what was not published from here.
    """
    place = {"repo_id": target.repo_id, "repo_type": target.repo_type}
    refs = retried(target.api.list_repo_refs, **place, include_pull_requests=True)
    commits: list[str] = []
    for ref in [*refs.branches, *refs.tags, *refs.converts, *(refs.pull_requests or [])]:
        past = retried(target.api.list_repo_commits, **place, revision=ref.target_commit)
        commits += [each.commit_id for each in past if each.commit_id not in commits]
    where = f"public=true: {target.repo_id} is private"
    elsewhere = "Make it public on its page, or choose another name."
    if len(commits) > MOST_REVISIONS:
        raise Refusal(f"{where}, and its {len(commits)} revisions are too many to be looked at. {elsewhere}")
    for commit in commits:
        _, remote = remote_files(target, commit)
        if foreign := _foreign(target, commit, remote):
            raise Refusal(
                f"{where}, and its revision {commit[:12]} holds {line(min(foreign))}, which was not published from "
                f"here and which everybody could read. {elsewhere}"
            )


def _refuse_reader(repo_id: str, user: dict) -> None:
    if ((user.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
        raise Refusal(f"repo_id={repo_id}: the token may only read. Make one with write access on the Hub's page.")


def _refuse_foreign_namespace(repo_id: str, user: dict) -> None:
    own = {user["name"]: "admin"} | {org["name"]: org.get("roleInOrg") for org in user.get("orgs", [])}
    owner = repo_id.partition("/")[0]
    if own.get(owner, "read") == "read":
        raise Refusal(
            f"repo_id={repo_id}: your token is {user['name']}'s, who may not make repos of {owner}"
            f"{nearest(owner, own)}"
        )


def _refuse_other_kind(target: Target) -> None:
    for kind in KINDS:
        if kind != target.repo_type and retried(target.api.repo_exists, target.repo_id, repo_type=kind):
            name = {"dataset": "data set"}.get(kind, kind)
            raise Refusal(f"repo_id={target.repo_id}: is the name of a {name} already. Choose another.")


def _refuse_taken_tag(target: Target, tag: str) -> None:
    refs = retried(target.api.list_repo_refs, target.repo_id, repo_type=target.repo_type)
    head = next((ref.target_commit for ref in refs.branches if ref.name == target.revision), None)
    there = {ref.name: ref.target_commit for ref in refs.tags}
    target.tag = tag if tag in there else None
    if tag in there and there[tag] != head:
        refuse_moved_tag(target)


def refuse_moved_tag(target: Target) -> None:
    """Refuse to go on to a revision that is not the one of a tag that is there.

    Raises:
        Refusal: there is one.
    """
    if target.tag:
        raise Refusal(f"tag={target.tag}: {target.repo_id} has a tag of this name, and tags stay. Choose another.")


def _info(target: Target, revision: str | None):
    """The Hub's word about the repo, or None where there is no such repo or revision."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        return retried(target.api.repo_info, target.repo_id, repo_type=target.repo_type, revision=revision)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return None


def make(target: Target) -> None:
    """The repo, private, and the branch, where they are not there; what has happened to them meanwhile is looked at.

    Raises:
        Refusal: as for `connect`.
    """
    place = {"repo_id": target.repo_id, "repo_type": target.repo_type}
    if target.private is None:
        target.state = "It may have been made, and is empty."
        retried(target.api.create_repo, **place, private=True, exist_ok=True)
        _look(target)
        target.state = "It is there, private and empty."
    else:
        _look(target)
    if target.revision != "main" and _info(target, target.revision) is None:
        retried(target.api.create_branch, **place, branch=target.revision, exist_ok=True)


def remote_files(target: Target, revision: str) -> tuple[str, dict[str, str]]:
    """(commit, path -> hash of every file there); the hash is SHA-256 of large files, git's of small ones."""
    from huggingface_hub.hf_api import RepoFile

    info = retried(target.api.repo_info, target.repo_id, repo_type=target.repo_type, revision=revision)

    def listed():
        tree = target.api.list_repo_tree(target.repo_id, recursive=True, revision=info.sha, repo_type=target.repo_type)
        return {e.path: e.lfs.sha256 if e.lfs else e.blob_id for e in tree if isinstance(e, RepoFile)}

    return info.sha, retried(listed)


def differing(folder: Path, remote: dict[str, str]) -> list[str]:
    """Paths below `folder` that the repo lacks or has with another content."""
    from huggingface_hub.utils.sha import git_hash

    def there(path: str, digest: str) -> bool:
        return remote.get(path) in (digest, git_hash((folder / path).read_bytes()))

    return [path for path, digest in contents.hashes(folder).items() if not there(path, digest)]


def commit(target: Target, folder: Path, message: str, revision: str, create_pr: bool = False):
    """Make the files of `revision` those of the folder, in one commit on top of what was seen there.

    Returns:
        (commit, whether anything was sent, pull request's reference or None).

    Raises:
        Refusal: a file there that would be replaced is not ours.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    before = target.state
    for attempt in range(1, ATTEMPTS + 1):
        head, remote = remote_files(target, revision)
        changed, paths = differing(folder, remote), contents.hashes(folder).keys()
        target.foreign = _foreign(target, head, remote)
        refuse_collisions(target, set(paths))
        stale = sorted(remote.keys() - target.foreign - paths - {ATTRIBUTES})
        if not changed and not stale:
            target.sent[head] = set(paths)
            return head, attempt > 1, None  # a commit whose answer was lost has arrived
        operations = [CommitOperationAdd(path, str(folder / path)) for path in changed]
        operations += [CommitOperationDelete(path) for path in stale]
        target.state = f"{before} It is not known whether the last commit has arrived."
        try:
            done = target.api.create_commit(
                target.repo_id, operations, commit_message=message, repo_type=target.repo_type, revision=revision,
                parent_commit=head, create_pr=create_pr,
            )  # fmt: skip
            target.sent[done.oid] = set(paths)
            return done.oid, True, done.pr_revision
        except Exception as error:
            if (_status(error) or 500) < 500:  # an answer that says no
                target.state = before
            # A second pull request would be one too many.
            if attempt == ATTEMPTS or create_pr or not _is_transient(error):
                raise
            _wait(attempt, error)
    raise AssertionError("unreachable")


def download(target: Target, revision: str, cache: Path, only: list[str] | None = None) -> Path:
    """The files of a commit, or some of them, in an empty cache."""
    from huggingface_hub import snapshot_download

    place = {"repo_id": target.repo_id, "repo_type": target.repo_type, "revision": revision}
    patterns = only and [glob.escape(path) for path in only]
    return Path(retried(snapshot_download, **place, allow_patterns=patterns, cache_dir=cache, max_workers=2))


def tag(target: Target, name: str, revision: str) -> None:
    """Set a tag.

    Raises:
        Refusal: somebody has set it meanwhile, elsewhere.
    """
    place = {"repo_id": target.repo_id, "repo_type": target.repo_type}
    retried(target.api.create_tag, **place, tag=name, revision=revision, exist_ok=True)
    found = retried(target.api.repo_info, **place, revision=name).sha
    if found != revision:
        raise Refusal(
            f"tag={name}: was set meanwhile at {found[:12]}, and tags stay. {target.state} Choose another tag."
        )


def make_public(target: Target) -> None:
    """Show the repo, and all that was ever in it, to everybody.

    Raises:
        Refusal: a revision holds what was not published from here.
    """
    _refuse_foreign_history(target)
    retried(target.api.update_repo_settings, target.repo_id, repo_type=target.repo_type, private=False)


def _wait(attempt: int, error: BaseException) -> None:
    seconds = WAIT_SECONDS * 2 ** (attempt - 1)
    response = _response(error)
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    time.sleep(min(max(seconds, float(asked) if asked.isdigit() else 0.0), LONGEST_WAIT))


def _causes(error: BaseException | None):
    while error is not None:
        yield error
        error = error.__cause__


def _caused_by(error: BaseException, *kinds: type) -> bool:
    return any(isinstance(each, kinds) for each in _causes(error))


def _response(error: BaseException):
    return next((each.response for each in _causes(error) if getattr(each, "response", None) is not None), None)


def _status(error: BaseException) -> int | None:
    response = _response(error)
    return None if response is None else response.status_code


def _came_through_the_client(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return any("huggingface_hub" in Path(frame.filename).parts for frame in frames)


def _is_network(error: BaseException) -> bool:
    from huggingface_hub.errors import HTTPError

    return _caused_by(error, HTTPError, ConnectionError)  # those with an answer are told apart by its status


def _is_transient(error: BaseException) -> bool:
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = _status(error)
    return status in TRANSIENT if status else _is_network(error) and not _caused_by(error, OfflineModeIsEnabled)
