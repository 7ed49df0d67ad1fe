"""Students, the distillation trainer with its resume, on-policy distillation, masks, and models cut out of them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from effnlp_lab import distillation as room
from effnlp_lab import training
from effnlp_lab.distillation.hard_concrete import STRETCH, TEMPERATURE
from effnlp_lab.distillation.trainer import inputs_and_labels
from effnlp_lab.errors import UsageError

VOCABULARY = 40


def llama(seed=0, layers=4, hidden=32, tie=True, bias=True, **changes):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tie,
        attention_bias=bias, mlp_bias=bias, eos_token_id=1, pad_token_id=0, bos_token_id=2, **changes,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def batches(count=6, rows=4, length=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(3, VOCABULARY, (count, rows, 1), generator=generator)
    ids = 3 + (starts + 5 * torch.arange(length)) % (VOCABULARY - 3)  # texts with something to learn
    return [{"input_ids": one} for one in ids]


def test_alternate_layers():
    assert room.alternate_layers(12) == [0, 2, 4, 6, 8, 10]  # Sanh et al. 2019: one of two
    assert room.alternate_layers(7) == [0, 1, 3, 5] and room.alternate_layers(8, 3) == [0, 2, 5]
    assert room.alternate_layers(8, 8) == list(range(8)) and room.alternate_layers(8, 1) == [0]
    with pytest.raises(UsageError, match="9 of 8"):
        room.alternate_layers(8, 9)


@pytest.mark.parametrize("tie", [True, False])
def test_a_student_is_its_teacher_without_some_layers(tie):
    teacher = llama(tie=tie)
    before = torch.get_rng_state()
    student = room.student_from_layers(teacher, [0, 3])
    assert torch.equal(torch.get_rng_state(), before)
    shortened = copy.deepcopy(teacher)
    del shortened.model.layers[1:3]
    shortened.config.num_hidden_layers = 2
    shortened.model.layers[1].self_attn.layer_idx = 1
    ids = batches(1)[0]["input_ids"]
    assert torch.equal(student(ids).logits, shortened(ids, use_cache=False).logits)
    assert student.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3
    with torch.no_grad():
        student.model.layers[0].mlp.up_proj.weight.zero_()
    assert teacher.model.layers[0].mlp.up_proj.weight.abs().sum() > 0
    with pytest.raises(UsageError, match="not all in a model of 4"):
        room.student_from_layers(teacher, [0, 4])


@pytest.mark.parametrize("weight_cosine", [0.0, 0.5])
def test_the_loss_of_a_batch(weight_cosine):
    teacher, student = llama(0), llama(1, layers=2)
    batch = batches(1)[0] | {"attention_mask": torch.ones(4, 12, dtype=torch.long)}
    batch["attention_mask"][1, 7:] = 0
    settings = room.LossSettings("jsd", temperature=2.0, weight_hard=0.3)
    total, count = room.DistillationLoss(teacher, settings, weight_cosine=weight_cosine)(student, batch)
    inputs, labels = inputs_and_labels(batch)
    assert count == 3 * 11 + 6 and (labels[1, 6:] == -100).all()
    ours, theirs = (m(**inputs, output_hidden_states=True) for m in (student, teacher))
    expected = room.jensen_shannon(ours.logits, theirs.logits, labels, temperature=2.0)
    expected = expected + 0.3 * F.cross_entropy(ours.logits.flatten(0, 1), labels.flatten())
    states = [out.hidden_states[-1] for out in (ours, theirs)]
    expected = expected + weight_cosine * room.hidden_cosine(*states, labels)
    torch.testing.assert_close(total / count, expected, rtol=1e-5, atol=1e-5)
    gradients = [
        torch.autograd.grad(x, list(student.parameters()), retain_graph=True) for x in (total / count, expected)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def run(folder, steps, kind="distil", loss=None, stop=None):
    teacher, student = llama(0), room.student_from_layers(llama(0), 2).requires_grad_(True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    torch.manual_seed(5)
    options = {"steps": stop or steps, "folder": folder, "checkpoint_every": 2, "progress": False, "log_every": 1,
               "held_out": batches(2, seed=9)}  # fmt: skip
    if kind == "plain":
        return training.Trainer(student, batches(), optimizer, **options).run(), student
    trainer = room.DistillationTrainer(student, teacher, batches(), optimizer, loss=loss and loss(teacher), **options)
    return trainer.run(), student


def on_policy(teacher):
    return room.OnPolicyDistillation(teacher, prompt_tokens=4, new_tokens=5, student_share=0.7)


@pytest.mark.parametrize("loss", [None, on_policy])
def test_a_run_that_was_cut_goes_on_as_if_it_had_not_been(tmp_path, loss):
    whole, student = run(tmp_path / "whole", 6, loss=loss)
    run(tmp_path / "cut", 6, loss=loss, stop=4)
    resumed, again = run(tmp_path / "cut", 6, loss=loss)
    assert whole.losses == resumed.losses and whole.evaluations == {6: resumed.evaluations[6]}
    for a, b in zip(student.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_held_out_losses_are_cross_entropy():
    teacher, student = llama(0), llama(1, layers=2)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
    trainer = room.DistillationTrainer(
        student, teacher, batches(), optimizer, steps=1, held_out=batches(2), progress=False
    )
    plain = training.Trainer(student, batches(), optimizer, steps=1, held_out=batches(2), progress=False)
    assert trainer.evaluate() == plain.evaluate() and trainer.loss is not plain.loss
    with pytest.raises(UsageError, match="compile"):
        room.DistillationTrainer(student, teacher, batches(), optimizer, steps=1, compile=True)


def test_distillation_comes_nearer_to_the_teacher():
    teacher, student = llama(0), room.student_from_layers(llama(0), 2).requires_grad_(True)
    data = batches(seed=3)
    loss = room.DistillationLoss(teacher)
    before = sum((total / count).item() for total, count in (loss(student, batch) for batch in data))
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    room.DistillationTrainer(student, teacher, data, optimizer, steps=40, progress=False).run()
    after = sum((total / count).item() for total, count in (loss(student, batch) for batch in data))
    assert after < 0.25 * before


def test_the_student_samples_and_only_what_it_wrote_counts():
    student = llama(1, layers=2)
    prompts = batches(1, rows=64, length=4)[0]["input_ids"]
    torch.manual_seed(3)
    student.train()
    ids, wrote = room.sample_continuations(student, prompts, 9)
    assert student.training and torch.equal(ids[:, :4], prompts) and not wrote[:, :4].any()
    ended = 0
    for row, mask in zip(ids[:, 4:].tolist(), wrote[:, 4:].tolist(), strict=True):
        end = row.index(1) + 1 if 1 in row else len(row)
        assert mask == [True] * end + [False] * (len(row) - end)
        ended += 1 in row
    assert ended > 3  # an end token did occur, so the mask was tested


def test_on_policy_is_the_loss_on_the_samples():
    teacher, student = llama(0), llama(1, layers=2)
    batch = batches(1)[0]
    loss = room.OnPolicyDistillation(teacher, prompt_tokens=4, new_tokens=5)
    torch.manual_seed(7)
    total, count = loss(student, batch)
    torch.manual_seed(7)
    torch.rand(())
    ids, wrote = room.sample_continuations(student, batch["input_ids"][:, :4], 5)
    labels = torch.where(wrote, ids, -100)[:, 1:]
    logits = [m(ids).logits[:, :-1] for m in (student, teacher)]
    torch.testing.assert_close(total / count, room.reverse_kl(*logits, labels), rtol=1e-4, atol=1e-6)
    assert count == wrote.sum() and loss.sampled == 4 * (ids.shape[1] - 4)
    never = room.OnPolicyDistillation(teacher, prompt_tokens=4, student_share=0.0)
    expected = room.DistillationLoss(teacher, room.LossSettings("reverse_kl"))(student, batch)
    torch.testing.assert_close(never(student, batch), expected)
    with pytest.raises(UsageError, match="student_share is 2"):
        room.OnPolicyDistillation(teacher, prompt_tokens=4, student_share=2)


def test_costs():
    student, teacher = llama(layers=2), llama()
    sizes = [sum(p.numel() for p in m.parameters()) for m in (student, teacher)]
    cost = room.training_flops(student, teacher, 1000, sampled=10)
    assert cost == {"student": 6000.0 * sizes[0], "teacher": 2000.0 * sizes[1], "sampling": 20.0 * sizes[0]}


def test_hard_concrete_is_zero_as_often_as_it_says():
    mask = room.HardConcrete(3)
    mask.log_alpha.data = torch.tensor([-2.0, 0.3, 1.5])
    count = 200_000
    uniforms = torch.rand(count, 3, generator=torch.Generator().manual_seed(0))
    found = (mask.sample(uniforms) != 0).double().mean(0)
    expected = mask.expected().double()
    deviation = (expected * (1 - expected) / count).sqrt()
    assert ((found - expected).abs() < 5.5 * deviation).all()  # less than one in a million by chance
    assert 0 < (mask.sample(uniforms) == 1).double().mean() < 1 and not mask.sample(uniforms).isnan().any()
    # Louizos et al. 2018, equation 12, by its own symbols
    low, high = STRETCH
    again = torch.sigmoid(mask.log_alpha - TEMPERATURE * math.log(-low / high))
    torch.testing.assert_close(mask.expected(), again)
    torch.testing.assert_close(room.HardConcrete(4, keep=0.8).expected(), torch.full((4,), 0.8))
    assert (mask.decided(2) > 0).tolist() == [False, True, True]


TARGETS = (room.TargetShape(layers=3, kv_heads=1, intermediate=20, hidden=24), room.TargetShape(hidden=20),
           room.TargetShape(kv_heads=1), room.TargetShape(layers=2, intermediate=11))  # fmt: skip


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("target", TARGETS)
def test_the_cut_model_computes_what_the_masked_one_does(target, tie, tmp_path):
    model = llama(tie=tie, bias=tie).double()
    prunable = room.PrunableModel(model, target)
    torch.manual_seed(1)
    for mask in prunable.masks.values():
        mask.log_alpha.data = torch.randn_like(mask.log_alpha)
    prunable.harden = True
    prunable.eval()
    ids = batches(1)[0]["input_ids"]
    small = room.cut(prunable)
    logits = prunable(input_ids=ids).logits
    torch.testing.assert_close(small(ids).logits, logits, rtol=1e-4, atol=1e-5)  # RMSNorm is in float32
    assert not torch.allclose(model(ids).logits, logits)  # outside, no mask acts
    small.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(opened(ids).logits, small(ids).logits)
    shape = opened.config
    wanted = (target.layers or 4, (target.kv_heads or 2) * 2, target.intermediate or 48, target.hidden or 32)
    found = (shape.num_hidden_layers, shape.num_attention_heads, shape.intermediate_size, shape.hidden_size)
    assert found == wanted and len(opened.model.layers) == wanted[0]
    assert opened.generate(ids, max_new_tokens=2, do_sample=False).shape == (4, 14)


def test_pruning_reaches_its_target_and_resumes(tmp_path):
    def trainer(steps):
        prunable = room.PrunableModel(llama(layers=2), room.TargetShape(intermediate=16, hidden=24), warmup_steps=10)
        optimizer = torch.optim.AdamW(room.pruning_parameters(prunable, 1e-3))
        torch.manual_seed(2)
        made = training.Trainer(prunable, batches(), optimizer, steps=steps, loss=room.pruning_loss, progress=False,
                                folder=tmp_path, checkpoint_every=20, held_out=batches(1, seed=8))  # fmt: skip
        return made, prunable

    trainer(20)[0].run()
    whole, prunable = trainer(80)
    result = whole.run()
    assert result.step == 80 and prunable.step == 80
    targets = {"mlp": 16 / 48, "hidden": 24 / 32}
    for kind, share in prunable.shares().items():
        assert (share - targets[kind]).abs().max() < 0.08, (kind, share)
        assert torch.allclose(torch.as_tensor(prunable.targets()[kind]), torch.tensor(targets[kind]))
    small = room.cut(prunable)
    assert (small.config.intermediate_size, small.config.hidden_size) == (16, 24)


def test_the_target_moves_in_from_the_whole():
    prunable = room.PrunableModel(llama(layers=2), room.TargetShape(hidden=16), warmup_steps=4)
    found = []
    prunable.train()
    for _ in range(6):
        found.append(float(prunable.targets()["hidden"]))
        prunable(input_ids=batches(1)[0]["input_ids"])
    assert found == [1.0, 0.875, 0.75, 0.625, 0.5, 0.5]


def test_targets_that_are_refused():
    model = llama(layers=2)
    for target, message in ((room.TargetShape(), "whole model"), (room.TargetShape(hidden=33), "33 of 32"),
                            (room.TargetShape(layers=0), "0 of 2")):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            room.PrunableModel(model, target)
