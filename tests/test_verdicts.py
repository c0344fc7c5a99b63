"""Verdicts follow the rule that was fixed beforehand, and what a user writes wrongly is named."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from matplotlib.colors import to_hex
from uke.errors import InputError
from uke.files import read_yaml
from uke.report import figures, verdicts
from uke.report.verdicts import FAILS, HOLDS, IN_PART, UNTESTABLE, Claim, judge

ROOT = Path(__file__).parents[1]


def said(value, low=None, high=None):
    number = {"value": value, "low": low, "high": high, "unit": "points"}
    return number | {"said": f"{value} points, n = 40"}


def word(sign, *numbers, than=0.0, key="a.b"):
    """The verdict where each world has one number, (value, low, high), or None."""
    worlds = {f"w{at}": {"a.b": said(*each)} if each else {} for at, each in enumerate(numbers)}
    return judge(Claim(key="c", claim="c", number=key, sign=sign, than=than), worlds).word


@pytest.mark.parametrize(
    ("number", "plus", "minus", "either"),
    [
        ((3.0, 1.0, 5.0), HOLDS, FAILS, HOLDS),
        ((-3.0, -5.0, -1.0), FAILS, HOLDS, HOLDS),
        ((3.0, -1.0, 5.0), IN_PART, FAILS, FAILS),
        ((-3.0, -5.0, 1.0), FAILS, IN_PART, FAILS),
        ((3.0, 0.0, 5.0), IN_PART, FAILS, FAILS),  # touches zero, so it does not exclude it
        ((-3.0, -5.0, 0.0), FAILS, IN_PART, FAILS),
        ((0.0, -1.0, 1.0), FAILS, FAILS, FAILS),
        ((0.0, 0.0, 0.0), FAILS, FAILS, FAILS),
        ((3.0, None, None), IN_PART, FAILS, FAILS),  # one batch has no interval
        (None, UNTESTABLE, UNTESTABLE, UNTESTABLE),
    ],
)
def test_one_world_by_sign_and_interval(number, plus, minus, either):
    assert (word("+", number), word("-", number), word("either", number)) == (plus, minus, either)


SURE, HINT, AGAINST = (3.0, 1.0, 5.0), (3.0, -1.0, 5.0), (-3.0, -5.0, -1.0)


def test_a_claim_holds_only_if_it_holds_in_every_world():
    assert word("+", SURE, SURE) == word("either", AGAINST, AGAINST) == HOLDS
    for worlds in ((SURE, HINT), (HINT, SURE), (SURE, AGAINST), (AGAINST, HINT)):
        assert word("+", *worlds) == IN_PART
    assert word("either", SURE, AGAINST) == word("either", SURE, HINT) == IN_PART
    assert word("+", AGAINST, AGAINST) == word("+", AGAINST, (0.0, -1.0, 1.0)) == FAILS
    assert word("either", HINT, HINT) == FAILS


def test_a_world_without_the_number_does_not_count():
    claim = Claim(key="c", claim="c", number="a.b", sign="+")
    verdict = judge(claim, {"one": {"a.b": said(*SURE)}, "two": {}})
    assert (verdict.word, verdict.worlds) == (HOLDS, 1)
    assert judge(claim, {"one": {"a.b": said(*SURE)}, "two": {"a.b": said(*SURE)}}).worlds == 2
    assert judge(claim, {}).word == UNTESTABLE and "`a.b`" in judge(claim, {}).reason


@pytest.mark.parametrize(
    ("sign", "than", "own", "other", "expected"),
    [
        ("+", 0.99, (0.995, 0.991, 1.0), None, HOLDS),
        ("+", 0.99, (0.995, 0.98, 1.0), None, IN_PART),
        ("+", 0.99, (0.98, 0.95, 1.0), None, FAILS),
        ("+", 0.99, (1.0, None, None), None, IN_PART),
        # Intervals that touch do not tell two numbers apart.
        ("-", "a.c", (0.2, 0.17, 0.23), (0.3, 0.29, 0.32), HOLDS),
        ("-", "a.c", (0.2, 0.17, 0.29), (0.3, 0.29, 0.32), IN_PART),
        ("-", "a.c", (0.4, 0.39, 0.43), (0.3, 0.29, 0.32), FAILS),
        ("-", "a.c", (0.2, 0.17, 0.23), None, UNTESTABLE),
        ("opposite", "a.c", SURE, AGAINST, HOLDS),
        ("opposite", "a.c", AGAINST, SURE, HOLDS),
        ("opposite", "a.c", HINT, AGAINST, IN_PART),
        ("opposite", "a.c", SURE, SURE, FAILS),
        ("opposite", "a.c", SURE, (0.0, -1.0, 1.0), FAILS),
    ],
)
def test_a_number_against_a_bound_or_another_number(sign, than, own, other, expected):
    numbers = {"a.b": said(*own)} | ({} if other is None else {"a.c": said(*other)})
    verdict = judge(Claim(key="c", claim="c", number="a.b", sign=sign, than=than), {"w": numbers})
    assert verdict.word == expected
    if sign == "opposite":
        assert [each.key for each in verdict.evidence] == ["a.b", "a.c"] and verdict.worlds == 1


def test_every_number_that_a_pattern_matches_must_agree_and_deeper_keys_do_not_match():
    claim = Claim(key="c", claim="c", number="batch.*.lead", sign="+")
    numbers = {f"batch.{size}.lead": said(*SURE) for size in (24, 8)}
    numbers |= {key: said(*AGAINST) for key in ("batch.8.ft_m.lead", "akew.batch.8.lead")}
    verdict = judge(claim, {"w": numbers})
    assert verdict.word == HOLDS
    assert [each.key for each in verdict.evidence] == ["batch.8.lead", "batch.24.lead"]
    shown = verdicts.table([verdict])["ours"].item()
    assert shown == "8: 3.0 points, n = 40; 24: 3.0 points, n = 40"
    assert judge(claim, {"w": numbers | {"batch.40.lead": said(*AGAINST)}}).word == IN_PART


def test_the_reason_of_an_untestable_claim_is_shown_whatever_the_numbers_say():
    claim = Claim(key="c", claim="c", untestable="another size")
    verdict = judge(claim, {"w": {"a.b": said(*SURE)}})
    assert (verdict.word, verdict.worlds, verdict.evidence) == (UNTESTABLE, 0, ())
    shown = ["c", "", "", f"{UNTESTABLE}: another size", 0]
    assert verdicts.table([verdict]).iloc[0].tolist() == shown


def run(folder, sections=None, numbers=None):
    """Paths of a run with these sections (or with this numbers.json alone)."""
    paths = SimpleNamespace(figures=folder, sections=folder.parent / "results" / folder.name)
    folder.mkdir(parents=True)
    paths.sections.mkdir(parents=True)
    for name, content in (sections or {}).items():
        written = {"notebook": name, "body": [], "smoke_run": False} | content
        (paths.sections / f"{name}.json").write_text(json.dumps(written))
    if numbers is not None:
        (folder / "numbers.json").write_text(json.dumps(numbers))
    return paths


def test_numbers_come_from_this_run_and_from_the_other_worlds_beside_it(tmp_path):
    sections = {
        "07_recipe": {"numbers": {"single.lead": said(*SURE)}},
        "08_batch_size": {"numbers": {"batch.trend": said(*SURE)}, "smoke_run": True},
        verdicts.NOTEBOOK: {"numbers": {"verdict.a": said(1)}},
    }
    paths = run(tmp_path / "embedded", sections, numbers={"old": said(1)})
    run(tmp_path / "embedded-world-2", numbers={"single.lead": said(*HINT)})
    run(tmp_path / "quick-world-2")
    found = verdicts.gather(paths)
    names = {name: list(numbers) for name, numbers in found.items()}
    assert names == {"embedded": ["single.lead"], "embedded-world-2": ["single.lead"]}
    assert judge(Claim(key="c", claim="c", number="single.lead", sign="+"), found).word == IN_PART
    assert verdicts.gather(run(tmp_path / "quick")) == {"quick": {}}
    alone = run(tmp_path / "clone", numbers={"a.b": said(1)})  # has no sections
    assert list(verdicts.gather(alone)["clone"]) == ["a.b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{claim: x, number: b.c, sgin: '+'}", "field 'sgin': .*did you mean 'sign'"),
        ("{number: b.c, sign: '+'}", "field 'claim': Field required"),
        ("{claim: x}", "expected a number and its sign, or the reason"),
        ("{claim: x, number: b}", "expected a number and its sign"),
        ("{claim: x, number: b, sign: '+', untestable: y}", "expected a number and its sign"),
        ("{claim: x, number: b.c, sign: up}", "field 'sign': Input should be .* found 'up'"),
        ("{claim: x, number: b.c, sign: opposite}", "than: expected the key"),
        ("{claim: x, number: 3, sign: '+'}", "field 'number': Input should be .* found 3"),
        ("{claim: x, number: b.c, sign: '+', than: .nan}", "field 'than.*finite number"),
        ("[1]", "must be a mapping, not list"),
    ],
)
def test_a_claim_written_wrongly_is_named(tmp_path, text, message):
    (tmp_path / "claims.yaml").write_text(f"a: {text}")
    with pytest.raises(InputError, match=f"claims.yaml: a.*{message}"):
        verdicts.claims(tmp_path / "claims.yaml")


def test_the_committed_files_are_sound():
    claims = verdicts.claims(ROOT / "params" / "claims.yaml")
    assert len({claim.label for claim in claims}) == len(claims) >= 15
    assert all(claim.paper for claim in claims)
    paper = read_yaml(ROOT / "params" / "paper.yaml")
    columns = {frozenset(each) - {"ours"} for each in paper["published"]}
    assert len(paper["published"]) >= 30 and len(columns) == 1
    assert {"Table 4", "Table 5"} <= {each["paper"] for each in paper["correspondence"]}


def test_the_figure_turns_every_number_into_the_direction_of_its_claim():
    numbers = {"a.b": said(-2.0, -4.0, -1.0), "a.c": said(0.98, 0.97, 0.995)}
    numbers |= {"a.d": said(1.0, -1.0, 2.0)}
    claims = [("down", "a.b", "-", 0), ("bound", "a.c", "+", 0.99), ("either", "a.b", "either", 0)]
    claims += [("opposite", "a.b", "opposite", "a.d"), ("none", "q", "+", 0)]
    fields = ("label", "number", "sign", "than")
    claims = [Claim(key="x", claim="x", **dict(zip(fields, c, strict=True))) for c in claims]
    judged = [judge(claim, {"w": numbers}) for claim in claims]
    frame = verdicts.points(judged).set_index("claim")
    ends = frame[["value", "low", "high"]]
    assert ends.loc["down"].tolist() == ends.loc["either"].tolist() == [2, 1, 4]
    assert ends.loc["bound"].tolist() == pytest.approx([-0.01, -0.02, 0.005])
    assert frame.loc["opposite", "value"].tolist() == [2, -1]
    words = ["b: -2.0 points", "d: 1.0 points"]
    assert frame.loc["opposite", "text"].tolist() == words and "none" not in frame.index
    (axes,) = figures.claims(frame.reset_index()).axes
    drawn = [(float(line.get_xdata()[0]), to_hex(line.get_color())) for line in axes.lines[1:]]
    colours = {word: look.colour for word, look in figures.VERDICTS.items()}
    places = [(0.5, HOLDS), (-0.5, FAILS), (0.5, HOLDS), (0.5, IN_PART), (-0.25, IN_PART)]
    assert drawn == [(place, colours[word]) for place, word in places]
    assert set(figures.VERDICTS) == set(verdicts.WORDS) - {UNTESTABLE}
    counted = verdicts.counts(judged)
    assert counted == {HOLDS: 2, IN_PART: 1, FAILS: 1, UNTESTABLE: 1}
