"""Twelve secrets are planted around a pipeline: no byte that it writes, stages or prints holds one of them."""

import json

import pytest
from conftest import write_pairs

HEX = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b"
IN_ENVIRONMENT = {
    "HF_TOKEN": "hf_" + "QwErTyUiOpAsDfGhJkLzXcVbNm" + "abcdefgh",
    "WANDB_API_KEY": HEX,
    "OPENAI_API_KEY": "sk-proj-" + "a1B2c3D4e5" * 4,
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYplanted",
    "CLINIC_PASSWORD": "correct-horse-battery",
}
IN_CONFIG = {
    "literal": "hf_" + "LiTeRaLlYaToKeNiNaCoNfIg" + "abcdef",
    "url": "postgres-pass-word-1",
    "bearer": "gho_" + "b7" * 18,
}
IN_DATA = {
    "chosen": "ghp_" + "c8" * 18,
    "rejected": "AKIA" + "PLANTEDPLANTED12",
    "prompt": "xoxb-123456789012-planted-in-a-prompt",
    "family": "glpat-" + "d9" * 10,
}
PLANTED = [*IN_ENVIRONMENT.values(), *IN_CONFIG.values(), *IN_DATA.values()]
REFUSED = [
    ("dpo", f"trainer.hub_token={IN_CONFIG['literal']}"),
    ("dpo", "trainer.hub_token=${oc.env:HF_TOKEN}"),
    ("dpo", "run_name=x-${oc.env:WANDB_API_KEY}"),
    ("dpo", "hydra.run.dir=outputs/${oc.env:CLINIC_PASSWORD}"),
    ("dpo", f"data.path={HEX}"),
    ("cai", f"generator.base_url=http://ada:{IN_CONFIG['url']}@localhost:1/v1"),
    ("evaluate", f"runs=[{IN_CONFIG['bearer']}]"),
    ("pipeline", f"stages=[{{name:a,recipe:sft,overrides:['run_name={IN_CONFIG['bearer']}']}}]"),
]


def found(text):
    """The planted secrets in a text, by their last characters."""
    return [secret[-8:] for secret in PLANTED if secret in text]


def search(folder):
    """The files below a folder, their names included, that hold one."""
    texts = {path: str(path) + (path.read_bytes().decode("latin-1") if path.is_file() else "") for path in folder}
    return {str(path): found(text) for path, text in texts.items() if found(text)}


def test_there_are_twelve():
    assert len(set(PLANTED)) == 12


@pytest.mark.parametrize(("recipe", "override"), REFUSED)
def test_a_config_that_leads_to_one(run_recipe, tmp_path, recipe, override):
    more = ["generator=server", "generator.model=m"] if "base_url" in override else []
    done = run_recipe(recipe, *more, override, cwd=tmp_path, env=IN_ENVIRONMENT)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done
    assert not found(done.stdout + done.stderr) and not search(tmp_path.rglob("*")), done


@pytest.mark.slow
def test_a_pipeline(run_recipe, tiny_overrides, tmp_path):
    path = write_pairs(tmp_path / "rows.jsonl", count=30)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row, (column, secret) in zip(rows, IN_DATA.items(), strict=False):
        row[column] = f"{row.get(column, '')} here it is: {secret}."
    rows[4]["prompt"] += f" My password is {IN_ENVIRONMENT['CLINIC_PASSWORD']}."
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = [
        *tiny_overrides, "quantization=none", "data=local", f"data.path={path}", "data.test_size=4",
        "data.columns.family=family",
    ]  # fmt: skip
    stages = [
        ("sft", "sft"),
        ("reward", "reward"),
        ("dpo", "dpo", "model.adapter={dir}/sft"),
        ("ppo", "ppo", "reward_funcs={dir}/reward", "trainer.max_completion_length=6"),
        ("evaluate", "evaluate", "runs=[{dir}/dpo]", "prompts=4", "max_new_tokens=4"),
        ("publish", "publish", "run={dir}/dpo", "folder={dir}/publish/files", "force=true", "license=mit"),
    ]
    entries = [f"{{name:{n},recipe:{r},overrides:[{','.join(map(repr, o))}]}}" for n, r, *o in stages]
    done = run_recipe(
        "pipeline", f"shared=[{','.join(map(repr, shared))}]", f"stages=[{','.join(entries)}]",
        "preflight.measure=false", cwd=tmp_path, env=IN_ENVIRONMENT,
    )  # fmt: skip
    written = tmp_path / "outputs" / "pipeline" / "main"
    assert (written / "publish" / "files" / "published.json").is_file(), done
    report = json.loads((written / "dpo" / "result.json").read_text())["counts"]
    assert report["dropped"]["secret"] == 5 and report["examples"]["secret"] == [f"rows.jsonl:{n}" for n in (1, 2, 3)]
    assert not found(done.stdout + done.stderr), done
    assert search((tmp_path / "outputs").rglob("*")) == {}
