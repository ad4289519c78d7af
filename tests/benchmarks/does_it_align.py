"""Does a method raise what is good, or only its proxy?

    python tests/benchmarks/does_it_align.py --folder runs                        # what is finished is not run again
    python tests/benchmarks/does_it_align.py --folder runs --worlds plain --methods dpo ppo --seeds 0
    python tests/benchmarks/does_it_align.py --table                              # of the cells that are there
    python tests/benchmarks/does_it_align.py --alarms

Gold is a rule on text (worlds.py). The embedded model learns pieces of replies (`recipes/sft.py`): the anchor. For a
world and a seed it answers prompts of the clinic, labellers rank its answers, and four reward models learn from
these labels (the cell `anchor`). Each method then trains on the same labels, by its own recipe; the rounds label their
share of them anew, on answers of the policy that they have. All are measured on prompts that nobody trained on, at
each checkpoint: gold, proxies, KL to the anchor. A finished cell is one file under does_it_align/.
"""

import argparse
import json
import os
import random
import re
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import doctor_runs  # noqa: E402
from worlds import WORLDS, World  # noqa: E402

CELLS = HERE / "does_it_align"
ANCHOR_RUN = "outputs/sft/anchor"
PROMPTS, HELD_OUT, WORDS = 60, 36, 20  # train and unseen prompts, of at most so many words
TESTED = 24  # unseen prompts whose labels the reward models are tested by
SAMPLES, TOKENS = 8, 24  # answers of a prompt, which labellers rank; tokens of an answer
ASKED = 1  # answers that a policy is measured by for each unseen prompt
BEST_OF = 8
ROUNDS = 3
SHORT = 16  # words of what the anchor learns to answer, at most
LOCAL = [
    "quantization=none", "model.dtype=float32", "data=local", "preflight.measure=false", "trainer.report_to=none",
    "trainer.per_device_train_batch_size=4", "trainer.gradient_accumulation_steps=2",
]  # fmt: skip
ANCHOR = ["trainer.num_train_epochs=2", "trainer.learning_rate=5e-4", "trainer.save_strategy=no", "data.eval_size=8"]
REWARD = [
    "reward=ensemble", "trainer.learning_rate=5e-4", "trainer.num_train_epochs=2", "trainer.save_strategy=no",
    "data.eval_size=64", "data.bootstrap=null", "hydra.mode=RUN",
]  # fmt: skip
STEPS, EVERY = 12, 6
# A rate for all, the anchor's: at those of conf/experiment a policy does not leave the anchor in so few steps.
POLICY = [
    "trainer.learning_rate=5e-4", "trainer.save_total_limit=null", "trainer.logging_steps=1", "data.eval_size=8",
]  # fmt: skip
OF_LABELS = [*POLICY, f"trainer.max_steps={STEPS}", f"trainer.save_steps={EVERY}"]
# 16 answers a step: as much work in half the steps.
SAMPLED = [
    *POLICY, f"trainer.max_steps={STEPS // 2}", f"trainer.save_steps={EVERY // 2}",
    f"trainer.max_completion_length={TOKENS}", "trainer.per_device_train_batch_size=8",
]  # fmt: skip
PPO = [*SAMPLED, "trainer.num_mini_batches=1"]
OVERDONE = ["trainer.learning_rate=3e-3", "trainer.max_steps=24", "trainer.save_steps=6"]
UNBOUND = [
    *PPO, *OVERDONE, "trainer.kl_coef=0.0", "trainer.kl_brake=null", "trainer.entropy_floor=null",
    "trainer.gradient_accumulation_steps=1",
]  # fmt: skip
# A third of the rate and twice as many checkpoints: gold can fall between two of them. TRL's RLOO logs no KL with a
# beta of 0.
SLOWLY = ["trainer.learning_rate=1e-3", "trainer.save_steps=3"]
# Recipe and overrides of each method.
METHODS = {
    "anchor": ("reward", REWARD),
    "dpo": ("dpo", OF_LABELS),
    "ppo": ("ppo", PPO),
    "rloo": ("rloo", [*SAMPLED, "trainer.num_generations=4"]),
    "best_of_n": ("", []),
    "rounds_of_dpo": ("dpo", OF_LABELS),
    "ppo_worst_of_four": ("ppo", [*PPO, "trainer.reward_ensemble=min"]),
    "ppo_mean_of_four": ("ppo", [*PPO, "trainer.reward_ensemble=mean"]),
    "sft": ("sft", OF_LABELS),
    "kto": ("kto", OF_LABELS),
    "simpo": ("simpo", OF_LABELS),
    "orpo": ("orpo", OF_LABELS),
    "dpo_overdone": ("dpo", [*OF_LABELS, *OVERDONE, "trainer.beta=0.02"]),
    "ppo_overdone": ("ppo", UNBOUND),
    "ppo_courteous_overdone": ("ppo", [*UNBOUND, "reward_funcs=worlds:courteous"]),
    "ppo_one_word_overdone": ("ppo", [*UNBOUND, "reward_funcs=doctor_runs:same_word"]),
    "ppo_slowly_overdone": ("ppo", [*UNBOUND, *SLOWLY]),
    "ppo_courteous_slowly_overdone": ("ppo", [*UNBOUND, *SLOWLY, "reward_funcs=worlds:courteous"]),
    "rloo_slowly_overdone": ("rloo", [*SAMPLED, *OVERDONE, *SLOWLY, "trainer.num_generations=4", "trainer.beta=1e-4",
                             "trainer.gradient_accumulation_steps=1"]),
    "rounds_of_dpo_good": ("dpo", OF_LABELS),
    "rounds_of_dpo_flipped": ("dpo", OF_LABELS),
    "rounds_of_dpo_left": ("dpo", OF_LABELS),
}  # fmt: skip
# Of the labels from round two on, the share that a labeller turns round; who takes the left of two random places, a
# half. The good one is that of `rounds_of_dpo`, made beside the others: where a processor rounds in another way,
# answers and labels become others, and these three shall have their first round in common.
TURNED = {"rounds_of_dpo_good": 0.0, "rounds_of_dpo_flipped": 0.3, "rounds_of_dpo_left": 0.5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="of the runs, which can be removed later")
    parser.add_argument("--worlds", nargs="+", choices=WORLDS, default=list(WORLDS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="print the table of the cells that are there")
    parser.add_argument("--plot", type=Path, help="draw them here")
    parser.add_argument("--alarms", action="store_true", help="print what the alarms said, beside gold")
    options = parser.parse_args()
    if options.table or options.plot or options.alarms:
        import align_table

        align_table.show(CELLS, options.table, options.plot, options.alarms)
        return
    from rlhf_recipes import run

    run.environment()
    options.folder.mkdir(parents=True, exist_ok=True)
    os.chdir(options.folder)
    CELLS.mkdir(exist_ok=True)
    for seed in options.seeds:
        for method in ["anchor", *(each for each in options.methods if each != "anchor")]:
            for name in options.worlds:
                if not cell_file(name, method, seed).exists():
                    try:
                        run_cell(WORLDS[name], method, seed)
                    except RuntimeError as error:  # the others need not wait for it
                        print(f"no cell {name} {method} {seed}: {error}", flush=True)


def cell_file(world: str, method: str, seed: int) -> Path:
    return CELLS / f"{world}-{method}-{seed}.json"


def run_cell(world: World, method: str, seed: int) -> None:
    began = time.monotonic()
    if not Path(ANCHOR_RUN, "result.json").exists():
        train_anchor()
        began = time.monotonic()
    cell = {"anchor": make_labels, "best_of_n": best_of_n}.get(method, rounds if "rounds" in method else one_run)
    found = {"world": world.name, "method": method, "seed": seed, **cell(world, method, seed)}
    found["seconds"] = round(time.monotonic() - began)
    cell_file(world.name, method, seed).write_text(json.dumps(found) + "\n", encoding="utf-8")
    last = found["points"][-1]
    shown = {key: f"{mean(last[key]):.3f}" for key in ("kl", "gold", "proxy", "tokens") if key in last}
    print(f"cell {world.name} {method} {seed}: {found['seconds']} s; at its end {shown}", flush=True)


# ---- What a cell is made of


def train_anchor() -> None:
    """SFT on pieces of the clinic's demonstrations, two of each: some ask, some tell, some end too soon."""
    import rlhf_recipes

    lines = (Path(rlhf_recipes.__file__).parent / "assets/clinic/demonstrations.jsonl").read_text().splitlines()
    rows, dice = [], random.Random(0)
    for row in map(json.loads, lines):
        found = pieces(row["completion"])
        for text in dice.sample(found, min(2, len(found))):
            rows.append({"prompt": row["prompt"], "completion": text, "split": row["split"]})
    Path("anchor.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe("sft", ANCHOR_RUN, [*LOCAL, "data.path=anchor.jsonl", *ANCHOR])


def pieces(reply: str | list) -> list[str]:
    """From each sentence of a reply as many as come to SHORT words; sentences that are longer left out."""
    text, found = reply if isinstance(reply, str) else reply[0]["content"], []
    sentences = re.split(r"(?<=[.!?]) ", text)
    for start in range(len(sentences)):
        kept = ""
        for sentence in sentences[start:]:
            if len(f"{kept} {sentence}".split()) > SHORT:
                break
            kept = f"{kept} {sentence}".strip()
        found += [kept] if kept else []
    return found


def make_labels(world: World, method: str, seed: int) -> dict:
    """The anchor's answers, labels on them, two reward models of these labels, and the anchor itself, measured."""
    train, test = prompts()
    rows = []
    for split, asked_here in (("train", train), ("test", test[:TESTED])):
        texts = sample(ANCHOR_RUN, asked_here, SAMPLES, 2 * seed + (split == "test"))
        rows += [row | {"split": split} for row in label(world, asked_here, texts, seed)]
    write_rows(f"pairs_{world.name}_{seed}.jsonl", rows)
    right = [
        world.gold(asked(row), said(row, "chosen")) > world.gold(asked(row), said(row, "rejected"))
        for row in rows
        if row["split"] == "train"
    ]
    models = reward_models(world, seed, 2)
    points = measured(world, seed, [(0, ANCHOR_RUN)], models)
    return {"labels": len(right), "agree_with_gold": mean(right), "accuracies": accuracies(models), "points": points}


def one_run(world: World, method: str, seed: int) -> dict:
    kind, overrides = METHODS[method]
    several = "four" in method
    proxies = reward_models(world, seed, 4 if several else 2)
    given = [*LOCAL, f"data.path=pairs_{world.name}_{seed}.jsonl", f"model.adapter={ANCHOR_RUN}", *overrides]
    if kind in ("ppo", "rloo") and not any(each.startswith("reward_funcs=") for each in overrides):
        given.append(f"reward_funcs={proxies[0].parent if several else proxies[0]}")
    run = recipe(kind, f"outputs/{kind}/{method}_{world.name}_{seed}", [*given, f"trainer.seed={seed}"])
    systems = [(0, ANCHOR_RUN)] * several + checkpoints(run)  # whose proxy is another one's than the anchor's cell has
    points = measured(world, seed, systems, proxies, worst="worst" in method)
    for point in points[several:-1]:
        point["doctor"] = brief(doctor_runs.examined(Path(run), point["step"]))
    points[-1]["doctor"] = brief(result(run)["doctor"])
    return {"points": points, "accuracies": accuracies(proxies if several else proxies[:1])}


def rounds(world: World, method: str, seed: int) -> dict:
    """Rounds of: answer, label a share of the budget, DPO from the last policy, which is its reference."""
    kind, overrides = METHODS[method]
    train, policy, kept = prompts()[0], ANCHOR_RUN, []
    share, proxies = len(train) // ROUNDS, reward_models(world, seed, 2)
    tests = [json.loads(line) for line in Path(f"pairs_{world.name}_{seed}.jsonl").read_text().splitlines()]
    for turn in range(ROUNDS):
        asked_now, drawn = train[turn * share : (turn + 1) * share], 100 * (turn + 1) + seed
        rows = label(world, asked_now, sample(policy, asked_now, SAMPLES, drawn), drawn)
        if turn:
            rows = turned_round(rows, TURNED.get(method, 0.0), drawn)
        rows = [row | {"split": "train"} for row in rows] + [row for row in tests if row["split"] == "test"]
        name = f"{method if turn else 'rounds_of_dpo'}_{world.name}_{seed}_{turn}"  # the first round is one for all
        write_rows(f"pairs_{name}.jsonl", rows)
        given = [*LOCAL, f"data.path=pairs_{name}.jsonl", f"model.adapter={policy}", *overrides]
        given += [f"trainer.seed={seed}", f"trainer.max_steps={STEPS // ROUNDS}"]
        policy = recipe(kind, f"outputs/{kind}/{name}", given)
        kept.append(((turn + 1) * STEPS // ROUNDS, policy))
    points = measured(world, seed, kept, proxies)
    for point, (_, run) in zip(points, kept, strict=True):
        point["doctor"] = brief(result(run)["doctor"])
    return {"points": points, "accuracies": accuracies(proxies[:1])}


def best_of_n(world: World, method: str, seed: int) -> dict:
    """The anchor's answers, the best of n of each prompt by one reward model."""
    import numpy as np

    from rlhf_recipes.audit import pressure

    test = prompts()[1]
    texts = sample(ANCHOR_RUN, test, BEST_OF, 1000 + seed)
    judge = reward_models(world, seed, 1)
    middle, deviation = standard(judge[0])
    proxy = (np.reshape(scored(judge, test, texts)[0], (len(test), BEST_OF)) - middle) / deviation
    golds = [[world.gold(asked(row), text) for text in own] for row, own in zip(test, texts, strict=True)]
    ns = [n for n in (1, 2, 4, 8) if n <= BEST_OF]
    golds_PK, proxies_PK = pressure.best_of_n(proxy, golds, ns)
    points = [
        {
            "step": n if n > 1 else 0,
            "kl": [pressure.kl_best_of_n(n)] * len(test),
            "gold": rounded(golds_PK[:, k]),
            "proxy": rounded(proxies_PK[:, k]),
        }
        for k, n in enumerate(ns)
    ]
    return {"points": points, "accuracies": accuracies(judge)}


# ---- Measuring


def measured(
    world: World, seed: int, systems: list[tuple[int, str]], judges: list[Path], worst: bool = False
) -> list[dict]:
    """A point for each policy: `step` and, of each unseen prompt, the mean over its answers of `kl`, `gold`, `proxy`,
    `other`, `tokens`, `repetition` and `eos_rate`.

    Args:
        judges: two reward models, the proxy and who else evaluates; or an ensemble, whose mean (or worst) is the proxy
            and whose mean evaluates. All in deviations of their rewards of held-out replies.
    """
    import numpy as np

    from rlhf_recipes import adapters, inference, text_metrics

    cfg, test = settings(), prompts()[1]
    asked_twice = [row["prompt"] for row in test for _ in range(ASKED)]
    tokenizer, how = load_tokenizer(), inference.Sampling(TOKENS, 1.0, 7000 + seed)
    runs = [
        adapters.System(f"step {step}", str(adapter_of(run)), reference=str(adapter_of(ANCHOR_RUN)))
        for step, run in systems
    ]
    policies, answers = adapters.Policies(cfg.model, cfg.quantization, runs, fast=True), []
    for run in runs:
        said = policies.generate(run.adapter, tokenizer, asked_twice, how, f"{run.name}: answers")
        encoded = [(answer["ids"], answer["start"]) for answer in said]
        own = policies.token_logps(run.adapter, tokenizer, encoded, f"{run.name}: KL")
        anchor = policies.token_logps(run.reference, tokenizer, encoded, f"{run.name}: KL, anchor")
        for answer, p, q in zip(said, own, anchor, strict=True):
            answer["kl"] = inference.kl_terms(p, q)[0]
        answers.append(said)
    del policies
    texts = [[answer["text"] for answer in said] for said in answers]
    columns = [[text for point in texts for text in point[n * ASKED : (n + 1) * ASKED]] for n in range(len(test))]
    scores_MPR = np.reshape(scored(judges, test, columns), (len(judges), len(test), len(runs), ASKED))
    scales = [standard(each) for each in judges]
    unit_MPR = np.array([(scores - m) / sd for scores, (m, sd) in zip(scores_MPR, scales, strict=True)])
    if len(judges) == 2:
        proxy_PR, other_PR = unit_MPR
    else:
        proxy_PR, other_PR = unit_MPR.min(0) if worst else unit_MPR.mean(0), unit_MPR.mean(0)
    points = []
    for k, (step, _) in enumerate(systems):
        golds = [world.gold(asked(test[i // ASKED]), text) for i, text in enumerate(texts[k])]
        by_prompt = {
            "kl": [answer["kl"] for answer in answers[k]],
            "gold": golds,
            "tokens": [answer["tokens"] for answer in answers[k]],
            "repetition": [text_metrics.repeats_phrase(text) for text in texts[k]],
            "eos_rate": [answer["finished"] for answer in answers[k]],
        }
        point = {key: rounded(np.reshape(values, (-1, ASKED)).mean(1)) for key, values in by_prompt.items()}
        means = {"proxy": rounded(proxy_PR[:, k].mean(1)), "other": rounded(other_PR[:, k].mean(1))}
        points.append({"step": step, **point, **means, "said": texts[k][:2]})
    return points


def scored(reward_models: list[Path], rows: list[dict], texts: list[list[str]]) -> list[list[float]]:
    """Rewards by each of the models of the answers to each prompt, one after another."""
    from rlhf_recipes import adapters, inference

    cfg, tokenizer = settings(), load_tokenizer()
    folders = [Path(adapter_of(each)) for each in reward_models]
    several = adapters.RewardModels(cfg.model, cfg.quantization, folders, fast=True)
    conversations = [row["prompt"] + [reply(text)] for row, own in zip(rows, texts, strict=True) for text in own]
    return [
        inference.rewards(several.using(each), tokenizer, conversations, f"rewards of {each.parent.name}")
        for each in folders
    ]


def standard(reward_model: Path) -> tuple[float, float]:
    """Mean and deviation of its rewards of held-out replies."""
    metrics = json.loads((reward_model / "result.json").read_text())["metrics"]
    return metrics["mean_reward"]["value"], metrics["sd_reward"]["value"] or 1.0


def sample(run: str, rows: list[dict], count: int, seed: int) -> list[list[str]]:
    """`count` answers of a policy to each prompt."""
    from rlhf_recipes import adapters, inference

    cfg, adapter = settings(), str(adapter_of(run))
    kept = Path(f"answers_{seed}_{len(rows)}_{count}.json")
    if run == ANCHOR_RUN and kept.exists():  # of the other world
        return json.loads(kept.read_text())
    policies = adapters.Policies(cfg.model, cfg.quantization, [adapters.System("policy", adapter)], fast=True)
    asked_often = [row["prompt"] for row in rows for _ in range(count)]
    how = inference.Sampling(TOKENS, 1.0, seed)
    found = policies.generate(adapter, load_tokenizer(), asked_often, how, f"answers of {run}")
    texts = [[answer["text"] for answer in found[n * count : (n + 1) * count]] for n in range(len(rows))]
    if run == ANCHOR_RUN:
        kept.write_text(json.dumps(texts))
    return texts


def label(world: World, rows: list[dict], texts: list[list[str]], seed: int) -> list[dict]:
    """Of each prompt's answers, as the world's labellers rank them, the best against the worst, and the second best
    against the second worst; equal or empty answers make no pair."""
    dice, pairs = random.Random(seed), []
    for row, own in zip(rows, texts, strict=True):
        ranked = world.ranked(asked(row), own, dice)
        for better, worse in zip(ranked[:2], ranked[:-3:-1], strict=True):
            if better and worse and better != worse:
                pairs.append({"prompt": row["prompt"], "chosen": [reply(better)], "rejected": [reply(worse)]})
    return pairs


def turned_round(pairs: list[dict], share: float, seed: int) -> list[dict]:
    """Pairs of which about `share` have the rejected reply for the chosen one."""
    dice = random.Random(seed)
    return [
        row | {"chosen": row["rejected"], "rejected": row["chosen"]} if dice.random() < share else row for row in pairs
    ]


# ---- Small things


def prompts() -> tuple[list[dict], list[dict]]:
    """Train and unseen prompts, of few words."""
    import hydra

    from rlhf_recipes import config
    from rlhf_recipes.data.load import load_prompts

    with hydra.initialize_config_dir(str(config.CONF), version_base="1.3"):
        splits = load_prompts(hydra.compose("evaluate").data)
    short = [[row for row in rows if len(asked(row).split()) <= WORDS] for rows in (splits.train, splits.test)]
    return short[0][:PROMPTS], short[1][:HELD_OUT]


def settings():
    import hydra

    from rlhf_recipes import config

    with hydra.initialize_config_dir(str(config.CONF), version_base="1.3"):
        return hydra.compose("evaluate", overrides=["quantization=none", "model.dtype=float32"])


def load_tokenizer():
    from rlhf_recipes import models

    return models.load_tokenizer(settings().model)


def recipe(name: str, folder: str, overrides: list[str]) -> str:
    """Its folder, after a recipe ran in a fork that has the libraries; one that has finished is not run again."""
    from rlhf_recipes.launch import forks

    if not Path(folder, "result.json").exists():
        began = time.monotonic()
        module, arguments = f"rlhf_recipes.recipes.{name}", [*overrides, f"hydra.run.dir={folder}"]
        if status := forks.start(module, arguments, {**os.environ}).wait():
            raise RuntimeError(f"recipes/{name}.py, {folder}: exit status {status}")
        print(f"{folder}: {time.monotonic() - began:.0f} s", flush=True)
    return folder


def result(run: str | Path) -> dict:
    return json.loads(Path(run, "result.json").read_text(encoding="utf-8"))


def reward_models(world: World, seed: int, count: int) -> list[Path]:
    """The first members of the world's ensemble, trained where they are not."""
    home = f"outputs/reward/{world.name}_{seed}"
    given = [*LOCAL, f"data.path=pairs_{world.name}_{seed}.jsonl", *REWARD]
    return [Path(recipe("reward", f"{home}/member_{n}", [*given, f"reward.member={n}"])) for n in range(count)]


def brief(report: dict) -> list[dict]:
    """A doctor's findings, without the advice."""
    return [{key: finding[key] for key in ("rule", "level", "saw")} for finding in report["findings"]]


def accuracies(models: list[Path]) -> list[dict]:
    """Of each on held-out labels: `value`, `low`, `high`, `n`."""
    return [result(each)["metrics"]["preference_accuracy"] for each in models]


def checkpoints(run: str) -> list[tuple[int, str]]:
    found = {int(each.name.rpartition("-")[2]): str(each) for each in Path(run, "checkpoints").glob("checkpoint-*")}
    return sorted(found.items())


def adapter_of(run: str | Path) -> Path:
    return Path(run, "adapter") if Path(run, "adapter").is_dir() else Path(run)


def write_rows(file: str, rows: list[dict]) -> None:
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def asked(row: dict) -> str:
    return row["prompt"][-1]["content"]


def said(row: dict, side: str) -> str:
    return row[side][-1]["content"]


def reply(text: str) -> dict:
    return {"role": "assistant", "content": text}


def rounded(values) -> list[float]:
    return [round(float(value), 4) for value in values]


def mean(values) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
