"""A Hub that fails at any step, a push in between, Ctrl-C: never "published", and the state of the repo is said."""

import shutil

import pytest
from conftest import TINY_ID
from safetensors.torch import load_file, save_file
from test_hub import publish, refused, run, server, trained, zero  # noqa: F401  fixtures

# ruff: noqa: F811


STEPS = ("whoami", "info", "create", "tree", "yaml", "preupload", "batch", "upload", "verify", "commit", "resolve",
         "download", "tag", "settings", "branch", "commits", "refs")  # fmt: skip
AFTER = ("tag", "settings", "commits", "refs")  # the proof


def is_told_as_done(server, stdout):
    """Whether anything says "published", or a card that the proof is there."""
    repo = server.repos.get(("model", "ada/x"))
    cards = [repo.at(ref)["files"].get("README.md", b"") for ref in repo.branches] if repo else []
    return "published" in stdout or any(b"Proven by a round trip" in card for card in cards)


# Asked to wait (429), it waits as for 500, whatever the step; a commit, which is not repeated, has a way of its own.
FAILS = [(step, fault) for step in STEPS for fault in (500, "lost", 403)] + [("whoami", 429), ("commit", 429)]


@pytest.mark.parametrize(("step", "fault"), FAILS)
def test_a_step_that_fails(server, run, refused, capsys, step, fault):
    """From its first request for the repo on; what is not the Hub's word at the end is not said either."""
    server.fault = lambda name, number, path: fault if name == step and TINY_ID not in path else None
    line = refused("run=dpo", "repo_id=ada/x", "tag=v1", "public=true", "revision=trial")
    reasons = {500: "the Hub fails (500)", "lost": "the connection to the Hub was lost",
               429: "the Hub asks to wait (429)", 403: "the token may not do that (403)"}  # fmt: skip
    assert reasons[fault] in line, line
    told_as_done = is_told_as_done(server, capsys.readouterr().out)
    if step in AFTER:  # what comes after the proof: that is there, and said to be
        assert "is there and proven." in line
    else:
        assert not told_as_done
    repo = server.repos.get(("model", "ada/x"))
    if repo is None:
        assert "Nothing was uploaded." in line or "It may have been made, and is empty." in line, line
    elif repo.branches.get("trial") is None or len(repo.at("trial")["files"]) == 1:
        assert "private and empty" in line or "It may have been made" in line, line
        assert repo.private
    elif step not in AFTER:
        assert "its card says 'not proven'" in line, line
        assert repo.private and b"**Not proven.**" in repo.at("trial")["files"]["README.md"]
    assert repo is None or repo.private


# An answer to them that is lost is as good as none.
READS = ("whoami", "info", "tree", "yaml", "resolve", "download", "commits", "refs")


@pytest.mark.parametrize(
    ("step", "fault"),
    [(step, fault) for step in STEPS for fault in (500, "lost", "applied") if fault != "applied" or step not in READS],
)
def test_a_step_that_fails_once(server, run, publish, step, fault):
    """It is tried again, and ends with one commit for the files and one for the proof."""
    server.fault = lambda name, number, path: fault if name == step and number == 1 else None
    done = publish("run=dpo", "repo_id=ada/x", "tag=v1", "public=true", "revision=trial")
    repo = server.repos["model", "ada/x"]
    assert done["uploaded"] and repo.tags["v1"] == repo.branches["trial"] == done["revision"] and not repo.private
    assert len(repo.commits) == 3 and b"Proven by a round trip" in repo.at("trial")["files"]["README.md"]


@pytest.mark.parametrize("step", ["resolve", "download", "upload", "commit"])
def test_a_byte_that_is_changed(server, run, refused, capsys, step):
    """On its way up or down: the revision is marked broken, and nothing is said to be published."""
    server.fault = lambda name, number, path: "corrupt" if name == step and TINY_ID not in path else None
    line = refused("run=dpo", "repo_id=ada/x", "public=true", "tag=v1")
    assert "came back with SHA-256" in line and "its card says" in line, line
    assert not is_told_as_done(server, capsys.readouterr().out)
    repo = server.repos["model", "ada/x"]
    assert repo.private and not repo.tags
    if step != "commit":  # which damages the card as well
        assert b"> **Broken.**" in repo.files["README.md"] and b"- broken" in repo.files["README.md"]


def test_what_was_broken_is_proven_anew(server, run, refused, publish):
    """A card that says "broken" is no proof: the same files are downloaded and loaded again."""
    server.fault = lambda name, number, path: "corrupt" if name == "download" and TINY_ID not in path else None
    refused("run=dpo", "repo_id=ada/x")
    server.fault = lambda name, number, path: None
    done = publish("run=dpo", "repo_id=ada/x")
    card = server.repos["model", "ada/x"].files["README.md"]
    assert done["proof"]["passed"] and b"Proven by a round trip" in card and b"- broken" not in card


def test_a_server_that_keeps_another_card(server, run, refused, capsys):
    """The last commit is looked at as well: its card is the one that says "proven"."""
    server.fault = lambda name, number, path: "corrupt" if name == "commit" and server.seen["commit"] == 2 else None
    line = refused("run=dpo", "repo_id=ada/x", "public=true")
    assert "README.md is not what was sent" in line and server.repos["model", "ada/x"].private
    assert "published" not in capsys.readouterr().out


def test_another_push_in_between(server, run, refused, publish):
    """A commit lands between the look and our own: ours is refused, nothing of it is in."""

    def push(name, number, path):
        if name == "commit":
            repo = server.repos["model", "ada/x"]
            repo.add("main", "theirs", {**repo.files, f"note{number}.txt": b"theirs"})
        return None

    server.fault = push
    line = refused("run=dpo", "repo_id=ada/x")
    assert "somebody else has changed it meanwhile (412)" in line and "private and empty" in line
    repo = server.repos["model", "ada/x"]
    assert "adapter_model.safetensors" not in repo.files and "note1.txt" in repo.files
    server.fault = lambda name, number, path: None
    with pytest.raises(ValueError, match="holds 1 files that were not published from here"):
        publish("run=dpo", "repo_id=ada/x")
    publish("run=dpo", "repo_id=ada/x", "force=true")
    assert {"note1.txt", "adapter_model.safetensors"} <= repo.files.keys()


def test_a_pull_request_is_asked_for_once(server, run, refused, publish):
    server.fault = lambda name, number, path: "applied" if name == "commit" else None
    line = refused("run=dpo", "repo_id=ada/x", "create_pr=true")
    assert "It is not known whether the last commit has arrived." in line
    assert len(server.repos["model", "ada/x"].pulls) == server.seen["commit"] == 1
    server.fault = lambda name, number, path: None
    done, repo = publish("run=dpo", "repo_id=ada/x", "create_pr=true"), server.repos["model", "ada/x"]
    assert done["where"].endswith("/refs/pr/1") and list(repo.pulls) == ["refs/pr/1"]
    assert b"Proven by a round trip" in repo.at("refs/pr/1")["files"]["README.md"] and len(repo.files) == 1


def test_a_pull_request_of_nothing(server, run, refused):
    """Neither the branch, which has these files and no proof, nor a pull request of somebody else is touched."""
    server.fault = lambda name, number, path: "lost" if name == "resolve" and "ada/x" in path else None
    refused("run=dpo", "repo_id=ada/x")
    server.fault = lambda name, number, path: None
    repo = server.repos["model", "ada/x"]
    heads = {"main": repo.branches["main"]}
    theirs = repo.add("refs/pr/1", "theirs", {**repo.files, "picture.png": b"theirs"})
    line = refused("run=dpo", "repo_id=ada/x", "create_pr=true")
    assert line.startswith("create_pr=true: main of ada/x has these files already, not proven."), line
    assert repo.branches == heads and repo.pulls == {"refs/pr/1": theirs}


def test_it_goes_on_from_where_it_was_stopped(server, run, refused, publish):
    """Files that are there are not sent again, be it that the upload or that the download broke off."""
    server.fault = lambda name, number, path: "lost" if name == "commit" else None
    refused("run=dpo", "repo_id=ada/x")
    server.fault = lambda name, number, path: "lost" if name == "resolve" and "ada/x" in path else None
    uploads = server.seen["upload"]
    refused("run=dpo", "repo_id=ada/x")
    server.fault = lambda name, number, path: None
    done = publish("run=dpo", "repo_id=ada/x")
    assert uploads == server.seen["upload"] > 0 and done["proof"]["passed"]
    repo = server.repos["model", "ada/x"]
    assert [c["title"].endswith("proven") for c in repo.commits.values()] == [False, False, True]


def test_the_hub_says_how_long_to_wait(server, run, publish, monkeypatch):
    from rlhf_recipes.publish import upload

    waited = []
    monkeypatch.setattr(upload.time, "sleep", waited.append)
    server.error_headers = {"Retry-After": "17"}
    server.fault = lambda name, number, path: 429 if name == "whoami" and number == 1 else None
    publish("run=dpo", "repo_id=ada/x")
    assert waited[0] == 17.0


def test_ctrl_c_says_what_is_there(server, run, publish):
    from rlhf_recipes.publish import upload

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    for place, says in [
        ("make", "Interrupted. Nothing was uploaded. The same command goes on from there."),
        ("download", "its card says 'not proven'. The same command goes on from there."),
        ("tag", "is there and proven. The same command goes on from there."),
    ]:
        with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt) as caught:
            patched.setattr(upload, place, interrupt)
            publish("run=dpo", "repo_id=ada/x", "tag=v1")
        assert str(caught.value).endswith(says), caught.value


@pytest.mark.parametrize("lost", ["weights", "template"])
def test_what_a_file_hash_cannot_see(server, run, refused, monkeypatch, lost):
    """All files arrive; what the fresh process makes of them is not what was trained."""
    from rlhf_recipes.publish import publish as publishing

    measure = publishing.round_trip.measure

    def forgetful(task):
        folder = run.parent / "spoiled"
        shutil.copytree(task["folder"], folder, dirs_exist_ok=True)
        if lost == "weights":
            tensors = load_file(folder / "adapter_model.safetensors")
            zero(tensors)
            (folder / "adapter_model.safetensors").unlink()
            save_file(tensors, folder / "adapter_model.safetensors")
        else:
            (folder / "chat_template.jinja").unlink()
            (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
        return measure({**task, "folder": str(folder)})

    cfg = ["run=dpo", "repo_id=ada/x"]
    published = publishing._round_trip

    def spoiled(*args):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(publishing.round_trip, "in_fresh_process", forgetful)
            return published(*args)

    monkeypatch.setattr(publishing, "_round_trip", spoiled)
    line = refused(*cfg)
    assert "not published. of 32 numbers one differs by" in line and "its card says 'broken'" in line, line
    assert b"> **Broken.**" in server.repos["model", "ada/x"].files["README.md"]
