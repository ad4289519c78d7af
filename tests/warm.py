"""A Python that has torch, transformers and TRL imported already: a recipe starts in 0.1 s instead of 10 s.

`offer` writes a program that takes the arguments of `python` and is, for who starts it, that process: its folder,
environment, input and outputs, signals and exit status. It asks a server, which has imported the libraries and the
package and computed nothing, for a fork of itself, and waits for its end. All workers ask the same one. What a fork
would do in another way has a Python of its own, "cold": other modules than the package's, and an environment in which
the libraries would be other ones.

A "light" one has imported what a recipe needs until it has checked its config, and none of the large libraries.

A fork differs in this: modules are there before the recipe asks for them, strings hash alike in all forks of a
server, and a run's pictures are sketched unless DRAWN is set. What a test says about processes that agree bit for bit,
or about the imports of more than the large libraries, needs a cold one.
"""

import atexit
import importlib
import marshal
import os
import pkgutil
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager, nullcontext, suppress
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from typing import NoReturn

import quick
from warm_client import COLD

PRELOADED = (
    "accelerate.commands.config", "bitsandbytes", "datasets", "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_svg", "matplotlib.pyplot", "peft", "peft.tuners.lora.bnb",
    "peft.utils.transformers_weight_conversion", "torch.distributed.launcher.api", "torch.profiler._cupti_monitor",
    "torch.utils.serialization", "transformers.integrations.bitsandbytes",
    "transformers.models.llama.modeling_llama", "trl.experimental.cpo", "trl.experimental.orpo",
    "trl.trainer.dpo_trainer", "trl.trainer.kto_trainer", "trl.trainer.reward_trainer",
    "trl.trainer.rloo_trainer", "trl.trainer.sft_trainer",
)  # fmt: skip
# Of the audit, and of who asks a server.
OTHERS = (
    "krippendorff", "networkx", "httpx2", "scipy.sparse.linalg", "scipy.stats", "sklearn.cluster",
    "sklearn.decomposition", "sklearn.feature_extraction.text", "sklearn.linear_model", "sklearn.metrics",
)  # fmt: skip
LIGHT = (
    "filelock", "numpy", "pandas", "rlhf_recipes.cai.gate", "rlhf_recipes.cai.make_pairs", "rlhf_recipes.data.fit",
    "rlhf_recipes.data.load", "rlhf_recipes.evaluation.checkpoints", "rlhf_recipes.evaluation.measure",
    "rlhf_recipes.evaluation.page", "rlhf_recipes.evaluation.sweeps", "rlhf_recipes.launch.preflight.look",
    "rlhf_recipes.launch.publish_after", "rlhf_recipes.launch.sweep", "rlhf_recipes.training.finish",
)  # fmt: skip
# What Hydra's parsers have seen, they know; so do forks the most frequent choices of groups.
COMPOSED = (
    *((recipe,) for recipe in ("sft", "reward", "dpo", "orpo", "simpo", "kto", "ppo")),
    *((recipe, "quantization=none") for recipe in ("sft", "reward", "dpo", "ppo", "evaluate")),
    *((recipe,) for recipe in ("evaluate", "pipeline", "cai", "audit", "label", "publish")),
)
DRAWN = "RLHF_TEST_DRAWN"
STARTED = ("rlhf_recipes.", "accelerate.commands.launch", "pytest", "submitit.core._submit", "torch.distributed.run",
           "killed", "sharded", "test_cai_data", "warm_")  # fmt: skip
# Variables that the libraries read when they are imported; not those that `_become` sees to.
READ = ("BNB_", "CUDA_", "HUGGINGFACE_", "LD_", "MALLOC_", "MKL_", "MPL", "OMP_", "OPENBLAS_",
        "PYTHON", "PYTORCH_", "TOKENIZERS_", "TORCH", "TRANSFORMERS_", "TRL_")  # fmt: skip
NOT_READ = ("CUDA_VISIBLE_DEVICES", "PYTHONPATH", "PYTHONSAFEPATH", "TORCHELASTIC_", "TORCH_NCCL_")


@contextmanager
def offer(folder: Path, env: dict[str, str], kind: str = "warm"):
    """The path of the program. Its server starts when somebody asks, and ends with the context or this process.

    Args:
        folder: where there is none; its path is short, as that of a socket must be.
        env: what the libraries are imported under.
        kind: "warm" or "light".
    """
    if sys.platform != "linux" or Path("/dev/nvidiactl").exists():  # CUDA and Metal do not survive a fork
        yield Path(sys.executable)
        return
    folder.mkdir()
    program, address = folder / "python", folder / "socket"
    program.write_text(
        f"#!{sys.executable} -IS\nimport sys\nsys.path.append({str(Path(__file__).parent)!r})\nimport warm_client\n"
        f"warm_client.ask({str(address)!r}, {sys.executable!r})\n"
    )
    program.chmod(0o755)
    ends, end = os.pipe()  # no other process has its second half
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen(16)
        command = [sys.executable, __file__, str(listener.fileno()), str(program), kind]
        starter = threading.Thread(target=_start_when_asked, args=(listener, ends, command, env, folder / "log"))
        starter.start()
        try:
            yield program
        finally:
            os.close(end)
            starter.join()
            os.close(ends)


def _start_when_asked(listener: socket.socket, ends: int, command: list[str], env: dict[str, str], log: Path) -> None:
    """Wait for who asks, who waits for the server to accept it, or for the end; then for the server's."""
    if listener not in select.select([listener, ends], [], [])[0]:
        return
    with log.open("w") as said, listener:  # closed here: who asks a server that is gone is told so
        server = subprocess.Popen(
            command, env=env, pass_fds=[listener.fileno()], stdin=ends, stdout=said, stderr=said,
            start_new_session=True,
        )  # fmt: skip
    server.wait()


def _serve(listener: socket.socket, known: dict[str, str]) -> dict:
    """Fork for every connection and send the status of the fork's end there, until the input ends.

    Returns what is asked of this process, which is such a fork. One process watches all of them: to copy the tables of
    all these pages for another fork, only to watch, would take as long as some recipes do.

    Args:
        known: variables under which the libraries were imported; in os.environ are those that recipes set, too.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    forks: dict[socket.socket, int] = {}  # who asked -> the fork's id, 0 before there is one
    ends: dict[int, tuple[int, socket.socket]] = {}  # a descriptor that is ready when a fork has ended -> both
    while True:
        ready, _, _ = select.select([listener, sys.stdin, *forks, *ends], [], [])
        if sys.stdin in ready:
            for fork in filter(None, forks.values()):
                _signal(fork, signal.SIGKILL)
            os._exit(0)
        for each in ready:
            if each is listener:
                forks[listener.accept()[0]] = 0
            elif each in ends:
                _tell_status(each, forks, ends)
            elif forks.get(each):
                _pass_signal_on(each, forks)
            elif each in forks and (asked := _fork(each, forks, ends, known)):
                listener.close()
                return asked


def _fork(connection: socket.socket, forks: dict, ends: dict, known: dict[str, str]) -> dict | None:
    """Read what is asked and fork. Returns it in the fork, with its inputs and outputs in place."""
    length, outputs, *_ = socket.recv_fds(connection, 4, 3)
    message = connection.recv(int.from_bytes(length, "big"), socket.MSG_WAITALL) if length else b""
    whole = len(message) == int.from_bytes(length, "big") > 0  # who asked may be gone
    asked = marshal.loads(message) if whole else {}
    if not asked or _is_cold(asked, known):
        with suppress(ConnectionError):
            connection.send(COLD)
        del forks[connection]
        connection.close()
    elif (fork := os.fork()) == 0:
        for each in forks:
            each.close()
        for end in ends:
            os.close(end)
        os.setpgid(0, 0)
        for number, descriptor in enumerate(outputs):
            os.dup2(descriptor, number)
            os.close(descriptor)
        return asked
    else:
        with suppress(OSError):  # it has done so itself, or is at its end
            os.setpgid(fork, fork)
        forks[connection] = fork
        ends[os.pidfd_open(fork)] = fork, connection
    for descriptor in outputs:
        os.close(descriptor)
    return None


def _pass_signal_on(connection: socket.socket, forks: dict) -> None:
    """To the fork, which is killed when who asked is gone."""
    number = connection.recv(1)
    _signal(forks[connection], int.from_bytes(number) or signal.SIGKILL)
    if not number:
        del forks[connection]
        connection.close()


def _signal(fork: int, number: int) -> None:
    # A terminal sends Ctrl-C to its children, too, and what kills who asked kills all of them.
    with suppress(ProcessLookupError):
        (os.kill if number == signal.SIGTERM else os.killpg)(fork, number)


def _tell_status(end: int, forks: dict, ends: dict) -> None:
    fork, connection = ends.pop(end)
    os.close(end)
    _, status = os.waitpid(fork, 0)
    if forks.pop(connection, None):
        with connection, suppress(ConnectionError):
            connection.send(status.to_bytes(4, "big"))


def _is_cold(asked: dict, known: dict[str, str]) -> bool:
    options, module, _ = _parsed(asked["argv"])
    given, expected = (
        {name: value for name, value in each.items() if name.startswith(READ) and not name.startswith(NOT_READ)}
        for each in (asked["env"], known)
    )
    other = any(os.environ.get(name) != value for name, value in given.items()) or not expected.keys() <= given.keys()
    return other or not module.startswith(STARTED) or not options <= {"-P", "-u"}


def _parsed(argv: list[str]) -> tuple[set[str], str, list[str]]:
    """Options, module and arguments of `[options] -m module [arguments]`; no module where it is another line."""
    if "-m" not in argv[:-1]:
        return set(), "", []
    at = argv.index("-m")
    return set(argv[:at]), argv[at + 1], argv[at + 2 :]


def _become(asked: dict, known: dict[str, str], program: str) -> None:
    """`python [options] -m module [arguments]` in this process, with the program as the Python of its children."""
    import numpy

    from rlhf_recipes.launch import forks, refusals

    options, module, arguments = _parsed(asked["argv"])
    os.chdir(asked["cwd"])
    _set_environment(asked["env"], {name: value for name, value in os.environ.items() if name not in known})
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.executable, sys.argv = program, [module, *arguments]
    first = [] if "-P" in options or "PYTHONSAFEPATH" in os.environ else [os.getcwd()]
    others = [folder for folder in sys.path if folder not in _path(known)]
    sys.path[:] = [*first, *_path(asked["env"]), *others]
    if "-u" in options:
        sys.stdout.reconfigure(write_through=True)
    # What else a process has of its own from its start.
    if own := PathFinder.find_spec("sitecustomize", _path(asked["env"])):
        own.loader.exec_module(module_from_spec(own))
    forks.DEVICES = ("/",)  # stages start by the program, too
    numpy.random.seed()
    tempfile.tempdir = None
    refusals.WANTS_TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1"
    drawn = DRAWN in os.environ or "matplotlib" not in sys.modules
    with nullcontext() if drawn else quick.pictures_sketched():
        _run(module)


def _run(module: str) -> NoReturn:
    """Run it to its end and end as Python does, but for the taking apart of all modules, which takes half a second."""
    code = None
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as error:
        code = error.code
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(BrokenPipeError):
            stream.flush()
    if code == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit((code or 0) & 0xFF)


def _path(environment: dict[str, str]) -> list[str]:
    return list(filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)))


def _set_environment(wanted: dict[str, str], set_by_recipes: dict[str, str]) -> None:
    """Replace the environment, and what the libraries of the Hub have read of it."""
    before = _of_the_hub(os.environ)
    os.environ.clear()
    os.environ.update(set_by_recipes | wanted)
    if _of_the_hub(os.environ) != before:
        _import_again()
    for name in set_by_recipes.keys() - wanted.keys():
        del os.environ[name]


def _of_the_hub(environment) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith("HF_") and name != "HF_TOKEN"}


def _import_again() -> None:
    """The modules that read the Hub's variables; what others have copied from them is replaced."""
    if "huggingface_hub" not in sys.modules:
        return
    import datasets
    from huggingface_hub import constants, hf_api
    from transformers.utils import hub

    others = [module for name, module in sys.modules.items() if name.startswith(("datasets", "huggingface_hub"))]
    for module in (constants, datasets.config):
        before = dict(vars(module))
        importlib.reload(module)
        changed = [name for name, value in vars(module).items() if name.isupper() and value != before.get(name)]
        for other in others:
            for name in changed:
                if name in vars(other) and vars(other)[name] == before.get(name):
                    setattr(other, name, vars(module)[name])
    hf_api.api.endpoint = constants.ENDPOINT
    hub.HF_MODULES_CACHE = os.path.join(constants.HF_HOME, "modules")


def _look_up(configs: list, folder: str) -> None:
    """What each run would look up anew, and keep: the types of arguments, templates of cards, names of weights, and
    the rows of conftest's `tiny_overrides`, in files of the folder."""
    import jinja2
    import trl
    from huggingface_hub import ModelCard
    from hydra.utils import get_class
    from omegaconf import OmegaConf
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    from rlhf_recipes import methods, run
    from rlhf_recipes.data.load import LOADERS
    from rlhf_recipes.typecheck import parameters

    tempfile.tempdir = folder
    for (recipe, *_), cfg in zip(COMPOSED, configs, strict=True):
        if recipe in methods.METHODS:
            cfg.data.train_size, cfg.data.eval_size = 8, 4
            LOADERS[methods.METHODS[recipe].rows](cfg.data)
    run.versions()
    get_checkpoint_conversion_mapping("llama")  # for which it parses 900 expressions
    for card in (ModelCard.default_template_path, *Path(trl.__file__).parent.glob("templates/*_model_card.md")):
        jinja2.Template(card.read_text())
    for cfg in configs:
        for group in ("trainer", "lora", "quantization"):
            if target := OmegaConf.select(cfg, f"{group}._target_"):
                parameters(get_class(target))


def _main(descriptor: str, program: str, kind: str) -> None:
    import hydra

    import rlhf_recipes
    from rlhf_recipes import config, run
    from rlhf_recipes.launch import keys

    sys.path.remove(str(Path(__file__).parent))
    known = dict(os.environ)
    run.environment()
    package = [each.name for each in pkgutil.walk_packages(rlhf_recipes.__path__, "rlhf_recipes.")]
    for name in (*PRELOADED, *OTHERS, *package) if kind == "warm" else LIGHT:
        importlib.import_module(name)
    quick.compose_once()
    with hydra.initialize_config_module("rlhf_recipes.conf", version_base="1.3"):
        configs = [hydra.compose(name, groups) for name, *groups in COMPOSED]
    config.trainer_recipes()
    for name, *_ in COMPOSED:
        keys.defaults(name)
    if kind == "warm":
        quick.settle()
        _look_up(configs, str(Path(program).parent))
    quick.sync_nothing()
    quick.collect_less()
    sys.stdout.flush()
    _become(_serve(socket.socket(fileno=int(descriptor)), known), known, program)


if __name__ == "__main__":
    _main(*sys.argv[1:])
