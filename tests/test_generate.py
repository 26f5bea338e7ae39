"""Tokens drawn with kept keys and values are those of the model that reads its whole context for each."""
from itertools import islice

import pytest
import torch

from model.generate import Context, context_start, continuation, draw
from tests.test_model import FORMS, scrambled, some_tokens

SEQ_LEN = 16
MODELS = FORMS | {f"{name}_window_{window}": FORMS[name] | {"window": window}
                  for name, window in (("gpt2", 1), ("gpt2", 5), ("everything", 2), ("everything", 5),
                                       ("track3", SEQ_LEN), ("track3", 99))}
EVERY_MODEL = pytest.mark.parametrize("name", MODELS)


def in_float64(name, seq_len=SEQ_LEN):
    return scrambled(MODELS[name], seq_len, torch.float64).double()


def uncached(model, prompt, count, temperature, generator):
    """The same tokens without a cache: the whole context, which starts where context_start says, for each token."""
    tokens = list(prompt)
    for _ in range(count):
        row = tokens[context_start(len(tokens), model.seq_len):]
        with torch.no_grad():
            logits = model.logits(torch.tensor([row]))[0, -1]
        tokens.append(draw(logits, temperature, None, None, generator))
    return tokens[len(prompt):]


# --- equal to the uncached model

@EVERY_MODEL
@pytest.mark.parametrize("sizes", [[1] * SEQ_LEN, [7, 1, 1, 5, 2], [SEQ_LEN]], ids=str)
def test_logits_are_the_uncached_ones_however_the_tokens_are_read(name, sizes):
    model, tokens = in_float64(name), some_tokens(3, SEQ_LEN)
    context, read = Context(model, rows=3), 0
    with torch.no_grad():
        expected = model.logits(tokens)
    for size in sizes:
        logits, read = context.read(tokens[:, read:read + size]), read + size
        # Float64, but that rotary and the logits themselves are rounded to float32: measured at most 1e-6.
        torch.testing.assert_close(logits, expected[:, read - 1], rtol=1e-6, atol=2e-6)
    assert context.length == read == SEQ_LEN


@EVERY_MODEL
def test_trunks_agree_in_float64(name):
    model, tokens = in_float64(name), some_tokens(2, SEQ_LEN)
    with torch.no_grad():
        expected, context = model.trunk(tokens), Context(model, rows=2)
        pasts = [(keys, values, 9) for keys, values in zip(context.keys, context.values)]
        context.read(tokens[:, :9])
        found = model.trunk(tokens[:, 9:], pasts=pasts, start=9)
    tolerance = 1e-13 if model.pos is not None else 1e-6                        # rotations are rounded to float32
    assert (found - expected[:, 9:]).abs().max() < tolerance * expected.abs().max()


@EVERY_MODEL
@pytest.mark.parametrize("prompt", [1, 40])
def test_tokens_are_the_uncached_ones_past_the_end_of_the_context(name, prompt):
    model, prompt = in_float64(name), some_tokens(1, prompt)[0].tolist()
    for temperature in (0, 1):
        generators = [torch.Generator().manual_seed(5) for _ in range(2)]
        drawn = list(islice(continuation(model, prompt, temperature, None, None, generators[0]), 30))
        assert drawn == uncached(model, prompt, 30, temperature, generators[1])
    assert len(set(drawn)) > 5


# --- the context

def test_a_full_context_drops_its_older_half():
    assert [context_start(n, 6) for n in range(1, 15)] == [0] * 6 + [3] * 3 + [6] * 3 + [9] * 2
    for seq_len in (1, 2, 3, 8, 33):
        for length in range(1, 5 * seq_len):
            seen = length - context_start(length, seq_len)
            assert min(length, seq_len - max(1, seq_len // 2) + 1) <= seen <= seq_len


def test_each_token_is_read_once_and_after_a_full_context_its_newer_half_again():
    model, read = in_float64("gpt2"), []
    model.embed.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    list(islice(continuation(model, [1, 2, 3], 0, None, None, torch.Generator()), 30))
    assert read == [3] + [1] * 13 + [9] + [1] * 7 + [9] + [1] * 7


def test_more_tokens_than_the_context_holds_are_an_error():
    context = Context(in_float64("everything"))
    context.read(some_tokens(1, SEQ_LEN))
    with pytest.raises(ValueError, match=f"a context of {SEQ_LEN + 1} tokens, but this model has {SEQ_LEN}"):
        context.read(some_tokens(1, 1))


# --- drawing

def drawn(logits, temperature=1.0, top_k=None, top_p=None, count=4000):
    """How often each token is drawn."""
    generator, logits = torch.Generator().manual_seed(0), torch.tensor(logits)
    tokens = [draw(logits.clone(), temperature, top_k, top_p, generator) for _ in range(count)]
    return torch.bincount(torch.tensor(tokens), minlength=len(logits)) / count


P = [0.1, 0.4, 0.05, 0.2, 0.25]


@pytest.mark.parametrize("options, kept", [
    ({}, [0, 1, 2, 3, 4]), ({"top_k": 9}, [0, 1, 2, 3, 4]), ({"top_k": 3}, [1, 3, 4]), ({"top_k": 1}, [1]),
    ({"top_p": 1.0}, [0, 1, 2, 3, 4]), ({"top_p": 0.66}, [1, 3, 4]), ({"top_p": 0.64}, [1, 4]),
    ({"top_p": 0.01}, [1]), ({"top_k": 3, "top_p": 0.7}, [1, 4]), ({"top_k": 2, "top_p": 0.99}, [1, 4]),
    ({"temperature": 0.5}, [0, 1, 2, 3, 4]), ({"temperature": 0}, [1]),
], ids=str)
def test_tokens_come_with_the_probabilities_that_are_left(options, kept):
    power = 1 / (options.get("temperature") or 1)
    expected = torch.tensor([p ** power if token in kept else 0.0 for token, p in enumerate(P)])
    frequency = drawn(torch.tensor(P).log().tolist(), **options)
    assert (frequency - expected / expected.sum()).abs().max() < 0.03 and not frequency[expected == 0].any()


def test_equal_logits_do_not_let_more_than_k_tokens_in():
    assert drawn([0.0, 1.0, 1.0, 1.0], top_k=2).nonzero().flatten().tolist() == [1, 2]
