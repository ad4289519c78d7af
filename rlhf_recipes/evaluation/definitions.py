"""What every metric of an evaluation is called, how it is shown, which direction is better, and what it means."""

# key -> title, unit of display, which direction is better (None: neither by itself), definition
METRICS = {
    "win_rate": (
        "Win rate against the parent", "%", "higher",
        "Share of prompts on which the system's answer gets the higher reward than the parent's (a tie "
        "counts one half), or, where a judge was given, the judge's mean probability that it is better, "
        "both orders averaged. 50 % is a draw.",
    ),
    "judge_consistency": (
        "Judge: same winner in both orders", "%", "higher",
        "Share of the judged pairs of different answers whose winner stays the same when they change places. The "
        "rest flips: the judge prefers a place there, and the pair counts as a tie (Zheng et al. 2023, "
        "arXiv:2306.05685, section 3.4).",
    ),
    "judge_position_gap": (
        "Judge: gain of the first place", "%", None,
        "Mean probability of an answer in the first place less that of the same answer in the second; 0 is no bias.",
    ),
    "judge_ties": (
        "Judge: ties", "%", None,
        "Share of prompts that count one half: the same answer twice, a probability near one half, another winner in "
        "the other order, or no answer of the judge.",
    ),
    "judge_answers": (
        "Judge: answered", "%", "higher",
        "Share of the asked pairs on which the judge puts enough of its probability on the two letters, in every "
        "question. The rest counts as ties.",
    ),
    "win_rate_length_controlled": (
        "Win rate at equal length", "%", "higher",
        "The win rate that would remain if both answers had the same number of tokens: a logistic "
        "regression of the win on tanh(length difference / its standard deviation), read at difference "
        "0 (AlpacaEval 2, Dubois et al. 2024, arXiv:2404.04475).",
    ),
    "reward": (
        "Mean reward", "", "higher",
        "Mean score of the answers under the reward model of this evaluation; of an ensemble, the mean of its "
        "members' scores in standard deviations of their scores of the held-out replies.",
    ),
    "win_rate_worst_case": (
        "Win rate, worst case of the ensemble", "%", "higher",
        "The win rate by the smallest of the members' standardised scores of each answer (worst-case "
        "optimisation, Coste et al. 2023, arXiv:2310.02743).",
    ),
    "disputed_wins": (
        "Disputed wins", "%", "lower",
        "Share of the wins by the ensemble's mean that at least one of its members calls a loss.",
    ),
    "reward_worst_case": (
        "Worst-case reward", "", "higher",
        "Mean over answers of the smallest standardised score of the ensemble's members.",
    ),
    "reward_spread": (
        "Spread of the reward", "", None,
        "Mean over answers of the standard deviation of the members' standardised scores: how much the ensemble "
        "disagrees. It rises where answers leave what the members were trained on.",
    ),
    "proxy": (
        "Proxy reward", "", None,
        "Mean score of the answers under the reward model that this run was optimised against. Where it rises while "
        "the reward above falls, the proxy is over-optimised (Gao et al. 2022, arXiv:2210.10760).",
    ),
    "accuracy_log_ratio": (
        "Preference accuracy, log-ratio", "%", "higher",
        "Share of held-out pairs with a positive margin [log π(chosen) − log π_ref(chosen)] − [log "
        "π(rejected) − log π_ref(rejected)], the implicit reward of DPO (Rafailov et al. 2023, "
        "arXiv:2305.18290); a tie counts one half, so a system that is its own reference scores 50 %.",
    ),
    "accuracy_average_logp": (
        "Preference accuracy, per token", "%", "higher",
        "Share of held-out pairs in which the chosen answer has the higher average log-probability per "
        "token: the reference-free reward of SimPO (Meng et al. 2024, arXiv:2405.14734).",
    ),
    "kl_k1": (
        "KL to the parent, k1", "nats", None,
        "How far the system moved: mean over its own answers, sampled at temperature 1, of the sum over "
        "tokens of log π − log π_parent, in nats per answer. Unbiased, may be negative (Schulman 2020).",
    ),
    "kl_k3": (
        "KL to the parent, k3", "nats", None,
        "The same divergence by (r − 1) − log r with r = π_parent/π: unbiased and never negative (Schulman "
        "2020).",
    ),
    "tokens": (
        "Answer length", "tokens", None,
        "Mean number of generated tokens per answer.",
    ),
    "length_ratio": (
        "Length over the parent's", "×", None,
        "Tokens of all answers divided by the parent's on the same prompts.",
    ),
    "refusal_harmful": (
        "Refusals, harmful requests", "%", "higher",
        "Share of answers to harmful prompts that open with a refusal (a list of phrases in the first "
        "200 characters).",
    ),
    "refusal_harmless": (
        "Refusals, harmless requests", "%", "lower",
        "The same share on harmless prompts: needless refusals.",
    ),
    "distinct_2": (
        "Distinct bigrams", "%", "higher",
        "Different word pairs divided by all word pairs of an answer, averaged over answers (Li et al. "
        "2016, arXiv:1510.03055). Longer answers score lower by nature.",
    ),
    "repetition": (
        "Repetition", "%", "lower",
        "Share of answers in which some sequence of four words occurs four times or more.",
    ),
    "eos_rate": (
        "Finished answers", "%", "higher",
        "Share of answers that end by themselves rather than at the token limit.",
    ),
    "task_accuracy": (
        "Accuracy on tasks", "%", "higher",
        "Mean accuracy over the lm-eval tasks, each with the same weight; the difference to the parent's is the "
        "alignment tax (Ouyang et al. 2022, arXiv:2203.02155).",
    ),
    "perplexity": (
        "Perplexity, neutral text", "", "lower",
        "exp of the mean negative log-likelihood per token on neutral paragraphs: what fine-tuning cost "
        "in general.",
    ),
    "perplexity_ratio": (
        "Perplexity over the parent's", "×", "lower",
        "exp of the mean difference in negative log-likelihood per token on the same paragraphs.",
    ),
}  # fmt: skip
