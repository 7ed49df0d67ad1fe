"""Predictions, written answers and the policy on assistants: read, graded by closeness, built into the notebooks."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import nbformat
import pytest
import toy
from test_master import GOOD

from effnlp_lab import build, exercises, policy
from effnlp_lab.blanks import TEXT_STUB
from effnlp_lab.errors import UsageError
from effnlp_lab.exercises.closeness import closeness, points_of, predicted_values
from effnlp_lab.exercises.spec import Guess, Prediction, SpecError, Written
from effnlp_lab.master import MasterError, read_master

ROOT = Path(__file__).resolve().parents[2]
LABS = exercises.lab_names()
RATIO = Prediction("growth", (Guess("my_growth", 3.8, 4.2), Guess('mine["tiled"]', 1.0, 2.0)), reach=4.0)
FULL = Prediction("speed", (Guess("my_speed", 0.1, 0.4, full=(2.0, 4.0)),), reach=2.0)
SHARE = Prediction("share", (Guess("my_share", 10, 20),), reach=40.0, scale="difference")
JUDGED = (
    '# %% tags=["nbval-check-output"]\nprint(LIMIT)\n',
    "# %% [markdown]\n# {assistants} Mind the blanks.\n\n"
    '# %% predict="growth"\nmy_growth = None\nmine = {"tiled": None}\n\n'
    '# %% [markdown] written="why"\n# - 0.5: names the reason\n\n'
    '# %% tags=["nbval-check-output"]\nprint(LIMIT)\n',
)


@pytest.mark.parametrize(("prediction", "value", "share"), [
    (RATIO, 4.0, 1.0), (RATIO, 4.2 * 2, 0.5), (RATIO, 3.8 / 2, 0.5), (RATIO, 4.2 * 4, 0.0), (RATIO, 1e300, 0.0),
    (RATIO, -4.0, 0.0), (RATIO, 0.0, 0.0), (SHARE, 10.0, 1.0), (SHARE, 40.0, 0.5), (SHARE, 0.0, 0.75),
    (SHARE, 61.0, 0.0), (FULL, 0.2, 1.0), (FULL, 3.0, 1.0), (FULL, math.sqrt(2) * 4, 0.5), (FULL, 1.0, 0.0)])
def test_closeness(prediction, value, share):
    assert closeness(prediction, prediction.guesses[0], value) == pytest.approx(share)


@pytest.mark.parametrize(("source", "values"), [
    ('my_growth = 4\nmine = {"tiled": 1.5, "other": None}', (4.0, 1.5)),
    ('my_growth = 2 ** 2\nmine = {}\nmine["tiled"] = -3 + 4.5  # sure', (4.0, 1.5)),
    ("my_growth: float = 1 / 4\n", (0.25, None)),
    ('my_growth = None\nmine = {"tiled": True}', (None, None)),
    ('my_growth = "4"\nmine = [4]', (None, None)),
    ('my_growth = float("nan")\nmine = {"tiled": 10 ** 400}', (None, None)),
    ("my_growth = 1 / 0\n", (None, None)),
    ("my_growth = 1e999\n", (None, None)),
    ("my_growth = 9 ** 9 ** 9\n", (None, None)),
    ("my_growth = __import__('os').getpid()", (None, None)),
    ("my_growth = 4 years", (None, None)),
    ("", (None, None)),
])
def test_predictions_are_read_and_never_run(source, values):
    assert tuple(predicted_values(RATIO, source).values()) == values


def test_a_guess_that_is_not_made_earns_nothing_of_its_share():
    assert points_of(RATIO, {"my_growth": 4.0, 'mine["tiled"]': None}) == round(RATIO.points / 2, 2)
    assert points_of(RATIO, {"my_growth": 4.0, 'mine["tiled"]': 1.5}) == RATIO.points
    assert points_of(RATIO, {}) == 0.0


@pytest.mark.parametrize("change", [
    {"guesses": ()}, {"reach": 1.0}, {"guesses": (Guess("x", 2.0, 1.0),)}, {"guesses": (Guess("x", 0.0, 1.0),)}])
def test_a_prediction_that_cannot_be_graded_is_refused(change):
    with pytest.raises(SpecError, match="prediction growth"):
        dataclasses.replace(RATIO, **change)


@pytest.fixture
def judged_lab(monkeypatch):
    lab = dataclasses.replace(toy.LAB, predictions=(RATIO,), written=(Written("why", 2.0),))
    toy.install(monkeypatch)
    monkeypatch.setattr(toy.Softmax, "mistakes", ())
    monkeypatch.setattr(exercises, "lab", lambda name: lab)
    return lab


def write_master(root: Path, text: str) -> Path:
    path = root / "solutions" / "99_toy" / "toy.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_built_notebooks_ask_and_do_not_tell(judged_lab, tmp_path):
    assert judged_lab.points == judged_lab.checked_points + 2.25
    build.write(read_master(write_master(tmp_path, GOOD.replace(*JUDGED))), tmp_path)
    release = nbformat.read(tmp_path / "labs/99_toy/toy.ipynb", 4)
    nbformat.validate(release)
    cells = {cell.id: cell for cell in release.cells}
    assert cells["written-why"].source == TEXT_STUB and cells["written-why"].metadata.nbgrader.points == 2.0
    assert "names the reason" not in str(release)
    assert "my_growth = None" in cells["predict-growth"].source and "nbgrader" not in cells["predict-growth"].metadata
    noted = cells["noted-growth"]
    assert noted.source == 'effnlp_lab.predicted("growth", my_growth, mine["tiled"])'
    assert noted.metadata.nbgrader.points == 0.25 and noted.metadata.nbgrader.locked


@pytest.mark.parametrize(("old", "new", "words"), [
    ('predict="growth"', 'predict="grow"', "predict='grow' is not in its spec"),
    ("my_growth = None", "your_growth = None", "does not assign my_growth"),
    ('# %% [markdown] written="why"\n# - 0.5: names the reason\n\n', "", "no cell written='why'"),
    ('# %% [markdown] written="why"\n# -', '# %% written="why"\n# -', "is a markdown cell"),
    ('predict="growth"', 'predict="growth" tags=["demo"]', "at once"),
])
def test_masters_that_ask_otherwise_than_their_spec_are_refused(judged_lab, tmp_path, old, new, words):
    text = GOOD.replace(*JUDGED)
    assert text.count(old) == 1
    with pytest.raises(MasterError, match=words):
        read_master(write_master(tmp_path, text.replace(old, new)))


@pytest.mark.parametrize(("setting", "chosen"), [
    ("", "explain"), ('[tool.effnlp]\nassistants = "none"', "none"),
    ('[tool.effnlp]\nassistants = "disclose"', "disclose"),
    ('[tool.effnlp]\nassistants = { default = "disclose", 99_toy = "none" }', "none"),
    ('[tool.effnlp]\nassistants = { default = "disclose", 98_toy = "none" }', "disclose")])
def test_one_setting_states_the_policy(judged_lab, tmp_path, setting, chosen):
    (tmp_path / "pyproject.toml").write_text(setting)
    path = write_master(tmp_path, GOOD.replace(*JUDGED))
    (prose,) = [cell for cell in read_master(path).cells if "Mind the blanks" in cell.source]
    assert prose.source == f"{policy.POLICIES[chosen]} Mind the blanks."
    (tmp_path / "pyproject.toml").write_text("")
    assert [cell.id for cell in read_master(path).cells if "Mind" in cell.source] == [prose.id]


def test_a_policy_that_there_is_not_is_one_sentence(tmp_path):
    (tmp_path / "pyproject.toml").write_text('[tool.effnlp]\nassistants = "sometimes"')
    with pytest.raises(UsageError, match="'sometimes' is no policy.*expected none, explain, disclose"):
        policy.policy_of(tmp_path, "99_toy")


@pytest.mark.parametrize("name", LABS)
def test_every_lab_states_the_policy_asks_for_two_predictions_and_one_answer_in_words(name):
    lab = exercises.lab(name)
    assert len(lab.predictions) >= 2 and len(lab.written) == 1
    path = ROOT / "solutions" / name / f"{lab.notebook}.py"
    assert path.read_text("utf-8").count(policy.PLACE) == 1
    released = nbformat.read(ROOT / "labs" / name / f"{lab.notebook}.ipynb", 4)
    stated = [p for p, words in policy.POLICIES.items() if any(words in c.source for c in released.cells)]
    assert stated == [policy.policy_of(ROOT, name)]
    rubric = next(c.source for c in read_master(path).cells if c.kind == "written")
    shares = [float(line.split(":")[0].removeprefix("- ")) for line in rubric.splitlines() if line.startswith("- ")]
    assert sum(shares) == pytest.approx(1.0)
