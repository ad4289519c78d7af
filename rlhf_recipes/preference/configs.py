"""Arguments of ORPO and SimPO: those of `trl.DPOConfig`, without what belongs to its losses and its reference."""

from dataclasses import dataclass, field

from trl import DPOConfig


@dataclass
class ORPOConfig(DPOConfig):
    """Arguments of `ORPOTrainer` beside those of `trl.DPOConfig` that rows, batches and training have in common.

    Args:
        beta: lambda, the weight of the odds-ratio term (Hong et al. 2024, arXiv:2403.07691, equation 6).
        disable_prompt_loss: whether the likelihood is that of the chosen answer alone. The name is that of the
            authors' code (github.com/xfactlab/orpo, src/orpo_trainer.py), which masks the prompt under it; False, the
            default there and all that TRL's ORPOTrainer does, adds the prompt's tokens to the mean.
        loss_type: orpo.
    """

    beta: float = field(default=0.1, metadata={"help": "Weight of the odds-ratio term, lambda."})
    disable_prompt_loss: bool = field(
        default=True, metadata={"help": "Whether the likelihood is that of the chosen answer alone."}
    )
    loss_type: str = field(default="orpo", metadata={"help": "orpo."})


@dataclass
class SimPOConfig(DPOConfig):
    """Arguments of `SimPOTrainer` beside those of `trl.DPOConfig` that rows, batches and training have in common.

    Args:
        beta: scale of the reward, the average log-probability (Meng et al. 2024, arXiv:2405.14734, equation 4).
        simpo_gamma: the margin gamma by which the chosen answer's reward should be above the other's (equation 6);
            absolute, not its ratio to beta.
        label_smoothing: share of the pairs whose label is taken to be wrong.
        cpo_alpha: weight of the chosen answer's negative log-likelihood; 0 in SimPO (above 0: CPO-SimPO).
        loss_type: simpo.
    """

    beta: float = field(default=2.0, metadata={"help": "Scale of the reward, the average log-probability."})
    simpo_gamma: float = field(default=0.5, metadata={"help": "Margin of the rewards, absolute."})
    label_smoothing: float = field(default=0.0, metadata={"help": "Share of pairs taken to be labelled wrongly."})
    cpo_alpha: float = field(default=0.0, metadata={"help": "Weight of the chosen answer's NLL."})
    loss_type: str = field(default="simpo", metadata={"help": "simpo."})
