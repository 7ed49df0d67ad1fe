"""The course models: the recipe end to end at a tiny size, loading, and the shipped weights against their card.

Oracles: plain `transformers` (logits, loss, tokenizer), `tokenizers`, `torch.optim`, and sums written out.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as HuggingFaceTokenizer
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaForCausalLM

from effnlp_lab import cli
from effnlp_lab.course import models
from effnlp_lab.course.models import WEIGHTS, load_model, load_tokenizer
from effnlp_lab.course.recipe import card as recipe_card
from effnlp_lab.course.recipe import data as recipe_data
from effnlp_lab.course.recipe import encode as recipe_encode
from effnlp_lab.course.recipe import folder as recipe_folder
from effnlp_lab.course.recipe import settings as recipe
from effnlp_lab.course.recipe import training as recipe_training
from effnlp_lab.course.recipe.losses import acceptance, distillation, next_token_nll
from effnlp_lab.course.recipe.muon import MuonAdamW, orthogonalize, parameter_groups
from effnlp_lab.course.text import load_text
from effnlp_lab.device import resolve
from effnlp_lab.errors import UsageError
from effnlp_lab.streaming import StreamLoader, Windows
from effnlp_lab.tokenization import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
COMMAND = ["train-course-models", "--size", "tiny", "--device", "cpu", "--folder"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The folder of an undisturbed tiny run."""
    folder = tmp_path_factory.mktemp("course") / "made"
    assert cli.main([*COMMAND, str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def data(made) -> recipe_data.CourseData:
    return recipe_data.make_shards(recipe.TINY, made)


@pytest.fixture(scope="module")
def figures(made) -> dict:
    return json.loads((made / "weights" / "training.json").read_text())["figures"]


# The recipe.


def test_a_killed_run_goes_on_and_ends_in_the_same_weights(made, tmp_path, capsys):
    folder = tmp_path / "killed"
    environment = dict(os.environ, EFFNLP_DEVICE="cpu")
    with subprocess.Popen([sys.executable, "-m", "effnlp_lab", *COMMAND, str(folder)], cwd=ROOT, env=environment,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as run:  # fmt: skip
        begin = time.monotonic()
        while not (folder / "base" / "checkpoint.json").exists() and run.poll() is None:
            assert time.monotonic() - begin < 120
            time.sleep(0.01)
        run.kill()
        said = run.communicate()[1].decode()
    assert run.returncode == -signal.SIGKILL, said
    assert not (folder / "weights" / "course-draft").exists(), "it was done before it could be killed"
    tokenizer = (folder / "tokenizer" / "tokenizer.json").stat().st_mtime_ns
    reached = json.loads((folder / "base" / "checkpoint.json").read_text())["step"]
    assert cli.main([*COMMAND, str(folder)]) == 0
    assert 0 < reached <= recipe.TINY.base.steps
    assert (folder / "tokenizer" / "tokenizer.json").stat().st_mtime_ns == tokenizer  # not trained again
    for name in models.COURSE_MODELS:
        whole, resumed = (path / "weights" / name / "model.safetensors" for path in (made, folder))
        assert whole.read_bytes() == resumed.read_bytes()

    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    assert cli.main([*COMMAND, str(folder)]) == 0  # all is done: nothing is trained
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    assert "step" not in capsys.readouterr().out


def test_the_recipe_learns_and_says_what_it_made(made, figures):
    base, draft = figures["course-base"], figures["course-draft"]
    assert base["perplexity"] < 0.5 * recipe.TINY.vocabulary  # of a model that knows nothing: the vocabulary's size
    assert draft["perplexity"] < 0.6 * recipe.TINY.vocabulary and figures["acceptance"] > 0.5
    card = (made / "weights" / "README.md").read_text()
    for value in (f"{base['perplexity']:.2f}", f"{draft['perplexity']:.2f}", f"{figures['acceptance']:.3f}",
                  f"Python {figures['python']}", "PSF-2.0", "standard library", "Limits", "Licence"):  # fmt: skip
        assert value in card
    assert max(map(len, card.splitlines())) < 200 and str(made) not in card
    log = json.loads((made / "weights" / "training.json").read_text())
    assert card == recipe_card.card(recipe.TINY, log)
    assert sum(log["sources"].values()) == recipe.TINY.text_bytes
    assert len(log["curves"]["base"]["held_out"]) >= recipe.TINY.base.evaluations
    assert log["curves"]["draft"]["held_out_is"] == "acceptance"


def test_figures_are_those_of_plain_transformers(made, data, figures):
    """Perplexity by the model's own loss, acceptance by a loop over positions; documents add up to the whole."""
    loaded = {name: LlamaForCausalLM.from_pretrained(made / "weights" / name, dtype=torch.float32)
              for name in models.COURSE_MODELS}  # fmt: skip
    ids = [data.heldout.document(n).astype(np.int64) for n in range(data.heldout.documents)]
    total = accepted = count = 0
    with torch.no_grad():
        for document in ids:
            for begin in range(0, len(document) - 1, recipe.TINY.context):
                row = torch.from_numpy(document[begin : begin + recipe.TINY.context + 1])[None]
                out = {name: model(input_ids=row, labels=row) for name, model in loaded.items()}
                total += float(out["course-base"].loss) * (row.shape[1] - 1)
                count += row.shape[1] - 1
                p, q = (o.logits[0, :-1].softmax(-1) for o in out.values())
                accepted += sum(float(torch.minimum(a, b).sum()) for a, b in zip(p, q, strict=True))
    assert count == figures["tokens"] == sum(document["tokens"] for document in figures["documents"])
    assert math.exp(total / count) == pytest.approx(figures["course-base"]["perplexity"], rel=1e-4)
    assert accepted / count == pytest.approx(figures["acceptance"], rel=1e-4)
    assert sum(document["nll"] for document in figures["documents"]) == pytest.approx(total, rel=1e-4)
    assert sum(document["accepted"] for document in figures["documents"]) == pytest.approx(accepted, rel=1e-4)


def test_every_training_window_comes_as_often_as_it_should(data):
    mixture = recipe_data.mixture(recipe.TINY, data)
    library, packages = (Windows(shards, recipe.TINY.context, overlap=1) for shards in (data.library, data.packages))
    expected = Counter(tuple(library[i].tolist()) for i in range(len(library)) for _ in range(2))
    expected += Counter(tuple(packages[i].tolist()) for i in range(len(packages)))
    loader = StreamLoader(mixture, 50, seed=3)
    found = Counter(tuple(row.tolist()) for batch in loader for row in batch["input_ids"])
    assert found == expected and len(mixture) == 2 * len(library) + len(packages)
    assert torch.equal(mixture[5]["input_ids"], mixture.batch([5])["input_ids"][0])


def test_held_out_rows_predict_every_token_once(data):
    rows, owners = recipe_data.heldout_rows(data, 48)
    for number in range(data.heldout.documents):
        mine = rows[[i for i, owner in enumerate(owners) if owner == number]]
        assert mine[0, 0] == data.tokenizer.special_tokens[recipe.END_OF_TEXT]
        predicted = mine[:, 1:][mine[:, 1:] != data.pad]
        assert predicted.tolist() == data.heldout.document(number)[1:].tolist()
        assert torch.equal(mine[1:, 0], mine[:-1, -1])


def test_no_training_text_is_held_out_text(data):
    names = {document.name for document in load_text("course-heldout")}
    assert set(data.heldout_names) <= names
    assert sum(data.sources.values()) == recipe.TINY.text_bytes and recipe_data.LIBRARY in data.sources


def test_encoding_by_several_processes_is_encoding(made, monkeypatch):
    texts = [text[:3000] for text in load_text("course-heldout", limit_bytes=12_000).texts()]
    monkeypatch.setattr(recipe_encode, "GROUP_CHARACTERS", 2000)
    device = os.environ.get("EFFNLP_DEVICE")
    kit = Tokenizer.load(made / "tokenizer")
    found = list(recipe_encode.encode_all(texts, made / "tokenizer", processes=2))
    assert [ids.tolist() for ids in found] == [kit.encode(text, special=False) for text in texts]
    assert len(texts) > 2 and os.environ.get("EFFNLP_DEVICE") == device


def test_the_quick_forward_is_the_models_own(data):
    model = recipe_training.build_model(recipe.TINY, recipe.TINY.base, data).eval()
    ids = torch.randint(0, recipe.TINY.vocabulary, (3, 40))
    own = model.model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(recipe_training.hidden_states(model, ids), own)
    recipe_training.add_dropout(model, 0.5)
    torch.testing.assert_close(recipe_training.hidden_states(model, ids), own)
    assert not torch.allclose(recipe_training.hidden_states(model.train(), ids), own)
    assert model.config.attention_bias and model.config.mlp_bias and model.config.tie_word_embeddings


def test_a_sweep_tries_every_candidate(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(recipe.SWEEPS, "base", ({}, {"base.optimizer": "adamw", "base.learning_rate": 4e-3}))
    monkeypatch.setattr(recipe_training, "TIMED_STEPS", 5)
    assert cli.main([*COMMAND, str(tmp_path), "--sweep", "base", "--seconds", "0.2"]) == 0
    found = json.loads((tmp_path / "sweep.json").read_text())
    assert [row["changes"] for row in found] == list(recipe.SWEEPS["base"])
    assert all(1 < row["perplexity"] < 512 for row in found)
    assert "base, base.optimizer=adamw, base.learning_rate=0.004: held-out perplexity" in capsys.readouterr().out
    assert not (tmp_path / "weights").exists()


def test_settings():
    given = ["base.learning_rate=0.003", "draft.optimizer=adamw", "compile=false", "context=512"]
    changed = recipe.settle("full", given)
    assert (changed.base.learning_rate, changed.draft.optimizer, changed.context) == (0.003, "adamw", 512)
    assert changed.compile is False and changed.base.rows == recipe.FULL.base.rows
    usual, timed = recipe.FULL, recipe.with_seconds(recipe.FULL, 66.0)
    assert timed.base.seconds + timed.draft.seconds == pytest.approx(66)
    assert timed.base.seconds / timed.draft.seconds == pytest.approx(usual.base.seconds / usual.draft.seconds)
    for wrong, sentence in (("rows=3", "There is no setting 'rows'"), ("base.rows=x", "base.rows cannot be 'x'"),
                            ("nothing", "sets nothing"), ("base=3", "There is no setting 'base'")):  # fmt: skip
        with pytest.raises(UsageError, match=sentence):
            recipe.settle("full", [wrong])
    with pytest.raises(UsageError, match="Unknown size 'huge'"):
        recipe.settle("huge")


def test_a_folder_of_another_recipe_is_refused(made, tmp_path, capsys):
    assert cli.main([*COMMAND, str(made), "--set", "base.rows=4"]) == 2
    assert "begun with other settings (base differs)" in capsys.readouterr().err
    assert cli.main([*COMMAND, str(tmp_path), "--sweep", "all"]) == 2
    assert "Unknown sweep 'all'" in capsys.readouterr().err
    recipe_folder.claim(tmp_path, recipe.TINY)
    recipe_folder.claim(tmp_path, replace(recipe.TINY, library_repeats=1))  # nothing that depends on it has begun
    with pytest.raises(UsageError, match="vocabulary differs"):
        recipe_folder.claim(tmp_path, replace(recipe.TINY, vocabulary=600))


# Losses and the optimizer.


def test_losses_are_their_sums():
    torch.manual_seed(0)
    base, draft = 3 * torch.randn(5, 11), 3 * torch.randn(5, 11)
    p, q = base.double().softmax(-1), draft.double().softmax(-1)
    accepted = torch.stack([sum(min(a, b) for a, b in zip(x, y, strict=True)) for x, y in zip(p, q, strict=True)])
    torch.testing.assert_close(acceptance(base, draft).double(), accepted, rtol=1e-5, atol=1e-6)
    divergence = F.kl_div(q.log(), p, reduction="none").sum(-1)
    torch.testing.assert_close(distillation(base, draft, 1.0).double(), divergence, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(distillation(base, draft, 0.0).double(), 1 - accepted, rtol=1e-5, atol=1e-6)
    mixed = distillation(base, draft, torch.tensor(0.25)).double()
    torch.testing.assert_close(mixed, 0.25 * divergence + 0.75 * (1 - accepted), rtol=1e-5, atol=1e-6)
    targets = torch.tensor([1, 5, 0, 10, 3])
    torch.testing.assert_close(next_token_nll(base, targets).double(), -p[torch.arange(5), targets].log())


def test_a_base_model_accepts_itself_always(made, data):
    loss = recipe_training._draft_loss(recipe.TINY, made, data, resolve("cpu"))
    batch = {"input_ids": recipe_data.heldout_rows(data, recipe.TINY.context)[0][:2]}
    refused, count = loss(loss.base, batch)
    assert float(refused) / int(count) == pytest.approx(0, abs=1e-5)
    shares = []
    for done in (0.0, 0.35, 0.7, 0.9):
        loss.at(done)
        shares.append(loss.kl_share)
    assert shares == pytest.approx([1, 0.5, 0, 0])


def test_muon_is_torchs_and_adamw_too():
    torch.manual_seed(0)
    shapes = [(64, 64), (64, 64), (32, 64), (96, 64), (64, 96), (96, 64), (50,), (7, 5)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    both = MuonAdamW([{"params": ours[:6], "muon": True}, {"params": ours[6:]}], lr=1e-2, weight_decay=0.2)
    muon = torch.optim.Muon(theirs[:6], lr=1e-2, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(theirs[6:], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.2)
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        both.step()
        muon.step()
        adamw.step()
    for a, b in zip(ours[:6], theirs[:6], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-3)  # products of bfloat16 in another order
    for a, b in zip(ours[6:], theirs[6:], strict=True):
        torch.testing.assert_close(a, b)
    singular = torch.linalg.svdvals(orthogonalize(torch.randn(3, 40, 24)).float())
    assert 0.5 < singular.min() and singular.max() < 1.5
    with pytest.raises(ValueError, match="Muon updates matrices"):
        MuonAdamW([{"params": [torch.nn.Parameter(torch.zeros(3))], "muon": True}])


def test_every_parameter_has_its_optimizer(data):
    model = recipe_training.build_model(recipe.TINY, recipe.TINY.base, data)
    matrices, embeddings, vectors = parameter_groups(model)
    assert embeddings["params"] == [model.model.embed_tokens.weight] and matrices["muon"]
    assert len(matrices["params"]) == 7 * recipe.TINY.base.layers and vectors["weight_decay"] == 0
    assert sum(len(group["params"]) for group in (matrices, embeddings, vectors)) == len(list(model.parameters()))


# Loading.


@pytest.mark.parametrize("name", models.COURSE_MODELS)
def test_load_model_is_plain_transformers(made, name, monkeypatch):
    monkeypatch.setattr(models, "WEIGHTS", made / "weights")
    folder = made / "weights" / name
    ids = torch.randint(0, 500, (2, 30))
    plain = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for found in (load_model(name, device="cpu"), load_model(folder, device=torch.device("cpu"), dtype="fp32"),
                  load_model(str(folder), device=resolve("cpu"))):  # fmt: skip
        assert isinstance(found, LlamaForCausalLM) and found.dtype == torch.float32 and not found.training
        with torch.no_grad():
            assert torch.equal(found(input_ids=ids).logits, plain(input_ids=ids).logits)
    stored = LlamaForCausalLM.from_pretrained(folder)
    assert stored.dtype == torch.bfloat16 == load_model(name, device="cpu", dtype="bf16").dtype
    assert stored.lm_head.weight is stored.model.embed_tokens.weight
    text = "def f(self):\n" + load_text("course-english", limit_bytes=3000).__iter__().__next__().text[:2000]
    assert load_tokenizer(name)(text).input_ids == AutoTokenizer.from_pretrained(folder)(text).input_ids


def test_tokenizers_encodes_as_the_kit_does(made):
    kit = Tokenizer.load(made / "weights" / "course-base")
    theirs = HuggingFaceTokenizer.from_file(str(made / "weights" / "course-base" / "tokenizer.json"))
    through = load_tokenizer(made / "weights" / "course-draft")
    odd = ["", " ", "\t\n\r\n  x", "naïve 東京 \U0001f600 e\u0301", "a<|endoftext|>b<|pad|>", "x = 0b1010\n\n\n"]
    for text in [*odd, *load_text("course-heldout", limit_bytes=40_000).texts()]:
        assert kit.encode(text) == theirs.encode(text).ids == through(text).input_ids
        assert kit.decode(kit.encode(text)) == through.decode(through(text).input_ids) == text
    assert through.eos_token == through.bos_token == recipe.END_OF_TEXT and through.pad_token == recipe.PAD
    assert through.pad_token_id != through.eos_token_id and len(through) == kit.vocab_size == recipe.TINY.vocabulary


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("course-bas", "did you mean course-base?"),
        ("Course-Draft", "did you mean course-draft?"),
        ("draft", "did you mean course-draft?"),
        ("course-x", "choose one of course-base, course-draft"),
        ("", "There is no model"),
        ("./nowhere", "There is no folder ./nowhere"),
        (Path("nowhere"), "There is no folder nowhere"),
        (Path(__file__), "is a file: give the folder"),
    ],
)
@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_unknown_names(name, sentence, load):
    with pytest.raises(UsageError) as error:
        load(name)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def copy_of(made: Path, target: Path) -> Path:
    target.mkdir(parents=True)
    for path in (made / "weights" / "course-draft").iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_weights_that_are_cut_short(made, tmp_path, kept):
    folder = copy_of(made, tmp_path / "model")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:kept])
    with pytest.raises(UsageError, match="model.safetensors of the folder model is damaged or cut short"):
        load_model(folder, device="cpu")


def test_weights_that_are_missing_or_do_not_fit(made, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "WEIGHTS", tmp_path / "weights")
    with pytest.raises(UsageError, match="weights of course-base are missing .*effnlp train-course-models"):
        load_model("course-base", device="cpu")
    with pytest.raises(UsageError, match="tokenizer of course-base is missing"):
        load_tokenizer("course-base")
    folder = copy_of(made, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(UsageError, match="do not fit its config.json"):
        load_model(folder, device="cpu")
    (folder / "config.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be loaded"):
        load_model(folder, device="cpu")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="are missing .no model.safetensors"):
        load_model(folder, device="cpu")
    with pytest.raises(UsageError, match="Unknown dtype 'float99'"):
        load_model(made / "weights" / "course-base", device="cpu", dtype="float99")


def test_hub_names_go_to_the_hub(monkeypatch):
    asked = []

    def pretend(name, **options):
        asked.append((name, options))
        if name == "owner/absent":
            raise OSError("We couldn't connect to the hub.\nMore lines")
        return torch.nn.Linear(2, 2)

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", pretend)
    load_model("HuggingFaceTB/SmolLM2-135M", device="cpu", attn_implementation="sdpa")
    assert asked == [("HuggingFaceTB/SmolLM2-135M", {"dtype": torch.float32, "attn_implementation": "sdpa"})]
    with pytest.raises(UsageError) as error:
        load_model("owner/absent", device="cpu")
    assert "'owner/absent' could not be loaded from the hub (We couldn't connect to the hub)" in str(error.value)
    assert "course-base" in str(error.value) and "More lines" not in str(error.value)


# The shipped weights.

@pytest.fixture(scope="module")
def log() -> dict:
    return json.loads((WEIGHTS / "training.json").read_text())


def test_shipped_files_are_those_of_the_log(log):
    for name in models.COURSE_MODELS:
        path = WEIGHTS / name / "model.safetensors"
        assert path.stat().st_size < 16 * MIB
        assert hashlib.sha256(path.read_bytes()).hexdigest() == log["sha256"][name]
        model = load_model(name, device="cpu", dtype="bf16")
        assert sum(p.numel() for p in model.parameters()) == log["figures"][name]["parameters"]
        assert model.config.attention_bias and model.config.mlp_bias and model.config.tie_word_embeddings
    sizes = [log["figures"][name]["parameters"] for name in models.COURSE_MODELS]
    assert 6e6 < sizes[0] < 8e6 and 0.8e6 < sizes[1] < 1.5e6
    tokenizers = {(WEIGHTS / name / "tokenizer.json").read_bytes() for name in models.COURSE_MODELS}
    assert len(tokenizers) == 1 and Tokenizer.load(WEIGHTS / "course-base").vocab_size == 4096


def test_shipped_models_are_as_good_as_the_labs_need(log):
    figures, card = log["figures"], (WEIGHTS / "README.md").read_text()
    assert figures["course-base"]["perplexity"] <= 13.0 and figures["acceptance"] >= 0.5
    assert card == recipe_card.card(_recipe_of(log), log)
    assert f"{figures['course-base']['perplexity']:.2f}" in card and f"Python {figures['python']}" in card


def test_shipped_figures_measured_again(log):
    """On held-out documents that are the same in this Python's library, as many as take some seconds."""
    here = {document.name: document.text for document in load_text("course-heldout")}
    digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in here.items()}
    same = [document for document in log["figures"]["documents"] if digests.get(document["name"]) == document["sha256"]]
    chosen = [document for document in sorted(same, key=lambda d: d["tokens"]) if document["tokens"] >= 200][:6]
    assert len(chosen) >= 3, "too few held-out documents of this Python's library are those of the log"
    tokenizer = load_tokenizer("course-base")
    base, draft = (load_model(name, device="cpu", dtype="float32") for name in models.COURSE_MODELS)
    context, end = log["figures"]["context"], tokenizer.eos_token_id
    total = accepted = 0.0
    with torch.no_grad():
        for document in chosen:
            ids = torch.tensor([end, *tokenizer(here[document["name"]], split_special_tokens=True).input_ids, end])
            assert len(ids) - 1 == document["tokens"]
            for begin in range(0, len(ids) - 1, context):
                row = ids[None, begin : begin + context + 1]
                out = base(input_ids=row, labels=row)
                total += float(out.loss) * (row.shape[1] - 1)
                accepted += float(acceptance(out.logits, draft(input_ids=row).logits)[0, :-1].sum())
    assert total == pytest.approx(sum(document["nll"] for document in chosen), rel=2e-3)
    assert accepted == pytest.approx(sum(document["accepted"] for document in chosen), rel=2e-3)


def _recipe_of(log: dict) -> recipe.Recipe:
    held = dict(log["recipe"])
    parts = {name: recipe.ModelRecipe(**held.pop(name)) for name in ("base", "draft")}
    return recipe.Recipe(**parts, **{**held, "special_tokens": tuple(held["special_tokens"])})
