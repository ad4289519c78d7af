"""PPO with four roles on one backbone: `PPOConfig`, `PPOTrainer`. What is imported here is cheap."""


def __getattr__(name: str):
    # trl takes seconds to import; a recipe that is refused needs none of it
    if name == "PPOConfig":
        from rlhf_recipes.ppo.config import PPOConfig

        return PPOConfig
    if name == "PPOTrainer":
        from rlhf_recipes.ppo.trainer import PPOTrainer

        return PPOTrainer
    raise AttributeError(name)
