"""PPO with four roles on one backbone, and TRL's RLOO on the same: `PPOConfig`, `PPOTrainer`, `RLOOConfig`,
`RLOOTrainer`. What is imported here is cheap."""

HOMES = {"PPOConfig": "config", "PPOTrainer": "trainer", "RLOOConfig": "rloo", "RLOOTrainer": "rloo"}


def __getattr__(name: str):
    # trl takes seconds to import; a recipe that is refused needs none of it
    if name not in HOMES:
        raise AttributeError(name)
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
