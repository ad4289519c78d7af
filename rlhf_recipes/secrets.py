"""What is a secret: keys that name one, and the shapes of today's tokens. One pattern refuses, finds and redacts."""

import functools
import os
import re
from collections.abc import Mapping

from rlhf_recipes.errors import first_line

# Keys whose value is a secret whatever it looks like; `api_key_env`, which names a variable, is none.
KEY = re.compile(
    r"(^|[_-])((hub|hf|access|auth|api|bearer|refresh|session)[_-]?token|(api|access|account|private|secret)[_-]?key"
    r"|secret|passw(or)?d|passphrase|credentials?)$|^(token|authorization)$",
    re.IGNORECASE,
)
# No letter or digit stands before them: `task-specific-fine-tuning` is no token. What follows the prefix is long, and
# holds a digit where words could stand. Looks ahead, and what must stand before another part, are short, or a long run
# of the prefix would take hours.
SHAPES = {
    "Hugging Face": r"hf_(?:oauth_|jwt_)?[A-Za-z0-9]{20,}|api_org_[A-Za-z0-9]{30,}",
    "OpenAI, Anthropic, OpenRouter": r"sk-(?:proj|svcacct|admin|ant|or)-(?=[\w-]{0,99}[0-9])[\w-]{20,}",
    "OpenAI, DeepSeek and others": r"c?sk-(?=[A-Za-z]{0,99}[0-9])[A-Za-z0-9]{20,}",
    "GitHub": r"gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{22,}",
    "GitLab": r"gl(?:pat|dt|rt|rtr|ptt|cbt|imt|ft|soat|agent|oas)-[A-Za-z0-9_.-]{20,}",
    "AWS": r"(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Z0-9])",
    "Google": r"AIza[A-Za-z0-9_-]{30,}|ya29\.[A-Za-z0-9_-]{20,}|GOCSPX-[A-Za-z0-9_-]{20,}",
    "Azure": r"[A-Za-z0-9]{52}JQQJ9[A-Za-z0-9]{12,}|[A-Za-z0-9_~.]{3}[0-9]Q~[A-Za-z0-9_~.-]{31,}",
    "Databricks": r"dapi[0-9a-f]{32}",
    "Slack": r"xox[abeoprs]-[A-Za-z0-9-]{10,}|xapp-[A-Za-z0-9-]{20,}",
    "Stripe": r"[sr]k_(?:live|test)_[A-Za-z0-9]{16,}|whsec_[A-Za-z0-9+/]{24,}",
    "Weights & Biases": r"wandb_v[0-9]_[A-Za-z0-9_-]{20,}",
    "package indexes": r"npm_[A-Za-z0-9]{30,}|pypi-[A-Za-z0-9_-]{50,}|dckr_pat_[A-Za-z0-9_-]{20,}",
    "NVIDIA, xAI, Together, Perplexity": r"(?:nvapi-|xai-|tgp_v1_|pplx-)(?=[\w-]{0,99}[0-9])[\w-]{30,}",
    "Groq, Replicate, Fireworks, RunPod": r"(?:gsk|r8|fw|rpa)_(?=[A-Za-z]{0,99}[0-9])[A-Za-z0-9]{22,}",
    "LangSmith, SendGrid": r"lsv2_[a-z]{2}_[0-9a-f]{32}|SG\.[\w-]{20,24}\.[\w-]{40,}",
    "JSON Web Token": r"eyJ[A-Za-z0-9_-]{10,4000}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]*",
}
# Secrets by what stands around them.
AROUND = {
    "private key": r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----",
    "bearer": r"(?i:\bbearer )(?=[A-Za-z._~+/-]{0,99}[0-9])[A-Za-z0-9._~+/-]{20,}",
    "URL with a password": r"(?<=://)[^\s/:@\"'<>]*:[^\s/@\"'<>]+(?=@)",
    ".netrc": r"\bmachine\s+\S+\s+login\s+\S+\s+password\s+\S+",
    "named": r"(?i:(?:api|access|account|secret)_?key|secret|passw(?:or)?d|(?:auth|access|api|hub|hf)_?token)"
    r"[\"']?\s*[:=]\s*[\"']?(?=[A-Za-z+/_.~-]{0,99}[0-9])[A-Za-z0-9+/_.~-]{16,}+(?!\()",
}
VALUE = re.compile("|".join([rf"(?<![A-Za-z0-9])(?:{'|'.join(SHAPES.values())})", *AROUND.values()]))
# In a text without any of these VALUE finds nothing, and they are found far sooner: first a word that is long enough.
CANDIDATE = re.compile(r"(?<![A-Za-z0-9_.~+/-])[A-Za-z0-9_.~+/-]{15,}|://|PRIVATE KEY|\blogin\s")
WORD, SIGNS = 15, ("://", "PRIVATE KEY", "login")
# Characters before and behind a candidate that may belong to the secret: its name, or the rest of a URL.
BEFORE, BEHIND = 64, 256
# Parts of a variable's name that say that its value is a secret; a last part that says it only leads to one.
NAMES = {"TOKEN", "KEY", "APIKEY", "SECRET", "PASSWORD", "PASSWD", "PASSPHRASE", "PAT", "CREDENTIAL", "CREDENTIALS"}
LEADS_TO_ONE = {"FILE", "PATH", "DIR", "SOCK", "URL", "URI", "ENDPOINT", "NAME", "ENV", "TYPE"}
TOKEN = "what looks like a token or a key"
SHORTEST = 8  # characters: what is shorter is a word that happens to stand in such a variable
LONG = 16  # from here on it is found inside a word, too


def names_one(variable: str) -> bool:
    """Whether the name of an environment variable says that it holds a secret."""
    parts = variable.upper().split("_")
    return bool(NAMES & {*parts}) and parts[-1] not in LEADS_TO_ONE


def in_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Secret value -> name of the environment variable that holds it; paths of what exists are none.

    Args:
        environment: None: that of this process.
    """
    given = os.environ if environment is None else environment
    return dict(_held(frozenset((name, value.strip()) for name, value in given.items() if names_one(name))))


def search(text: str) -> re.Match | None:
    """The first match of VALUE, by way of the places where one may be."""
    is_short = len(text) < WORD or len(max(text.split(), key=len, default="")) < WORD
    if is_short and not any(sign in text for sign in SIGNS):
        return None
    begin = end = 0  # of candidates so near to each other that they are searched at once
    for found in CANDIDATE.finditer(text):
        if found.start() - BEFORE > end:
            if match := VALUE.search(text, begin, end):
                return match
            begin = found.start() - BEFORE
        end = found.end() + BEHIND
    return VALUE.search(text, begin, end)


def find(text: str, held: dict[str, str] | None = None) -> str | None:
    """What a text holds that must not be shown, in words (never the secret itself); None where it holds nothing.

    Args:
        held: `in_environment`, for many texts; None: as it is.
    """
    if search(text):
        return TOKEN
    for value, name in (in_environment() if held is None else held).items():
        if value in text and _shape(value).search(text):
            return f"the value of the environment variable {name}"
    return None


def redact(text: str) -> str:
    """The text without anything that `find` finds."""
    for value in sorted(in_environment(), key=len, reverse=True):
        if value in text:
            text = _shape(value).sub("<secret>", text)
    return VALUE.sub("<secret>", text) if search(text) else text


def reason(error: Exception) -> str:
    """What a library says, for a sentence of ours: the first line, short, without secrets and its full stop."""
    return redact(first_line(error))[:200].rstrip(".")


@functools.lru_cache(maxsize=8)
def _held(variables: frozenset[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    return tuple(
        (value, name)
        for name, value in sorted(variables)
        if len(value) >= SHORTEST and not os.path.exists(os.path.expanduser(value))
    )


@functools.lru_cache(maxsize=64)
def _shape(value: str) -> re.Pattern:
    edges = ("", "") if len(value) >= LONG else ("(?<![A-Za-z0-9])", "(?![A-Za-z0-9])")
    return re.compile(re.escape(value).join(edges))
