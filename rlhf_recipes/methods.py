"""What differs from one training method to the next: a row each."""

from dataclasses import dataclass, replace
from importlib import import_module


@dataclass(frozen=True)
class Method:
    """A training method.

    Attributes:
        name: of its recipe.
        title: as a card says it.
        paper: its number on arXiv.
        trainer: the class that trains it.
        rows: what it trains on: pairs, labelled answers, demonstrations, or prompts.
        main: the held-out metric that a run is about.
        change: the held-out metric that says whether training helped; "": none does.
        reward: what `evaluate` ranks pairs by: the log_ratio to what the run started from, or average_logp.
        reference: whether training reads a frozen copy of what it started from.
        replies: the column of the tokenised rows with the training replies, behind their prompt unless that has a
            column of its own; "": the doctor does not look at them.
        logit_bytes: for each logit, where the trainer makes them all: bfloat16, float32, gradients, what the loss
            keeps. Such trainers keep the residual stream of a quantized base in float32. 0: they come in tiles.
        saturated: the reward margin at which a pair's weight in the gradient is under 0.001; None: at none. For
            -log sigmoid(margin) it is 1 - sigmoid(margin); KTO's sigmoid of either half has a slope of that size where
            both are at half the margin.
        saturating: values of `loss_type` of which that is so. The others take another quantity than the margin that is
            logged (sigmoid_norm its mean over tokens), go for a margin of their own (ipo), or have a term that no
            margin ends (sft).
        margin_beyond: the argument that this margin is counted from.
        against_displacement, against_length, against_noise: overrides that the doctor names beside its others.
        penalty: the argument that weighs the KL to the reference, of what samples.
    """

    name: str
    title: str
    paper: str = ""
    trainer: str = ""
    rows: str = ""
    main: str = ""
    change: str = ""
    reward: str = "log_ratio"
    reference: bool = False
    replies: str = ""
    logit_bytes: int = 0
    saturated: float | None = None
    saturating: tuple[str, ...] = ()
    margin_beyond: str = ""
    against_displacement: str = ""
    against_length: str = ""
    against_noise: str = ""
    penalty: str = ""

    @property
    def preferences(self) -> bool:
        """Whether it learns which answers are better."""
        return self.rows in ("pairs", "labelled answers")

    @property
    def samples(self) -> bool:
        """Whether it trains on its own answers to prompts."""
        return self.rows == "prompts"

    @property
    def cited(self) -> str:
        """The title with a link to the paper, in Markdown."""
        return f"{self.title} ([arXiv:{self.paper}]({self.url}))" if self.paper else self.title

    @property
    def url(self) -> str:
        return f"https://arxiv.org/abs/{self.paper}"


METHODS = {
    method.name: method
    for method in (
        Method(
            "sft", "Supervised fine-tuning", "2305.14314",
            trainer="trl.SFTTrainer",
            rows="demonstrations", main="perplexity", replies="input_ids",
        ),
        Method(
            "reward", "Bradley-Terry reward model", "2203.02155",
            trainer="rlhf_recipes.training.reward_trainer.SoftLabelRewardTrainer",
            rows="pairs", main="preference_accuracy", change="accuracy_change", saturated=7.0,
        ),
        Method(
            "dpo", "Direct Preference Optimization", "2305.18290",
            trainer="trl.DPOTrainer",
            rows="pairs", main="preference_accuracy", change="accuracy_change", reference=True, replies="chosen_ids",
            saturated=7.0, saturating=("sigmoid", "hinge", "robust", "aot", "aot_unpaired", "discopop"),
            against_displacement="trainer.loss_type=[sigmoid,sft]",
            against_length="trainer.loss_type=[sigmoid_norm]",
            against_noise="trainer.loss_type=[robust] trainer.label_smoothing=0.2",
        ),
        Method(
            "orpo", "Odds Ratio Preference Optimization", "2403.07691",
            trainer="rlhf_recipes.preference.ORPOTrainer",
            rows="pairs", main="preference_accuracy", change="accuracy_change", reward="average_logp",
            replies="chosen_ids", against_displacement="trainer.beta={half_beta:g}",
        ),
        Method(
            "simpo", "Simple Preference Optimization", "2405.14734",
            trainer="rlhf_recipes.preference.SimPOTrainer",
            rows="pairs", main="preference_accuracy", change="accuracy_change", reward="average_logp",
            replies="chosen_ids", saturated=7.0, saturating=("simpo", "sigmoid", "hinge"),
            margin_beyond="simpo_gamma",
            against_displacement="trainer.cpo_alpha=0.1", against_length="trainer.simpo_gamma lower",
        ),
        Method(
            "kto", "Kahneman-Tversky Optimization", "2402.01306",
            trainer="trl.KTOTrainer",
            rows="labelled answers", main="auroc", change="auroc_change", reference=True, replies="completion_ids",
            saturated=14.0, saturating=("kto", "apo_zero_unpaired"),
            against_displacement="trainer.desirable_weight=1.33",
        ),
        Method(
            "ppo", "Proximal Policy Optimization", "1707.06347",
            trainer="rlhf_recipes.ppo.PPOTrainer",
            rows="prompts", main="reward", change="reward_change", reference=True, penalty="kl_coef",
        ),
        Method(
            "rloo", "REINFORCE Leave-One-Out", "2402.14740",
            trainer="rlhf_recipes.ppo.RLOOTrainer",
            rows="prompts", main="reward", change="reward_change", reference=True, penalty="beta",
        ),
    )
}  # fmt: skip


# TRL's own trainers of a method: the config that `trainer._target_` names for one -> the recipe, and what then differs
# from its row. They are experimental there: a TRL without them has neither config nor trainer.
TRLS_OWN = {
    "trl.experimental.orpo.ORPOConfig": ("orpo", {"logit_bytes": 14, "replies": "chosen_input_ids",
                                                  "trainer": "rlhf_recipes.preference.trl_trainers.ORPOTrainer"}),
    "trl.experimental.cpo.CPOConfig": ("simpo", {"logit_bytes": 12, "replies": "chosen_input_ids",
                                                 "trainer": "rlhf_recipes.preference.trl_trainers.CPOTrainer"}),
}  # fmt: skip


def of(name: str | None, target: str = "") -> Method:
    """The row of a recipe; one that is not listed gets a row that claims nothing.

    Args:
        target: `trainer._target_`; where it names TRL's own config of the method, the row is that of TRL's trainer.
    """
    found = METHODS.get(name or "") or Method(name or "", name or "")
    recipe, others = TRLS_OWN.get(target, (None, {}))
    return replace(found, **others) if recipe == found.name else found


def trainer_class(name: str, target: str = "") -> type:
    """What trains it, imported; see `of`."""
    module, _, attribute = of(name, target).trainer.rpartition(".")
    return getattr(import_module(module), attribute)
