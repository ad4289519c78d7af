"""Publishing replaces what an earlier publication lists as it was made, in a folder or a repo, and nothing else."""

import json
import shutil

import pytest
from conftest import snapshot
from test_hub import add_line, publish, refused, run, server, trained  # noqa: F401  fixtures

from rlhf_recipes.publish import manifest

# ruff: noqa: F811

MODEL = {"model.safetensors": b"weights", "config.json": b"{}", "generation_config.json": b"{}"}
BELOW = {"fp8/model.safetensors": b"fp8", "checkpoints/step-100/adapter_model.safetensors": b"step 100"}


def write(folder, files):
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def read(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- a folder


@pytest.mark.parametrize("force", ["false", "true"])
def test_a_saved_model_stays(run, refused, force):
    mine = write(run.parent / "mymodel", MODEL)
    before = snapshot(mine)
    said = refused("run=dpo", "license=mit", "folder=mymodel", f"force={force}")
    assert said.startswith("folder=mymodel: holds config.json, and no publication of ours.")
    assert snapshot(mine) == before


@pytest.mark.parametrize(
    "folder", ["dpo/adapter", "dpo/adapter/below", "dpo", "dpo/new", "link", "link/new", "outputs/publish"]
)
def test_a_folder_of_the_command(run, refused, folder):
    """The run and what holds it, however it is named, and the folder that the record is written into."""
    (run.parent / "link").symlink_to("dpo")
    before = snapshot(run.parent)
    said = refused("run=dpo", "license=mit", f"folder={folder}", "merged=true", "max_merge_drift=1")
    what = "is or holds outputs/publish/main" if folder == "outputs/publish" else "is, holds or lies in dpo"
    assert said.startswith(f"folder={folder}: {what}"), said
    assert snapshot(run.parent) == before


def test_beside_the_record(run, publish):
    publish("run=dpo", "license=mit", "folder=outputs/publish/main/files")
    assert (run.parent / "outputs/publish/main/files/README.md").is_file()


def test_a_link(run, refused):
    elsewhere = run.parent / "elsewhere"
    elsewhere.mkdir()
    (run.parent / "link").symlink_to(elsewhere)
    assert (
        refused("run=dpo", "license=mit", "folder=link") == "folder=link: is a symbolic link. Name the folder itself."
    )
    assert not list(elsewhere.iterdir())


def test_the_manifest(run, publish):
    publish("run=dpo", "license=mit", "folder=x")
    there = {path: digest for path, digest in snapshot(run.parent / "x").items() if path != "published.json"}
    content = json.loads((run.parent / "x" / "published.json").read_text())
    assert content == {"published_by": "rlhf-recipes", "files": there}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x: write(x, {"notes.txt": b"mine"}), "holds notes.txt, no part of what published.json lists."),
        (lambda x: write(x, {"below/README.md": b"mine"}), "holds below/README.md, no part of"),
        (
            lambda x: write(x, {"README.md": b"mine"}),
            "README.md was changed since it was published, and is not replaced.",
        ),
        (lambda x: (x / "published.json").unlink(), "holds README.md, and no publication of ours."),
        (lambda x: write(x, {"published.json": b'{"files": {}}'}), "holds README.md, and no publication of ours."),
        (lambda x: (x / "linked").symlink_to(x.parent), "holds linked, no part of"),
    ],
)
def test_what_was_put_beside_it_stays(run, publish, refused, change, says):
    publish("run=dpo", "license=mit", "folder=x")
    change(run.parent / "x")
    before = snapshot(run.parent / "x")
    assert refused("run=dpo", "license=mit", "folder=x", "force=true").startswith(f"folder=x: {says}")
    assert snapshot(run.parent / "x") == before


def test_a_file_that_is_put_there_while_models_load(run, publish, monkeypatch):
    from rlhf_recipes.publish import publish as publishing

    measure = publishing._measure
    monkeypatch.setattr(publishing, "_measure", lambda *a: write(run.parent / "x", MODEL) and measure(*a))
    with pytest.raises(ValueError, match=r"^folder=x: holds config.json, and no publication of ours"):
        publish("run=dpo", "license=mit", "folder=x")
    assert read(run.parent / "x") == MODEL


def test_a_manifest_that_lists_what_lies_elsewhere(tmp_path):
    """Nothing is removed by its name alone."""
    (tmp_path / "mine.txt").write_text("mine")
    listed = {"../mine.txt": manifest.contents.sha256(tmp_path / "mine.txt")}
    text = json.dumps({"published_by": "rlhf-recipes", "files": listed})
    place = write(tmp_path / "x", {"published.json": text.encode()})
    staged = write(tmp_path / "staged", {"README.md": b"card"})
    manifest.write(staged)
    manifest.replace(place, staged)
    assert (tmp_path / "mine.txt").read_text() == "mine" and read(place) == read(staged)


class Killed(BaseException):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("earlier", [False, True])
def test_killed_at_any_moment(tmp_path, monkeypatch, earlier):
    """What is there afterwards is replaced by the same command, or by one that publishes something else."""
    old = write(tmp_path / "old", {"README.md": b"old", "a/1.bin": b"1", "stale.bin": b"s"})
    staged = [write(tmp_path / name, {"README.md": name.encode(), "a/1.bin": b"2", "b.bin": b"b"}) for name in "pq"]
    for each in (old, *staged):
        manifest.write(each)
    copyfile, replaced = shutil.copyfile, manifest.os.replace

    def dying(left, call, before=lambda *_: None):
        def called(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                before(*args)
                raise Killed
            return call(*args, **kwargs)

        return called

    reached = 0
    for moment in range(1, 40):
        for again in staged:
            place = tmp_path / f"place{moment}{again.name}"
            if earlier:
                manifest.replace(place, old)
            left = [moment]
            with monkeypatch.context() as patched:
                half = dying(left, copyfile, lambda source, to: to.write_bytes(source.read_bytes()[:1]))
                patched.setattr(manifest.shutil, "copyfile", half)
                patched.setattr(manifest.os, "replace", dying(left, replaced))
                patched.setattr(manifest.Path, "unlink", dying(left, manifest.Path.unlink))
                try:
                    manifest.replace(place, staged[0])
                except Killed:
                    reached += 1
            assert set(read(place)) <= {*read(old), *read(again), manifest.SCRATCH}
            manifest.replace(place, again)
            assert read(place) == read(again)
    assert reached > 20


# ---- a repo


def put(server, files, repo_id="ada/x", private=True):
    return server.put(repo_id, None, private=private, **files)


def test_a_repo_of_others(server, run, refused, publish):
    """With force=true ours lie beside theirs, and nothing of theirs is touched, below folders neither."""
    repo = put(server, {**MODEL, **BELOW})
    assert refused("run=dpo", "repo_id=ada/x").startswith("repo_id=ada/x: holds 5 files that were not published from")
    said = refused("run=dpo", "repo_id=ada/x", "force=true", "merged=true", "max_merge_drift=1")
    assert said.startswith("repo_id=ada/x: config.json was not published from here, or was changed there since,")
    assert len(repo.commits) == 1
    publish("run=dpo", "repo_id=ada/x", "force=true")
    assert repo.files.items() >= {**MODEL, **BELOW}.items() and "adapter_model.safetensors" in repo.files
    listed = json.loads(repo.files["published.json"])["files"]
    assert not listed.keys() & {*MODEL, *BELOW} and listed.keys() < repo.files.keys()
    publish("run=dpo", "repo_id=ada/x", "force=true", "license=mit")
    assert repo.files.items() >= {**MODEL, **BELOW}.items()


def test_a_card_that_was_edited_there(server, run, refused, publish):
    publish("run=dpo", "repo_id=ada/x")
    repo = server.repos["model", "ada/x"]
    repo.add("main", "by hand", {**repo.files, "README.md": b"mine"})
    for force in ("false", "true"):
        said = refused("run=dpo", "repo_id=ada/x", "license=mit", f"force={force}")
        assert said.startswith("repo_id=ada/x: README.md was not published from here, or was changed there since,"), (
            said
        )
    assert repo.files["README.md"] == b"mine" and len(repo.commits) == 4


def test_a_file_that_is_pushed_while_models_load(server, run, refused, monkeypatch):
    from rlhf_recipes.publish import publish as publishing

    repo, measure = put(server, {}), publishing._measure

    def push(*args):
        repo.add("main", "theirs", {**repo.files, "config.yaml": b"mine"})
        return measure(*args)

    monkeypatch.setattr(publishing, "_measure", push)
    assert refused("run=dpo", "repo_id=ada/x").startswith(
        "repo_id=ada/x: holds 1 files that were not published from here"
    )
    assert repo.files["config.yaml"] == b"mine" and len(repo.commits) == 2


def test_a_weight_that_was_changed_there(server, run, refused, publish):
    """Large files have another hash on the Hub than small ones."""
    publish("run=dpo", "repo_id=ada/x")
    repo = server.repos["model", "ada/x"]
    repo.add("main", "by hand", {**repo.files, "adapter_model.safetensors": b"mine"})
    said = refused("run=dpo", "repo_id=ada/x", "merged=true", "max_merge_drift=1", "force=true")
    assert said.startswith("repo_id=ada/x: adapter_model.safetensors was not published from here, or was changed")
    assert repo.files["adapter_model.safetensors"] == b"mine"


def test_a_repo_as_the_page_makes_it(server, run, refused, publish):
    """With the card that states a licence, and no more than that."""
    repo = put(server, {"README.md": b"---\nlicense: mit\n---\n# Mine\n"})
    assert "holds 1 files that were not published from here (README.md)" in refused("run=dpo", "repo_id=ada/x")
    repo.add("main", "as made", {"README.md": b"---\nlicense: mit\n---\n"})
    publish("run=dpo", "repo_id=ada/x")
    assert b"Proven by a round trip" in repo.files["README.md"]


# ---- what happens meanwhile


def test_a_repo_that_appears_meanwhile(server, run, refused):
    """Public, or with files: it is looked at again before anything is sent."""
    for private, files, says in [
        (False, {}, "repo_id=ada/x: is public already."),
        (True, MODEL, "repo_id=ada/x: holds 3 files that were not published from here"),
    ]:
        server.repos.pop(("model", "ada/x"), None)

        def appear(name, number, path, private=private, files=files):
            if name == "create":
                put(server, files, private=private)

        server.fault = appear
        assert refused("run=dpo", "repo_id=ada/x").startswith(says)
        assert len(server.repos["model", "ada/x"].commits) == 1 and not server.seen["preupload"]


def test_a_repo_that_is_made_public_meanwhile(server, run, refused, monkeypatch):
    from rlhf_recipes.publish import publish as publishing

    repo, measure = put(server, {}), publishing._measure

    def open_it(*args):
        repo.private = False
        return measure(*args)

    monkeypatch.setattr(publishing, "_measure", open_it)
    assert refused("run=dpo", "repo_id=ada/x").startswith("repo_id=ada/x: is public already.")
    assert len(repo.commits) == 1 and not server.seen["preupload"]


def test_a_tag_that_is_set_meanwhile(server, run, refused):
    def set_tag(name, number, path):
        if name == "tag":
            repo = server.repos["model", "ada/x"]
            repo.tags.setdefault("v1", next(iter(repo.commits)))

    server.fault = set_tag
    said = refused("run=dpo", "repo_id=ada/x", "tag=v1", "public=true")
    first = next(iter(server.repos["model", "ada/x"].commits))
    assert said.startswith(f"tag=v1: was set meanwhile at {first[:12]}, and tags stay. Revision ")
    assert "is there and proven." in said and server.repos["model", "ada/x"].private


def test_the_same_command_after_the_tag(server, run, refused, publish):
    """It goes on where making it public has failed: its tag is where it should be."""
    server.fault = lambda name, number, path: 403 if name == "settings" else None
    refused("run=dpo", "repo_id=ada/x", "tag=v1", "public=true")
    server.fault = lambda name, number, path: None
    done = publish("run=dpo", "repo_id=ada/x", "tag=v1", "public=true")
    repo = server.repos["model", "ada/x"]
    assert not done["uploaded"] and not repo.private and repo.tags["v1"] == done["revision"]


def test_a_tag_of_what_was_published_before(server, run, refused, publish):
    """It stays where it is, and nothing else is sent."""
    publish("run=dpo", "repo_id=ada/x", "tag=v1")
    repo = server.repos["model", "ada/x"]
    tags, commits = repo.tags.copy(), len(repo.commits)
    said = refused("run=dpo", "repo_id=ada/x", "tag=v1", "license=mit", "merged=true", "max_merge_drift=1")
    assert said == "tag=v1: ada/x has a tag of this name, and tags stay. Choose another."
    assert repo.tags == tags and len(repo.commits) == commits


def test_what_was_in_a_private_repo_is_not_shown(server, run, refused, publish):
    """A file of an earlier revision, of another branch, or of a pull request can be read once the repo is public."""
    repo = put(server, {})
    repo.add("main", "private", {"salaries.csv": b"1,2"})
    repo.add("main", "removed", {})
    said = refused("run=dpo", "repo_id=ada/x", "public=true")
    assert said.startswith("public=true: ada/x is private, and its revision ") and "holds salaries.csv" in said
    assert len(repo.commits) == 3 and repo.private
    publish("run=dpo", "repo_id=ada/x")  # private it may be

    repo = put(server, {}, "ada/y")
    repo.pulls["refs/pr/1"] = repo.branches["main"]
    repo.add("refs/pr/1", "private", {"salaries.csv": b"1,2"})
    assert "holds salaries.csv" in refused("run=dpo", "repo_id=ada/y", "public=true") and repo.private


def test_what_was_pushed_meanwhile_is_not_shown(server, run, refused):
    """The history is looked at again when the repo is about to be made public."""

    def push(name, number, path):
        repo = server.repos.get(("model", "ada/x"))
        if name == "tag" and "trial" not in repo.branches:
            repo.branches["trial"] = repo.branches["main"]
            repo.add("trial", "private", {"salaries.csv": b"1,2"})

    server.fault = push
    said = refused("run=dpo", "repo_id=ada/x", "public=true", "tag=v1")
    assert "holds salaries.csv" in said and server.repos["model", "ada/x"].private


def test_our_own_history_may_be_shown(server, run, publish):
    publish("run=dpo", "repo_id=ada/x")
    publish("run=dpo", "repo_id=ada/x", "merged=true", "max_merge_drift=1")
    repo = server.repos["model", "ada/x"]
    assert repo.private
    done = publish("run=dpo", "repo_id=ada/x", "merged=true", "max_merge_drift=1", "public=true")
    assert not repo.private and not done["uploaded"] and len(repo.commits) == 5
