"""Against PEFT: equal logits, losses and gradients; adapters that load in both directions; what is refused."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from torch import nn

from effnlp_lab import adapters
from effnlp_lab.adapters import stored
from effnlp_lab.course.models import load_model
from effnlp_lab.errors import UsageError

peft = pytest.importorskip("peft")
LORA = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"], "use_rslora": True}
IA3 = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
METHODS = {
    "lora": (
        adapters.LoRAConfig(targets=("q_proj", "down_proj"), r=4, rank_stabilized=True),
        lambda: peft.LoraConfig(task_type="CAUSAL_LM", **LORA),
    ),
    "ia3": (adapters.IA3Config(), lambda: peft.IA3Config(task_type="CAUSAL_LM", **IA3)),
    "prompt": (
        adapters.PromptTuningConfig(5),
        lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    ),
    "prefix": (
        adapters.PrefixTuningConfig(5),
        lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    ),
}


@pytest.fixture(scope="module")
def base():
    return load_model("course-base", device="cpu")


@pytest.fixture()
def batch():
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 4000, (2, 11), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0  # a row that is padded on the left
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def disturb(model: nn.Module) -> None:
    """Train, so to speak: B is no longer zero."""
    torch.manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.05


def theirs_of(base, config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(copy.deepcopy(base), config)


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad.flatten() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("method", METHODS)
def test_we_load_pefts_and_compute_the_same(method, base, batch, tmp_path):
    theirs = theirs_of(base, METHODS[method][1]())
    disturb(theirs)
    theirs.save_pretrained(tmp_path)
    model = copy.deepcopy(base)
    adapters.load_adapter(model, tmp_path)
    ours, other = model(**batch), theirs(**batch)
    torch.testing.assert_close(ours.logits, other.logits[:, -11:], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(ours.loss, other.loss)
    ours.loss.backward(), other.loss.backward()
    mine, expected = gradients(model), gradients(theirs)
    assert len(mine) == len(expected) > 0
    for one, two in zip(mine, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4 * two.abs().max().item())
    counted = adapters.count_parameters(model)
    trained, everything = theirs.get_nb_trainable_parameters()
    assert counted["trained"] == trained and counted["base"] + trained == everything


@pytest.mark.parametrize("method", METHODS)
def test_peft_loads_ours_and_generates_the_same(method, base, batch, tmp_path):
    model = copy.deepcopy(base)
    adapters.add_adapter(model, METHODS[method][0])
    disturb(model)
    adapters.save_adapter(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [stored.CONFIG, stored.WEIGHTS]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of keys that it misses or does not know
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    with torch.no_grad():
        ours, other = model(**batch), theirs(**batch)
        torch.testing.assert_close(ours.logits, other.logits[:, -11:], rtol=1e-5, atol=2e-5)
        prompt = {"input_ids": batch["input_ids"], "attention_mask": torch.ones_like(batch["input_ids"])}
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 4095}
        one, two = model.generate(**prompt, **options), theirs.generate(**prompt, **options)
    assert torch.equal(one[:, -6:], two[:, -6:])


def test_lora_merges_as_peft_does(base, batch):
    theirs = theirs_of(base, METHODS["lora"][1]())
    disturb(theirs)
    model = copy.deepcopy(base)
    adapter = adapters.add_adapter(model, METHODS["lora"][0])
    for mine, other in zip(adapter.parameters(), [p for p in theirs.parameters() if p.requires_grad], strict=True):
        mine.data.copy_(other)
    adapters.merge_adapter(model)
    merged = theirs.merge_and_unload()
    for name in ("q_proj", "v_proj"):
        mine, other = (getattr(m.model.layers[3].self_attn, name) for m in (model, merged))
        torch.testing.assert_close(mine.weight, other.weight, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(model(**batch).logits, merged(**batch).logits, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    "kind", ["another base", "another rank", "cut", "nan", "two saves", "dora", "unknown", "absent"]
)
def test_bad_files_are_refused_and_the_model_is_what_it_was(kind, base, batch, tmp_path):
    model = copy.deepcopy(base)
    adapters.add_adapter(model, METHODS["lora"][0])
    adapters.save_adapter(model, tmp_path)
    adapters.remove_adapter(model, "default")
    adapters.add_adapter(model, adapters.IA3Config(), "first")
    before, trained = model(**batch).logits, list(adapters.trainable_parameters(model))
    weights, config = tmp_path / stored.WEIGHTS, json.loads((tmp_path / stored.CONFIG).read_text())
    words = {
        "another base": "another base", "another rank": "another rank", "cut": "cut short", "nan": "NaN",
        "two saves": "different saves", "dora": "use_dora=True", "unknown": "BOFT", "absent": "holds no adapter_model",
    }[kind]  # fmt: skip
    target = model
    if kind == "another base":
        target = load_model("course-draft", device="cpu")
        before = trained = None
    if kind == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    if kind == "absent":
        weights.unlink()
    if kind in ("nan", "another rank", "dora", "unknown"):
        from safetensors.torch import load_file, save_file

        tensors = load_file(weights)
        if kind == "nan":
            next(iter(tensors.values()))[0, 0] = float("nan")
        save_file(tensors, weights)  # without our digest, as another program would
    changes = {"another rank": {"r": 8}, "two saves": {"lora_alpha": 1}, "dora": {"use_dora": True}}
    changes["unknown"] = {"peft_type": "BOFT"}
    (tmp_path / stored.CONFIG).write_text(json.dumps(config | changes.get(kind, {})))
    if kind in ("cut", "another base"):
        (tmp_path / stored.CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    with pytest.raises(UsageError, match=words) as caught:
        adapters.load_adapter(target, tmp_path, "second")
    assert str(caught.value).endswith((".", "again.")) and "\n" not in str(caught.value)
    if before is not None:
        assert torch.equal(model(**batch).logits, before) and list(adapters.trainable_parameters(model)) == trained
        adapters.add_adapter(model, METHODS["lora"][0], "second")  # the name is free


def test_nothing_half_written(base, tmp_path, monkeypatch):
    model = copy.deepcopy(base)
    adapter = adapters.add_adapter(model, adapters.LoRAConfig())
    folder = tmp_path / "new"
    adapter.parameters()[0].data[0, 0] = float("inf")
    with pytest.raises(UsageError, match="NaN or infinity in .*lora_A"):
        adapters.save_adapter(model, folder)
    assert not folder.exists()
    adapter.parameters()[0].data.zero_()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(stored, "_flush", full)
        adapters.save_adapter(model, folder)
    assert not folder.exists()
    adapters.save_adapter(model, folder)
    kept = {p.name: p.read_bytes() for p in folder.iterdir()}
    adapter.parameters()[0].data.fill_(1)
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(stored, "_flush", full)
        adapters.save_adapter(model, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == kept
