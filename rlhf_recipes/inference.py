"""Forward passes: log-probabilities of answers, scores of a reward model, sampled answers and their KL.

Several processes share the batches, which are those of one process, and each has all results.

Where a model allows it (`packing.allow`), what sequences begin with goes through it once: the two answers of a pair,
the samples of one prompt.

Shapes: B sequences in a batch, T tokens, K completion tokens, V vocabulary; P rows of L tokens, of several sequences,
and N tokens of them that are predicted. Log-probabilities are in nats.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rlhf_recipes import memory, progress, ranks, sharding
from rlhf_recipes.data.template import encode_prompt, render
from rlhf_recipes.data.tokens import common_prefix

Message = dict[str, str]

# Float32 logits of one batch stay below this: a CPU is busy with few rows, a GPU wants many.
LOGITS_BYTES, LOGITS_BYTES_ON_CPU = 2**29, 2**27
# Padded tokens of one batch of a forward without logits.
BATCH_TOKENS = 8192
# Of a GPU's memory beside the weights, for each batch of these sizes: an 8B takes 1.3 GB for the logits, counting what
# is computed of them, and 2.6 GB for activations, keys and values of that many tokens; a 70B takes 6 GB.
BATCH_ROOM = 8 * 2**30
# Sequences that share so many tokens make a row, two of any length, more up to so many tokens: attention pays for each
# token of a row with all before it, seen or not.
STEM_TOKENS, ROW_TOKENS = 16, 1024
# Rows of several sequences that are shorter than so much of the longest begin another batch, once this one has such a
# part of the tokens that it may have: padding is computed, too.
SHORTER, FILLED = 0.85, 1 / 16
WHOLE = slice(None)


def completion_logps(model, tokenizer, conversations: list[tuple[list[Message], list[Message]]], what: str):
    """Log-probability of each completion given its prompt, under the chat template.

    Returns:
        A list of (sum over completion tokens in nats, number of completion tokens) in the order given. The completion
        starts where the rendered prompt and the rendered whole diverge, as in TRL's DPOTrainer.
    """
    return logp_sums(model, tokenizer.pad_token_id, [encode(tokenizer, *c) for c in conversations], what)


def text_logps(model, tokenizer, texts: list[str], what: str):
    """The same for plain texts: every token but the first is predicted."""
    return logp_sums(model, tokenizer.pad_token_id, [(tokenizer(t)["input_ids"], 1) for t in texts], what)


def token_logps(model, pad_id: int, encoded: list[tuple[list[int], int]], what: str) -> list:
    """Log-probabilities of the tokens from `start` on, a float64 tensor of K values for each (token ids, start)."""
    vocabulary = model.get_output_embeddings().weight.shape[0]
    results: list[Any] = [None] * len(encoded)
    with measuring(model):
        rows = _rows(model, [ids for ids, _ in encoded])
        for _, batch in _batches(encoded, what, model, vocabulary, rows):
            members = [i for row in batch for i in row]
            if rows:
                found = _packed_logps(model, [[encoded[i] for i in row] for row in batch])
            else:
                found = _padded_logps(model, pad_id, [encoded[i] for i in members])
            for i, logps_K in zip(members, found, strict=True):
                results[i] = logps_K.double().cpu()
    return _everyones(results)


def _padded_logps(model, pad_id: int, encoded: list[tuple[list[int], int]]) -> list:
    from rlhf_recipes.packing import left_pad

    ids_BT, mask_BT, positions_BT = left_pad([ids for ids, _ in encoded], pad_id, model.device)
    counts = [len(ids) - start for ids, start in encoded]
    K = max(counts)
    output = model(
        input_ids=ids_BT,
        attention_mask=mask_BT,
        position_ids=positions_BT,
        logits_to_keep=K + 1,
        use_cache=False,
    )
    logits_BKV = output.logits[:, :-1].float()
    logps_BK = logits_BKV.gather(2, ids_BT[:, -K:, None])[..., 0] - logits_BKV.logsumexp(2)
    return [logps_BK[row, K - count :] for row, count in enumerate(counts)]


def _packed_logps(model, rows: list[list[tuple[list[int], int]]]) -> list:
    import torch

    from rlhf_recipes import packing

    backbone = packing.backbone_of(model)
    packed = packing.pack([[ids for ids, _ in row] for row in rows], model.device)
    encoded = [each for row in rows for each in row]
    before_N = torch.cat(
        [places_T[start - 1 : len(ids) - 1] for places_T, (ids, start) in zip(packed.index_BT, encoded, strict=True)]
    )
    ids_N = torch.tensor([token for ids, start in encoded for token in ids[start:]], device=model.device)

    def leave_scored(module, args, output):
        output.last_hidden_state = output.last_hidden_state.flatten(0, 1)[before_N][None]
        return output

    with _hooked(backbone.register_forward_hook(leave_scored)):
        output = model(**backbone.packing.inputs(packed, packing.computed_in(backbone)), use_cache=False)
    logits_NV = output.logits[0].float()
    logps_N = logits_NV.gather(1, ids_N[:, None])[:, 0] - logits_NV.logsumexp(1)
    return list(logps_N.split([len(ids) - start for ids, start in encoded]))


def logp_sums(model, pad_id: int, encoded: list[tuple[list[int], int]], what: str) -> list[tuple[float, int]]:
    """(sum in nats, tokens) of what `token_logps` gives of each."""
    return [(logps_K.sum().item(), len(logps_K)) for logps_K in token_logps(model, pad_id, encoded, what)]


def pair_logps(
    model, tokenizer, rows: list[dict], what: str = "Held-out pairs", sums=logp_sums, kept: slice = WHOLE
) -> list[dict]:
    """`chosen_logp`, `rejected_logp` (sums, nats), `chosen_tokens`, `rejected_tokens` for each preference pair.

    Both answers start where the first of them and the prompt part, as TRL's DPOTrainer trains them.

    Args:
        sums: as `logp_sums`, what has kept them.
        kept: which of its tokens a trainer keeps of each conversation: `Splits.kept`.
    """
    both = [encode(tokenizer, row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")]
    starts = [min(chosen, rejected) for (_, chosen), (_, rejected) in zip(both[::2], both[1::2], strict=True)]
    encoded = [_cut(ids, starts[number // 2], kept) for number, (ids, _) in enumerate(both)]
    logps = sums(model, tokenizer.pad_token_id, encoded, what)
    return [
        {"chosen_logp": c[0], "chosen_tokens": c[1], "rejected_logp": r[0], "rejected_tokens": r[1]}
        for c, r in zip(logps[::2], logps[1::2], strict=True)
    ]


def demonstration_logps(
    model, tokenizer, rows: list[dict], what: str = "Demonstrations", sums=logp_sums, kept: slice = WHOLE
):
    """(log-probability in nats, tokens) of each row's completion; `sums` and `kept` as in `pair_logps`."""
    encoded = [_cut(*encode(tokenizer, row["prompt"], row["completion"]), kept) for row in rows]
    return sums(model, tokenizer.pad_token_id, encoded, what)


def rewards(
    model, tokenizer, conversations: list[list[Message]], what: str = "Rewards", kept: slice = WHOLE
) -> list[float]:
    """r(x, y) of a reward model for each conversation, read where `read_positions` says; `kept` as in `pair_logps`."""
    return [score for score, _ in rewards_and_features(model, tokenizer, conversations, what, kept)]


def rewards_and_features(
    model, tokenizer, conversations: list[list[Message]], what: str, kept: slice = WHOLE
) -> list[tuple]:
    """(r(x, y), what its score head read, a float32 array of F features) for each conversation; `kept` as in
    `pair_logps`."""
    encoded = [(render(tokenizer, c, return_dict=False)[kept], 0) for c in conversations]
    results: list[Any] = [None] * len(encoded)
    with measuring(model):
        rows = _rows(model, [ids for ids, _ in encoded])
        for _, batch in _batches(encoded, what, model, rows=rows):
            members = [i for row in batch for i in row]
            sequences = [[encoded[i][0] for i in row] for row in batch]
            scores_B, features_BF = (_packed_scores if rows else _padded_scores)(model, tokenizer, sequences)
            features_BF = features_BF.float().cpu().numpy()
            for i, score, features in zip(members, scores_B.float().tolist(), features_BF, strict=True):
                results[i] = score, features
    return _everyones(results)


def _padded_scores(model, tokenizer, rows: list[list[list[int]]]) -> tuple:
    from rlhf_recipes.packing import left_pad

    ids_BT, mask_BT, positions_BT = left_pad([ids for (ids,) in rows], tokenizer.pad_token_id, model.device)
    base, read = _unwrapped(model), []
    with _hooked(base.score.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))):
        output = model(input_ids=ids_BT, attention_mask=mask_BT, position_ids=positions_BT)
    at_B = read_positions(ids_BT, mask_BT, base.config.get_text_config().pad_token_id)
    return output.logits[:, 0], read[0][range(len(rows)), at_B]


def _packed_scores(model, tokenizer, rows: list[list[list[int]]]) -> tuple:
    from rlhf_recipes import packing

    backbone = packing.backbone_of(model)
    packed = packing.pack(rows, model.device)
    base, read = _unwrapped(model), []
    with _hooked(base.score.register_forward_hook(lambda _, inputs, output: read.append((inputs[0], output)))):
        model(**backbone.packing.inputs(packed, packing.computed_in(backbone)), use_cache=False)
    features_PLF, scores_PL1 = read[0]
    ids_BT, mask_BT = packing.right_pad([ids for row in rows for ids in row], tokenizer.pad_token_id, model.device)
    at_B = read_positions(ids_BT, mask_BT, base.config.get_text_config().pad_token_id)
    places_B = packed.index_BT[range(len(at_B)), at_B]
    return scores_PL1.flatten()[places_B], features_PLF.flatten(0, 1)[places_B]


def read_positions(ids_BT, mask_BT, pad_id: int | None):
    """Where a reward model reads each sequence, (B,): at its last token that is not `pad_id`, as transformers pools.

    Where a model pads with the EOS that ends its template, that is the token before it.

    Args:
        mask_BT: 1 where a sequence has a token, 0 at padding, on either side.
        pad_id: what the model takes for padding (its config's); None: it reads the last token, whatever it is.
    """
    import torch

    counts_BT = mask_BT if pad_id is None else mask_BT * (ids_BT != pad_id)
    return (counts_BT * torch.arange(ids_BT.shape[1], device=ids_BT.device)).argmax(1)


def pair_rewards(model, tokenizer, rows: list[dict], what: str = "Held-out pairs", kept: slice = WHOLE) -> list[dict]:
    """`chosen` and `rejected` rewards for each preference pair; `kept` as in `pair_logps`."""
    conversations = [row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected")]
    scores = rewards(model, tokenizer, conversations, what, kept)
    return [{"chosen": c, "rejected": r} for c, r in zip(scores[::2], scores[1::2], strict=True)]


@dataclass(frozen=True)
class Sampling:
    """Temperature 0 is greedy; otherwise the full distribution is sampled (no top-p, no top-k), so that
    log-probabilities of the samples estimate the KL of the policy itself."""

    max_new_tokens: int
    temperature: float
    seed: int


def generate(
    model, tokenizer, prompts: list[list[Message]], how: Sampling, what: str, part: tuple[int, int] = (0, 1)
) -> list[dict | None]:
    """For each prompt `ids`, `start` (of the answer in `ids`), its `text`, `tokens` and `finished` (by its EOS).

    Args:
        part: of the batches that all prompts make, the first that is computed, and every how-manyth is.

    Returns:
        None for the prompts of other batches.
    """
    from rlhf_recipes.decoding import Decoder
    from rlhf_recipes.sampling import Draws

    encoded = [(encode(tokenizer, p, None)[0], 0) for p in prompts]
    stops = stop_ids(model.generation_config, tokenizer)
    decoder = Decoder(model, tokenizer.pad_token_id)
    results: list[Any] = [None] * len(encoded)
    with measuring(model):
        longest = [(ids + [0] * how.max_new_tokens, 0) for ids, _ in encoded]
        for _, batch in _batches(longest, what, model, part=part):
            indices = [i for (i,) in batch]
            draws = Draws([draw_seed(how.seed, i) for i in indices], model.device, how.max_new_tokens)

            def choose(logits_BV, rows, draws=draws):
                return draws.draw(logits_BV / how.temperature, rows) if how.temperature else logits_BV.argmax(1)

            answers = decoder.decode([encoded[i][0] for i in indices], stops, how.max_new_tokens, choose)
            for i, answer in zip(indices, answers, strict=True):
                results[i] = {
                    "ids": encoded[i][0] + answer,
                    "start": len(encoded[i][0]),
                    "text": tokenizer.decode(answer, skip_special_tokens=True).strip(),
                    "tokens": len(answer),
                    "finished": answer[-1] in stops,
                }
    return _everyones(results)


def draw_seed(seed: int, place: int) -> int:
    """Of what is drawn for one prompt: it depends on the prompt's place, not on batch or process."""
    return hash((seed, place)) % 2**63


def kl_terms(policy_logps_K, reference_logps_K) -> tuple[float, float]:
    """k1 and k3 of one sampled answer, summed over its tokens, in nats: see `sampling.kl_estimates`."""
    from rlhf_recipes.sampling import kl_estimates

    k1_K, _, k3_K = kl_estimates(policy_logps_K, reference_logps_K)
    return k1_K.sum().item(), k3_K.sum().item()


def encode(tokenizer, prompt: list[Message], completion: list[Message] | None) -> tuple[list[int], int]:
    """Token ids of the rendered conversation, and where the completion starts in them."""
    prompt_ids = encode_prompt(tokenizer, prompt)
    if completion is None:
        return prompt_ids, len(prompt_ids)
    ids = render(tokenizer, prompt + completion, return_dict=False)
    return ids, common_prefix(prompt_ids, ids)


def _cut(ids: list[int], start: int, kept: slice) -> tuple[list[int], int]:
    """What is kept of a conversation, and where the completion starts in it; nothing predicts the first token."""
    first = kept.indices(len(ids))[0]
    return ids[kept], max(start - first, 1) if first else start


def batches_in_one(model) -> int:
    """How many batches of the sizes above a GPU takes as one; 1 on a CPU."""
    if model.device.type != "cuda":
        return 1
    base = _unwrapped(model)
    # Adapters come and go between measurements that are compared.
    weights = sum(p.nbytes for name, p in base.named_parameters() if "lora_" not in name)
    return ranks.from_first(batches_beside(weights, model.device))


def batches_beside(weights: float, device=None) -> int:
    """The same for so many bytes of weights. What the GPU has, not what is free at the moment: measured again, or
    continued, the same rows make the same batches, and round alike."""
    import torch

    return max(1, int((torch.cuda.get_device_properties(device).total_memory - weights) // BATCH_ROOM))


def _rows(model, sequences: list[list[int]]) -> list[list[int]]:
    """Indices of sequences that go through the model as one row; none where it takes no such rows, or no two of them
    begin alike."""
    from rlhf_recipes import packing

    own = getattr(packing.backbone_of(model), "packing", None)
    if not own or own.refused:
        return []
    _, member = packing.find_stems(sequences, STEM_TOKENS, BATCH_TOKENS // STEM_TOKENS, ROW_TOKENS)
    rows: dict[int, list[int]] = {}
    for i, number in enumerate(member):
        rows.setdefault(number, []).append(i)
    several = [row for row in rows.values() if len(row) > 1]
    if several and not own.proven:
        # A window is met by long ones alone; else short ones tell as much, and cost less.
        by_length = sorted(several, key=lambda row: len(sequences[row[0]]))
        row = by_length[-1 if getattr(own.config, "sliding_window", None) else 0]
        _prove(model, packing.backbone_of(model), [sequences[i] for i in row[:2]])
    return list(rows.values()) if several and not own.refused else []


def _prove(model, backbone, sequences: list[list[int]]) -> None:
    """See `Packing.prove`: through the whole model, whose parts may lie on several cards."""
    seen: list[Any] = []

    def states(**given):
        model(**given, use_cache=False)
        return seen.pop()

    with _hooked(backbone.register_forward_hook(lambda _, args, output: seen.append(output.last_hidden_state))):
        backbone.packing.prove(states, sequences, backbone)
    if (refused := backbone.packing.refused) and ranks.is_first():
        print(f"fast_forward: held-out rows go through whole: {refused}.", flush=True)


def _batches(
    encoded: list[tuple[list[int], int]],
    what: str,
    model,
    vocabulary: int = 0,
    rows: list[list[int]] | None = None,
    part: tuple[int, int] = (0, 1),
) -> Iterator[tuple[int, list[list[int]]]]:
    """This process's batches of rows with their numbers: grouped by length, the longest first: an out-of-memory shows
    at once.

    Args:
        vocabulary: V where the forward pass makes logits of completions, 0 where it makes none that count.
        rows: indices of the sequences of a row; none: each is one, padded as its batch is, and so are its logits.
        part: see `generate`.
    """
    from rlhf_recipes.packing import count_shared

    times = batches_in_one(model)
    tokens = times * BATCH_TOKENS
    logits_bytes = LOGITS_BYTES_ON_CPU if model.device.type == "cpu" else times * LOGITS_BYTES
    lengths, counts = [len(ids) for ids, _ in encoded], [len(ids) - start + 1 for ids, start in encoded]
    packed = bool(rows)
    rows = rows or [[i] for i in range(len(encoded))]

    def length(row: list[int]) -> int:
        shared = count_shared([encoded[i][0] for i in row]) if len(row) > 1 else 0
        return sum(lengths[i] for i in row) - (len(row) - 1) * shared

    T_of = {row[0]: length(row) for row in rows}
    groups, rest = [], sorted(rows, key=lambda row: -T_of[row[0]])
    while rest:
        size, K, N, T = 0, 0, 0, T_of[rest[0][0]]
        for row in rest:
            own = [counts[i] for i in row]
            K, N, B = max(K, *own), N + sum(own), size + 1
            logits = N if packed else B * K
            if size and (tokens < B * T or logits_bytes < 4 * logits * vocabulary):
                break
            if packed and T_of[row[0]] < SHORTER * T and FILLED * tokens <= size * T:
                break
            size = B
        groups.append(rest[:size])
        rest = rest[size:]
    begin, every = part
    groups = groups[begin::every]
    line, done = progress.Line(what, sum(len(row) for group in groups for row in group)), 0
    for number, group in ranks.share(groups):
        yield begin + number * every, group
        memory.return_freed_memory()
        first = number - number % ranks.world_size()
        others = groups[first : first + ranks.world_size()]  # have come as far
        done += sum(len(row) for each in others for row in each)
        line.update(done)


def _everyones(results: list) -> list:
    """With what the other processes have found in the places that are None here."""
    if ranks.world_size() == 1:
        return results
    found = dict(ranks.gather([(place, each) for place, each in enumerate(results) if each is not None]))
    return [found.get(place) for place in range(len(results))]


def stop_ids(generation_config, tokenizer) -> list[int]:
    """Every token that ends an answer: those that the model declares, and the tokenizer's.

    Args:
        generation_config: the model's, or without its weights what `model_files.load_generation_config` gives.
    """
    configured = generation_config.eos_token_id
    stops = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in [*stops, tokenizer.eos_token_id] if i is not None})


def _unwrapped(model):
    """Without its LoRA's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def _hooked(hook):
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def measuring(model):
    """No gradients, no dropout, and the precision that the model was loaded in; afterwards everything as it was.

    Training changes nothing about it: not the float32 norms of a quantized base in ORPOTrainer and CPOTrainer, nor
    accelerate's mixed-precision `forward`. Before and after differ by what was learned alone.
    """
    import torch

    dtype = model.config.dtype
    rounds = dtype in (torch.bfloat16, torch.float16)
    was_training, trainers_forward = model.training, vars(model).pop("forward", None)
    model.eval()
    try:
        # FSDP keeps the buffers of its first forward, and training could not use those of inference mode.
        without_gradients = torch.no_grad() if sharding.is_on() else torch.inference_mode()
        with without_gradients, torch.autocast(model.device.type, dtype, enabled=rounds):
            yield
    finally:
        sharding.take_apart(model)
        model.train(was_training)
        if trainers_forward:
            model.forward = trainers_forward
