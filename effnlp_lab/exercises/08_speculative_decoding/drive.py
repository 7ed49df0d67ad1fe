"""How the answers of lab 08 are called. Runs beside the student's code.

A step is given two small models that are tables, so that every logit is the same on every machine, and the calls of
the target are counted.
"""

from __future__ import annotations

import torch
from torch import Tensor


class TableModel:
    """ids [length] to logits [length, vocabulary]: what follows depends on the token, the one before it and the place.

    `calls` counts. Raises TypeError for anything but token ids of one dimension.
    """

    def __init__(self, by_token: Tensor, by_token_before: Tensor, by_place: Tensor) -> None:
        self.by_token, self.by_token_before, self.by_place = by_token, by_token_before, by_place
        self.calls = 0

    def __call__(self, ids: Tensor) -> Tensor:
        self.calls += 1
        if not isinstance(ids, Tensor) or ids.ndim != 1 or ids.dtype != torch.long:
            raise TypeError("a model takes token ids: an int64 tensor of shape [length]")
        before = torch.cat([ids[:1], ids[:-1]])
        places = torch.arange(len(ids), device=ids.device) % len(self.by_place)
        return self.by_token[ids] + self.by_token_before[before] + self.by_place[places]


def several(told, count: int, words: str) -> list:
    """What an answer returned, if it is a tuple (or list) of so many; an error in words if not."""
    if not isinstance(told, (list, tuple)) or len(told) != count:
        raise TypeError(f"return {words}")
    return list(told)


def tensors(told, count: int, words: str) -> list[Tensor]:
    told = several(told, count, words)
    if not all(isinstance(x, Tensor) for x in told):
        raise TypeError(f"return {words}")
    return told


def accept_drafts(answer, p, q, drafts, uniforms, wanted):
    told = tensors(answer(p, q, drafts, uniforms), 2, "two tensors: how many were accepted, and how many tested")
    accepted, tested = (x.clone() for x in told)
    return {"accepted": accepted, "tested": tested} if wanted == "tested" else {"accepted": accepted}


def speculative_step(answer, target, drafter, prefix, gamma, uniforms, temperature, top_k, top_p):
    large, small = TableModel(*target), TableModel(*drafter)
    told = several(
        answer(large, small, prefix, gamma, uniforms, temperature, top_k, top_p),
        3,
        "three things: the new tokens, the drafts, and how many drafts were tested",
    )
    new, drafts = tensors(told[:2], 2, "new tokens and drafts as tensors")
    return {"drafts": drafts.clone(), "new": new.clone(), "tested": int(told[2]), "target calls": large.calls}


def roll_back(answer, cache, held, accepted, gamma):
    told = several(answer(cache, held, accepted, gamma), 3, "three things: the cache, held, and the next positions")
    layers = [tuple(tensors(layer, 2, "a pair (keys, values) for each layer")) for layer in told[0]]
    held, positions = tensors(told[1:], 2, "held and the next positions as tensors")
    shown = [tuple(x.clone() for x in layer) for layer in layers]  # views of what came are as good as copies
    return {"held": held.clone(), "positions": positions.clone(), "cache": shown}


def SpeedModel(answer, alpha, cost_ratio, questions):
    model = answer(alpha, cost_ratio)
    return [getattr(model, name)(*arguments) for name, *arguments in questions]


def lookup_draft(answer, tokens, gamma, most):
    told = answer(tokens, gamma, most)
    return told.clone() if isinstance(told, Tensor) else told


def early_exit(answer, logits, threshold, least):
    told = tensors(answer(logits, threshold, least), 2, "two tensors: tokens, and layers passed")
    return {"exits": told[1].clone(), "tokens": told[0].clone()}


def DraftTree(answer, parents, tokens, best):
    """`best` None: what the target is given; else what it makes of it."""
    tree = answer(list(parents), list(tokens))
    if best is None:
        mask, depths = tensors([tree.mask(), tree.depths()], 2, "tensors from mask() and depths()")
        return {"mask": mask.tolist(), "depths": depths.tolist()}  # lists: they may be on any device
    path, token = several(tree.accept(list(best)), 2, "two things: the nodes of the path, and the token after it")
    return {"path": [int(node) for node in path], "token": int(token)}
