"""What is a secret: keys that name one, and the shapes of today's tokens. One pattern refuses, finds and redacts."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

# Keys whose value is a secret whatever it looks like; `api_key_env`, which names a variable, is none.
KEY = re.compile(
    r"(^|_)(hub_token|hf_token|access_token|auth_token|api_key|secret|secret_key|password|passwd)$", re.IGNORECASE
)
# Left edges keep `task-specific-fine-tuning` and `hf_baseline1` from being taken for tokens: what stands behind the
# prefix is long, in one piece, and where words could stand it holds a digit.
SHAPES = {
    "Hugging Face": r"hf_(?:oauth_|jwt_)?[A-Za-z0-9]{20,}|api_org_[A-Za-z0-9]{30,}",
    "OpenAI, Anthropic, OpenRouter": r"sk-(?:[a-z0-9]{1,12}-){0,3}(?=[A-Za-z0-9_]*[0-9])[A-Za-z0-9_]{20,}[\w-]*",
    "GitHub": r"gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{22,}",
    "GitLab": r"gl(?:pat|dt|rt|ptt|cbt)-[A-Za-z0-9_.-]{20,}",
    "AWS": r"(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Z0-9])",
    "Google": r"AIza[A-Za-z0-9_-]{30,}|ya29\.[A-Za-z0-9_-]{20,}|GOCSPX-[A-Za-z0-9_-]{20,}",
    "Slack": r"xox[abeoprs]-[A-Za-z0-9-]{10,}|xapp-[A-Za-z0-9-]{20,}",
    "Weights & Biases": r"wandb_v\d_[A-Za-z0-9_-]{20,}",
    "package indexes": r"npm_[A-Za-z0-9]{30,}|pypi-[A-Za-z0-9_-]{50,}",
    "other model services": r"(?:gsk|r8|xai|nvapi|pplx|tgp_v1|fw)[_-](?=[A-Za-z0-9_]*[0-9])[A-Za-z0-9_]{24,}[\w-]*",
    "JSON Web Token": r"eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]*",
}
# Secrets by what stands around them.
AROUND = {
    "private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "bearer": r"(?i:\bbearer )[A-Za-z0-9._~+/-]{20,}",
    "URL with a password": r"(?<=://)[^\s/:@\"'<>]+:[^\s/@\"'<>]+(?=@)",
    "named": r"(?i:api_?key|(?:access|secret)_?key|secret|passw(?:or)?d|(?:auth|access|hub|hf)_?token)[\"']?\s*[:=]\s*"
    r"[\"']?(?=[A-Za-z0-9+/_.~-]*[0-9])[A-Za-z0-9+/_.~-]{16,}",
}
VALUE = re.compile("|".join([*(rf"(?<![A-Za-z0-9_-])(?:{shape})" for shape in SHAPES.values()), *AROUND.values()]))
# Parts of a variable's name that say that its value is a secret.
NAMES = {"TOKEN", "KEY", "APIKEY", "SECRET", "PASSWORD", "PASSWD", "PASSPHRASE", "CREDENTIAL", "CREDENTIALS"}
SHORTEST = 8  # characters: what is shorter is a word that happens to stand in such a variable


def in_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Secret value -> name of the environment variable that holds it, those of places apart.

    Args:
        environment: None: that of this process.
    """
    environment = os.environ if environment is None else environment
    named = {name: value.strip() for name, value in environment.items() if NAMES & {*name.upper().split("_")}}
    return {
        value: name
        for name, value in named.items()
        if len(value) >= SHORTEST and not value.startswith(("/", "~", ".")) and not Path(value).exists()
    }


def find(text: str) -> str | None:
    """What a text holds that must not be shown, in words (never the secret itself); None where it holds nothing."""
    if VALUE.search(text):
        return "what looks like a token or a key"
    variable = next((name for value, name in in_environment().items() if value in text), None)
    return variable and f"the value of the environment variable {variable}"


def redact(text: str) -> str:
    """The text without anything that `find` finds."""
    for value in sorted(in_environment(), key=len, reverse=True):
        text = text.replace(value, "<secret>")
    return VALUE.sub("<secret>", text)
