"""Pairs without a reference: `ORPOConfig`, `ORPOTrainer`, `SimPOConfig`, `SimPOTrainer`. What is imported here is
cheap."""

HOMES = {
    "ORPOConfig": "configs",
    "SimPOConfig": "configs",
    "ORPOTrainer": "trainers",
    "SimPOTrainer": "trainers",
}


def __getattr__(name: str):
    # trl takes seconds to import; a recipe that is refused needs none of it
    if name not in HOMES:
        raise AttributeError(name)
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
