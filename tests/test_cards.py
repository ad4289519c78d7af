"""Several cards on a machine: which one a process takes where no launcher gives it one, and the launcher's files."""

import os
import subprocess

import pytest
from conftest import ROOT
from omegaconf import OmegaConf

from rlhf_recipes import commands, config
from rlhf_recipes.errors import Refusal
from rlhf_recipes.launch import cards, forks, pipeline, recipe
from rlhf_recipes.launch.preflight import look

FILES = sorted((ROOT / "conf/accelerate").glob("*.yaml"))


@pytest.fixture
def machine(monkeypatch):
    """machine(cards, **environment): a machine with so many cards, which none here has."""
    import torch

    def there_are(count, **environment):
        for module in (cards, forks):
            monkeypatch.setattr(module, "DEVICES", (os.devnull,))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        for name in (cards.VISIBLE, cards.BEFORE, "RANK", "WORLD_SIZE", "MASTER_ADDR", commands.TYPED):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return there_are


WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
LAUNCH = "All of them: accelerate launch --config_file"
DDP = config.CONF / "accelerate/ddp.yaml"


@pytest.mark.parametrize(
    ("count", "environment", "taken", "says"),
    [
        (2, {}, "0", f"2 cards are visible, and dpo takes one. {LAUNCH} {DDP} recipes/dpo.py 'data.path=a b'\n"),
        (8, {cards.VISIBLE: "3,7"}, "3", "2 cards are visible, and dpo takes one."),
        (2, {cards.VISIBLE: "GPU-a,GPU-b"}, "GPU-a", "2 cards are visible, and dpo takes one."),
        (2, {commands.TYPED: "rlhf-{}"}, "0", f"{LAUNCH} {DDP} -m rlhf_recipes.recipes.dpo 'data.path=a b'\n"),
        (1, {}, None, ""),
        (0, {}, None, ""),
        (4, {cards.VISIBLE: ""}, "", ""),
        (4, {cards.VISIBLE: "2"}, "2", ""),
        (4, WHOLE, None, ""),
    ],
)
def test_a_process_takes_one_card_and_says_how_to_use_all(
    machine, monkeypatch, capsys, tmp_path, count, environment, taken, says
):
    machine(count, **environment)
    monkeypatch.chdir(tmp_path)
    cards.take_one("dpo", ["data.path=a b", "preflight.only=true"])
    said = capsys.readouterr().out
    assert os.environ.get(cards.VISIBLE) == taken
    assert (says in said) if says else said == ""
    cards.take_one("dpo", [])  # of what has one card: a stage of a pipeline, a job of a sweep
    assert capsys.readouterr().out == ""


def test_every_recipe_takes_it_before_its_libraries_look(machine, monkeypatch, capsys, tmp_path):
    """TRL's trainers would refuse two once the model is loaded; its ORPO and CPO would double the batch in silence."""
    machine(2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["recipes/orpo.py", "run_name=two"])
    monkeypatch.setattr(recipe, "_leave_script_folder", lambda: None)
    monkeypatch.setattr(recipe.signals, "listen", lambda: None)  # of this process, too
    seen = []
    recipe.recipe("orpo")(lambda cfg: seen.append(os.environ[cards.VISIBLE]))()
    assert seen == ["0"] and f"{DDP} recipes/orpo.py run_name=two\n" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["sweep", "pipeline"])
def test_what_starts_processes_says_it_for_them(machine, capsys, what):
    machine(2)
    cards.take_one(*(("dpo",) if what == "sweep" else ("pipeline", [])))
    wanted = {"sweep": "hydra/launcher=joblib hydra.launcher.n_jobs=2", "pipeline": "launch=conf/accelerate/ddp.yaml"}
    assert wanted[what] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("numbers", "environment", "expected"),
    [
        ((5, 6), {}, "1"),  # a worker keeps the card of its first job
        ((1,), {cards.VISIBLE: "3,7"}, "7"),
        ((2, 0), {cards.VISIBLE: "GPU-a,GPU-b"}, "GPU-a"),
        ((0, 1), {cards.VISIBLE: "0", cards.BEFORE: "0,1"}, "0"),  # jobs one after the other, in the command's process
        ((1, 3), {cards.VISIBLE: "0", cards.BEFORE: "0,1"}, "1"),  # a worker that the command started
        ((3,), {cards.VISIBLE: "2"}, "2"),  # one that Slurm gave
    ],
)
def test_the_jobs_of_a_sweep_have_a_card_each(machine, numbers, environment, expected):
    machine(4, **environment)
    for number in numbers:
        cards.take_for_job(number)
    assert os.environ[cards.VISIBLE] == expected and cards.BEFORE not in os.environ


def test_the_stages_of_a_pipeline_are_launched_on_all_cards(machine, monkeypatch, tmp_path):
    machine(2, **{cards.VISIBLE: "0", cards.BEFORE: "0,1"})
    started = []

    class Process:
        wait = poll = staticmethod(lambda: 0)

        def __init__(self, command, env):
            started.append((command[1:], env[cards.VISIBLE]))

    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    for name in ("dpo", "publish"):
        stage = pipeline.Stage(name, name, tmp_path / name, ["a=1"], None, "")
        pipeline._run(stage, name, str(DDP))
    (dpo, all_cards), (publish, one) = started
    launch = ["-P", "-m", "accelerate.commands.launch", "--config_file", str(DDP), "-m", "rlhf_recipes.recipes.dpo"]
    assert dpo == [*launch, "a=1", f"hydra.run.dir={tmp_path / 'dpo'}"] and all_cards == "0,1"
    assert publish[:3] == ["-P", "-m", "rlhf_recipes.recipes.publish"] and one == "0"


def looked_by(jobs, folder, settings, **_):
    (folder / "pid").write_text(str(os.getpid()))
    if settings == "refuse":
        raise Refusal("preflight: dpo: needs about 99.0 GiB.")


@pytest.mark.parametrize(("device", "usable"), [(os.devnull, True), (os.devnull, False), ("/dev/none", True)])
def test_what_starts_processes_looks_in_one_of_its_own(machine, monkeypatch, tmp_path, device, usable):
    """Where there is a card, on which it would leave a context; not where a fork finds none."""
    import torch

    machine(1)
    monkeypatch.setattr(cards, "DEVICES", (device,))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
    monkeypatch.setattr(look, "look", looked_by)
    stage = pipeline.Stage("dpo", "dpo", tmp_path, [], OmegaConf.create(), "")
    with pytest.raises(Refusal, match=r"^preflight: dpo: needs about 99\.0 GiB\.$"):
        look.before_pipeline([stage], tmp_path, "refuse")
    apart = (tmp_path / "pid").read_text() != str(os.getpid())
    assert apart == (device == os.devnull and usable)
    if apart:
        look.before_pipeline([stage], tmp_path, OmegaConf.create())


def test_processes_that_accelerate_did_not_start_are_missed(machine):
    """`accelerate launch --cpu --num_processes 2` starts one."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    for words, missed in ((["--cpu", "--num_processes", "2"], True), (["--cpu", "--num_processes", "1"], False)):
        args = launch_command_parser().parse_args([*words, "recipes/dpo.py"])
        _, environment = prepare_simple_launcher_cmd_env(_validate_launch_command(args)[0])
        machine(0, **{name: value for name, value in environment.items() if name not in os.environ})
        if missed:
            with pytest.raises(Refusal, match="--num_processes: accelerate launch has started one process"):
                cards.take_one("dpo", [])
        else:
            cards.take_one("dpo", [])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_files_are_accelerates(file, monkeypatch):
    import torch
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env
    from torch.distributed.run import determine_local_world_size

    loaded = load_config_from_file(str(file))  # it refuses a key that it does not know
    parser = launch_command_parser()
    known = {action.dest for action in parser._actions}
    assert set(loaded.fsdp_config) <= known
    args, *_ = _validate_launch_command(parser.parse_args(["--config_file", str(file), "recipes/dpo.py"]))
    args.main_process_port = 29500
    environment = prepare_multi_gpu_env(args)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    assert determine_local_world_size(args.nproc_per_node) == 5, "all that are visible"
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no", "the recipe chooses"
    sharded = {key: environment[key] for key in environment if key.startswith("FSDP_")}
    if file.stem == "ddp":
        assert args.multi_gpu and not args.use_fsdp and not sharded
    else:
        assert sharded["FSDP_VERSION"] == "2" and sharded["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"
        assert sharded["FSDP_RESHARD_AFTER_FORWARD"] == "true"


def test_hydra_takes_them_for_no_group():
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with hydra.initialize_config_module("rlhf_recipes.conf", version_base="1.3"):
        groups = GlobalHydra.instance().config_loader().list_groups("")
    assert "accelerate" not in groups and "quantization" in groups
    assert [file.stem for file in FILES] == ["ddp", "fsdp2_qlora"]
