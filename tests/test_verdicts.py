"""Verdicts follow the rule that was fixed beforehand, and what a user writes wrongly is named."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from uke.errors import InputError
from uke.files import read_yaml
from uke.report import verdicts
from uke.report.verdicts import FAILS, HOLDS, IN_PART, NOT_SHOWN, UNTESTABLE, Claim, judge

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
        ((3.0, -1.0, 5.0), NOT_SHOWN, NOT_SHOWN, NOT_SHOWN),
        ((3.0, 0.0, 5.0), NOT_SHOWN, NOT_SHOWN, NOT_SHOWN),  # touches zero
        ((0.5, -2.0, 3.0), FAILS, FAILS, FAILS),  # within the margin: nothing
        ((0.0, 0.0, 0.0), FAILS, FAILS, FAILS),
        ((1.0, 0.5, 1.5), HOLDS, FAILS, HOLDS),  # small, but on one side
        ((3.0, None, None), NOT_SHOWN, NOT_SHOWN, NOT_SHOWN),  # one batch has no interval
        (None, UNTESTABLE, UNTESTABLE, UNTESTABLE),
    ],
)
def test_one_world_by_sign_and_interval(number, plus, minus, either):
    assert (word("+", number), word("-", number), word("either", number)) == (plus, minus, either)


SURE, HINT, AGAINST = (3.0, 1.0, 5.0), (3.0, -1.0, 5.0), (-3.0, -5.0, -1.0)
SAME = (0.0, -1.0, 1.0)


def test_a_claim_holds_only_if_it_holds_in_every_world():
    assert word("+", SURE, SURE) == word("either", AGAINST, AGAINST) == HOLDS
    for worlds in ((SURE, HINT), (HINT, SURE), (SURE, AGAINST), (SURE, SAME)):
        assert word("+", *worlds) == IN_PART
    assert word("either", SURE, AGAINST) == word("either", HINT, SURE) == IN_PART
    assert word("+", AGAINST, AGAINST) == word("+", AGAINST, SAME) == word("either", SAME) == FAILS
    assert word("+", AGAINST, HINT) == word("either", HINT, SAME) == NOT_SHOWN


def test_a_world_without_the_number_does_not_count():
    claim = Claim(key="c", claim="c", number="a.b", sign="+")
    verdict = judge(claim, {"one": {"a.b": said(*SURE)}, "two": {}})
    assert (verdict.word, verdict.worlds) == (HOLDS, 1)
    assert judge(claim, {"one": {"a.b": said(*SURE)}, "two": {"a.b": said(*SURE)}}).worlds == 2
    assert judge(claim, {}).word == UNTESTABLE and "`a.b`" in judge(claim, {}).reason


@pytest.mark.parametrize(
    ("sign", "than", "own", "other", "expected"),
    [
        ("+", 80, (90, 85, 95), None, HOLDS),
        ("+", 90, (90, 85, 95), None, NOT_SHOWN),
        ("+", 90, (85, 80, 89), None, FAILS),
        ("+", 90, (95, None, None), None, NOT_SHOWN),
        # Intervals that touch do not tell two numbers apart.
        ("-", "a.c", (20, 17, 23), (30, 29, 32), HOLDS),
        ("-", "a.c", (20, 17, 29), (30, 29, 32), NOT_SHOWN),
        ("-", "a.c", (40, 39, 43), (30, 29, 32), FAILS),
        ("-", "a.c", (20, 17, 23), None, UNTESTABLE),
        ("opposite", "a.c", SURE, AGAINST, HOLDS),
        ("opposite", "a.c", AGAINST, SURE, HOLDS),
        ("opposite", "a.c", HINT, AGAINST, NOT_SHOWN),
        ("opposite", "a.c", SURE, SURE, FAILS),
        ("opposite", "a.c", SURE, SAME, FAILS),
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
    shown = ["c", "", "", f"{UNTESTABLE}: another size", 0, ""]
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
    assert all(claim.paper for claim in claims) and sum(claim.ours for claim in claims) == 4
    assert all(claim.could_fail for claim in claims if claim.number)
    paper = read_yaml(ROOT / "params" / "paper.yaml")
    columns = {frozenset(each) - {"ours"} for each in paper["published"]}
    assert len(paper["published"]) >= 30 and len(columns) == 1
    assert {"Table 4", "Table 5"} <= {each["paper"] for each in paper["correspondence"]}


def test_shares_have_a_margin_of_three_hundredths_and_ours_are_counted_apart():
    share = said(0.01, -0.02, 0.02) | {"unit": ""}
    claims = [
        Claim(key="x", claim="x", number="a.b", sign="+", ours=ours) for ours in (True, False)
    ]
    claims.append(Claim(key="y", claim="y", untestable="z"))
    judged = [judge(claim, {"w": {"a.b": share}}) for claim in claims]
    assert [each.word for each in judged] == [FAILS, FAILS, UNTESTABLE]
    paper, ours = verdicts.counts(judged), verdicts.counts(judged, ours=True)
    assert (paper[FAILS], paper[UNTESTABLE], ours[FAILS], ours[UNTESTABLE]) == (1, 1, 1, 0)
    assert list(paper) == list(verdicts.WORDS)
    wide = judge(claims[0], {"w": {"a.b": said(0.01, -0.2, 0.2) | {"unit": ""}}})
    assert wide.word == NOT_SHOWN
