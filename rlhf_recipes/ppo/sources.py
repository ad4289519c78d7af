"""What `reward_funcs` names."""

from pathlib import Path

from rlhf_recipes import ensemble, places, run
from rlhf_recipes.config import import_function
from rlhf_recipes.errors import Refusal

MODEL_FILES = ("adapter/adapter_config.json", "adapter_config.json", "config.json")


def find_rewards(references: str | list[str]) -> list[str]:
    """`reward_funcs` as a list, with the members of an ensemble for its folder.

    Refused is what needs no model to be refused: a folder that is no reward model, no such function.

    Raises:
        Refusal: names the reference.
    """
    given = [references] if isinstance(references, str) else list(references)
    if not given:
        raise Refusal("reward_funcs: empty. Give a run of recipes/reward.py, or module:function.")
    found = expand(given)
    for reference in found:
        if Path(reference).is_dir():
            made_by = (run.read_result(Path(reference)) or {}).get("recipe", "reward")
            if made_by != "reward":
                raise Refusal(f"reward_funcs={reference}: is a run of {made_by}. Give one of recipes/reward.py.")
            if not any((Path(reference) / name).is_file() for name in MODEL_FILES):
                raise Refusal(f"reward_funcs={reference}: holds no model (is the run finished?). Give another.")
        elif ":" in reference:
            import_function(reference, "reward_funcs")
        elif not places.on_hub(reference, "reward_funcs", bare=True):
            raise Refusal(
                f"reward_funcs={reference}: no such folder. Give a run of recipes/reward.py, a folder with a model, "
                "module:function, or an id of the Hub."
            )
    return found


def expand(references: list[str]) -> list[str]:
    """The references, with the members of an ensemble for its folder.

    Raises:
        Refusal: a member is not finished.
    """
    return [
        each for one in references for each in (ensemble.members(one, "reward_funcs") if Path(one).is_dir() else [one])
    ]
