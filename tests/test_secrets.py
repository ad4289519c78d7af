"""Secrets: what is one, what is none, and that no config holds one, however it got there."""

import random
import string
import subprocess

import pytest
from conftest import ROOT, TINY_ID, merged, snapshot

from rlhf_recipes import config, secrets
from rlhf_recipes.launch import keys
from rlhf_recipes.launch.refusals import as_refusal

# Written in pieces: this file holds no token.
LETTERS = "aB3dE6gH9jK2mN5pQ8rS1tU4vW7xY0zA3bC6dE9fG2hJ5kL8"
HEX = "0123456789abcdef" * 4
TOKENS = {
    "hub": "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYzAbCdEfGh",
    "openai": "sk-" + LETTERS,
    "openai project": "sk-" + "proj-a_-B3-" + LETTERS,
    "anthropic": "sk-" + "ant-api03-x-Y_4-" + LETTERS,
    "openrouter": "sk-" + "or-v1-" + HEX,
    "github": "ghp_" + LETTERS[:36],
    "github, fine-grained": "github_" + "pat_11ABCDEFG0_" + LETTERS,
    "gitlab": "glpat-" + "x_Y-4" + LETTERS[:20],
    "aws": "AKIA" + "IOSFODNN7EXAMPLE",
    "google": "AIza" + "Sy-_" + LETTERS[:31],
    "azure": LETTERS + "Ab12" + "JQQJ99" + "BCACYeBjFXJ3w3AAABACOG",
    "azure client": "abC8Q" + "~" + "x_Y.z-" + LETTERS[:28],
    "databricks": "dapi" + HEX[:32],
    "slack": "xoxb-" + "123456789012-abcdefABCDEF",
    "stripe": "sk_" + "live_" + LETTERS[:24],
    "wandb": "wandb_" + "v1_" + LETTERS,
    "npm": "npm_" + LETTERS[:36],
    "pypi": "pypi-" + "AgEIcHlwaS5vcmc" + LETTERS,
    "nvidia": "nvapi-" + "x_-Y4" + LETTERS,
    "xai": "xai-" + LETTERS,
    "groq": "gsk_" + LETTERS,
    "replicate": "r8_" + LETTERS[:37],
    "jwt": "eyJ" + "hbGciOiJIUzI1NiJ9" + ".eyJ" + "zdWIiOiIxMjM0NTY3ODkwIn0" + ".dozjgNryP4J3jVmNHl0w5N",
    "private key": "-----BEGIN " + "OPENSSH PRIVATE KEY-----",
    "bearer": "Bearer " + LETTERS,
    "url": "https://user:" + "pa55word@host/path",
    "url without user": "redis://:" + "pa55word@host",
    "netrc": "machine api.wandb.ai login user password " + HEX[:40],
    "argument": "--hub_token=" + HEX[:40],
    "yaml": "api_key: " + LETTERS,
    "json": '{"aws_secret_access_key": "' + "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY" + '"}',
}
# What the patterns must leave alone.
PLAIN = [
    "task-specific-fine-tuning, risk-stratification-tools, mask-language-modelling, disk-space-2024-requirements",
    "hf_baseline1 hf_hub_download hf_token_classification_pipeline",
    "outputs/dpo/task-specific-fine-tuning/adapter_model.safetensors",
    HEX[:40],
    f"sha256: {HEX}",
    "550e8400-e29b-41d4-a716-446655440000",
    "the key is under the mat; my secret: do not tell anybody; password: what is yours?",
    "pad_token: <|endoftext|>, eos_token=<|im_end|>, num_input_tokens_seen=123456789012345678",
    "https://huggingface.co/org/model:main and user@example.org, git@github.com:org/name.git",
    "{% if message['role'] == 'system' %}{{ '<|im_start|>' + message['content'] }}{% endif %}",
    "secret = base64.b64decode(padded_value_1)",
    "api_key_env: OPENAI_API_KEY",
    "skip-connections-in-2024-transformer-models, sk-learn, npm_config_cache, pypi-server, fw_update",
    "model.safetensors.index.json config_sentence_transformers.json tokenizer_config.json",
]


@pytest.fixture
def no_secrets_here(monkeypatch):
    for name in secrets.in_environment().values():
        monkeypatch.delenv(name)


@pytest.mark.parametrize("token", TOKENS.values(), ids=TOKENS)
def test_shapes(no_secrets_here, token):
    for text in (token, f"x/{token}\n", f'"{token}"', f"run {token}, then"):
        assert secrets.find(text) == "what looks like a token or a key"
        shown = secrets.redact(text)
        assert "<secret>" in shown and secrets.find(shown) is None
    if token.isidentifier() or token.startswith(("sk-", "glpat", "xai", "nvapi")):
        assert secrets.find(f"run_name=dpo-{token}") and secrets.find(f"dpo_{token}")


@pytest.mark.parametrize("text", PLAIN)
def test_plain_text_is_no_secret(no_secrets_here, text):
    assert secrets.find(text) is None and secrets.redact(text) == text


@pytest.mark.slow
def test_nothing_of_the_clinic_is_a_secret(no_secrets_here):
    files = [path for folder in ("rlhf_recipes", "conf", "recipes") for path in (ROOT / folder).rglob("*.*")]
    texts = {path: path.read_text(errors="replace") for path in files if path.suffix not in (".pyc", ".png")}
    assert len(texts) > 100
    assert not {path for path, text in texts.items() if secrets.VALUE.search(text)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "piece",
    [
        "sk-", "-sk-proj-", "-xai-", "secret=", "://a:", "eyJ", "-eyJ", "-----BEGIN ", "machine a login ", "bearer ",
        "~.", "9.", "a", "0f", "secret:\t", "-sk-proj-aaaaa", "github_pat_", "SG.", "glpat-",
    ],
)  # fmt: skip
def test_adversarial_text_takes_no_longer_than_any_other(piece):
    """A quadratic pattern would stand here for a quarter of an hour."""
    secrets.find(piece * (400_000 // len(piece)))


# ---- what stands in the environment


@pytest.fixture
def variable(no_secrets_here, monkeypatch):
    return monkeypatch.setenv


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "MY_TOKEN", "DB_PASSWORD", "CLIENT_SECRET", "GITLAB_PAT", "apikey"])
def test_a_value_of_the_environment(variable, name):
    value = "".join(random.Random(name).choices(string.hexdigits[:16], k=40))
    variable(name, value)
    assert secrets.find(f"x{value}y") == f"the value of the environment variable {name}"
    assert secrets.redact(f"outputs/x{value}y") == "outputs/x<secret>y"
    assert secrets.in_environment() == {value: name}
    variable(name, "another-value-of-it")
    assert secrets.find(value) is None and secrets.find("(another-value-of-it)")


def test_a_short_word_is_found_as_a_word_alone(variable):
    variable("DB_PASSWORD", "postgres")
    assert secrets.find("user postgres.") and secrets.redact("x-postgres") == "x-<secret>"
    assert secrets.find("postgresql") is None
    variable("DB_PASSWORD", "short")
    assert secrets.find("short") is None


def test_variables_that_lead_to_a_secret_hold_none(variable, tmp_path):
    (tmp_path / "key.pem").write_text("")
    variable("SSH_KEY", str(tmp_path / "key.pem"))
    variable("TOKEN_URL", "https://auth.example.org/token")
    variable("SECRET_NAME", "production")
    variable("TOKENIZERS_PARALLELISM", "definitely-not")
    variable("MONKEY", "definitely-not")
    assert secrets.in_environment() == {}


def test_a_secret_that_begins_like_a_path_and_one_of_many_lines(variable):
    variable("AWS_SECRET_ACCESS_KEY", "/wJalrXUtnFEMI/K7MDENG/bPxRfiCY")
    variable("DEPLOY_KEY", "a line of a key\n" * 400)  # longer than any file's name
    assert len(secrets.in_environment()) == 2
    assert secrets.find("x=/wJalrXUtnFEMI/K7MDENG/bPxRfiCY")


# ---- configs


PLANTED = "0123456789abcdef0123456789abcdef01234567"  # no shape of its own


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("trainer.hub_token=${oc.env:HF_TOKEN}", "trainer.hub_token: names a secret"),
        ("trainer.hub_token=anything", "trainer.hub_token: names a secret"),
        ("+trainer.api_key={a: b}", "trainer.api_key: names a secret"),
        ("+trainer.x.access_token.y=1", "trainer.x.access_token.y: names a secret"),
        ("run_name=x-${oc.env:WANDB_API_KEY}", "run_name: holds the value of the environment variable WANDB_API_KEY"),
        ("run_name=x-${oc.env:UNSET_KEY,none}", "run_name: holds the value of the environment variable UNSET_KEY"),
        (f"run_name=x-{PLANTED}", "run_name: holds the value of the environment variable WANDB_API_KEY"),
        (f"data.path={PLANTED}/x.jsonl", "data.path: holds the value of the environment variable WANDB_API_KEY"),
        ("hydra.run.dir=${oc.env:PLACE}", "hydra.run.dir: holds the value of the environment variable WANDB_API_KEY"),
        ("hydra.sweep.dir=${oc.env:PLACE}", "hydra.sweep.dir: holds the value of the environment variable WANDB"),
        (f"hydra.sweep.subdir={PLANTED}", "hydra.sweep.subdir: holds the value of the environment variable WANDB_API"),
        (f"+trainer.{PLANTED}=1", "a key of the config holds the value of the environment variable WANDB_API_KEY"),
        (f"trainer.report_to=[none,{TOKENS['hub']}]", "trainer.report_to: holds what looks like a token or a key"),
        ("data.path=https://me:" + "pa55word@host/x", "data.path: holds what looks like a token or a key"),
    ],
)
def test_no_config_is_composed_with_a_secret(compose, variable, override, says):
    variable("WANDB_API_KEY", PLANTED)
    variable("HF_TOKEN", TOKENS["hub"])
    variable("PLACE", f"outputs/{PLANTED}")
    with pytest.raises(ValueError) as caught:
        compose("dpo", override)
    message = str(caught.value)
    assert message.startswith(says) and "\n" not in message
    assert PLANTED not in message and TOKENS["hub"] not in message and "pa55word" not in message


def test_what_is_filled_in_later_is_looked_at_too(compose, variable):
    """PLACE names no secret: only what it holds is one."""
    variable("WANDB_API_KEY", PLANTED)
    variable("PLACE", f"pairs/{PLANTED}.jsonl")
    cfg = compose("dpo", "data=local", "data.path=${oc.env:PLACE}")
    with pytest.raises(ValueError, match=r"^data.path: holds the value of the environment variable WANDB_API_KEY, wh"):
        keys.check(cfg, "dpo")


@pytest.mark.slow
def test_a_file_may_not_hold_one_either(compose, variable, tmp_path):
    variable("WANDB_API_KEY", PLANTED)
    (tmp_path / "experiment").mkdir()
    for text, says in [
        ("trainer: {hub_token: '${oc.env:HF_TOKEN}'}", "trainer.hub_token: names a secret"),
        ("hydra: {sweeper: {params: {+trainer.api_key: '1,2'}}}", "hydra.sweeper.params.+trainer.api_key: names a s"),
        ("trainer: {run_name: '${oc.env:WANDB_API_KEY}'}", "trainer.run_name: holds the value of the environment v"),
    ]:
        (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}\n")
        with pytest.raises(ValueError) as caught:
            compose("dpo", f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine")
        assert str(caught.value).startswith(says)


def test_null_is_no_secret_and_names_of_variables_are_none(compose, no_secrets_here):
    keys.check(compose("dpo", "trainer.hub_token=null"), "dpo")
    cfg = compose("cai", "judge=server", "judge.model=m", "judge.api_key_env=OPENAI_API_KEY", "generator=local")
    keys.check(cfg, "cai")


# ---- what is printed


def test_a_recipe_leaves_no_secret_behind(run_recipe, variable, tmp_path):
    """Typed into places where Hydra itself would write it: names of folders, its own copy of the command."""
    env = {"WANDB_API_KEY": PLANTED}
    for overrides in (
        ["run_name=x-${oc.env:WANDB_API_KEY}"],
        ["hydra.output_subdir=.hydra", f"trainer.run_name={PLANTED}"],
        ["-m", f"run_name={PLANTED},b"],
    ):
        done = run_recipe("dpo", *overrides, f"model.id={TINY_ID}", cwd=tmp_path, env=env)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done
        assert PLANTED not in done.stdout + done.stderr and snapshot(tmp_path) == {}


BROKEN = """
import os, sys
from rlhf_recipes.recipes import dpo

def broken(node):
    raise RuntimeError("got %s \\x1b[2J" % os.environ["WANDB_API_KEY"])

dpo.load_pairs = broken
sys.argv = ["dpo"]
dpo.main()
"""


@pytest.mark.slow
def test_a_traceback_shows_none(clean_env, warm_python, tmp_path):
    (tmp_path / "warm_broken.py").write_text(BROKEN)
    env = merged(clean_env, {"WANDB_API_KEY": PLANTED})
    done = subprocess.run([warm_python, "-m", "warm_broken"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr and "got <secret> ␛[2J" in done.stderr, done.stderr
    assert PLANTED not in done.stderr and "\x1b" not in done.stderr


def test_a_refusal_is_one_line_without_control_characters(variable):
    variable("MY_TOKEN", PLANTED)
    with pytest.raises(ValueError) as caught:
        config.check_value(f"\x1b]0;pwned\x07x\n{PLANTED}", "a", int)
    line = as_refusal(caught.value, None)
    assert "\x1b" not in line and "\n" not in line and PLANTED not in line
    assert line.startswith("␛]0;pwned␇x <secret>=a: must be a whole number.")
