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
    shown = verdicts.evidence({"w": [verdict]})["ours, or why none"].item()
    assert shown == "8: 3.0 points, n = 40; 24: 3.0 points, n = 40"
    assert judge(claim, {"w": numbers | {"batch.40.lead": said(*AGAINST)}}).word == IN_PART


def test_the_reason_of_an_untestable_claim_is_shown_whatever_the_numbers_say():
    claim = Claim(key="c", claim="c", untestable="another size")
    verdict = judge(claim, {"w": {"a.b": said(*SURE)}})
    assert (verdict.word, verdict.worlds, verdict.evidence) == (UNTESTABLE, 0, ())
    both = {"w": [verdict], "v": [verdict]}
    shown = [["c", "", "any", UNTESTABLE, "another size", ""]]  # once, not for each setting
    assert verdicts.evidence(both).values.tolist() == shown
    cells = ["c", *["not\u00a0testable"] * 2, "another size"]
    assert verdicts.table(both).values.tolist() == [cells]


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


def test_every_setting_that_has_numbers_is_a_column_and_is_judged_by_its_own(tmp_path):
    claims = [
        Claim(key="lead", claim="l", number="single.lead", sign="+", could_fail={"smol*": "yes"}),
        Claim(key="slope", claim="s", number="batch.trend", sign="+"),
    ]
    sections = {
        "07_recipe": {"numbers": {"single.lead": said(*SURE)}},
        verdicts.NOTEBOOK: {"numbers": {"batch.trend": said(*SURE)}},  # an old verdict counts not
    }
    paths = run(tmp_path / "embedded", sections, numbers={"batch.trend": said(*SURE)})

    def judged(of=paths):
        return {at: [judge(c, runs) for c in claims] for at, runs in verdicts.settings(of).items()}

    own = {"embedded model, its world": [HOLDS, "not run"]}
    sure, hint = {"single.lead": said(*SURE)}, {"single.lead": said(*HINT)}
    real = {"single.lead": said(*AGAINST), "batch.trend": said(*SURE) | {"void": "A check."}}
    for name, numbers, column, words in (
        ("quick-unkebench", sure, None, None),  # a trial is no setting
        ("smollm2", None, None, None),  # nor is what has no numbers yet
        ("embedded-world-2", hint, "other worlds", [NOT_SHOWN, "not run"]),
        ("embedded-world-3", sure, "other worlds", [IN_PART, "not run"]),
        ("smollm2-unkebench", real, "SmolLM2, UnKEBench", [FAILS, "not testable"]),
    ):
        run(tmp_path / name, numbers=numbers)
        own |= {column: words} if column else {}
        table = verdicts.table(judged()).drop(columns="claim").replace("\u00a0", " ", regex=True)
        why = table.pop("why not testable").tolist()
        assert table.to_dict("list") == own and list(table) == list(own)
    assert why == ["", "A check"]
    rows = verdicts.evidence(judged()).iloc[:, -2:].values.tolist()
    assert [could for _, could in rows] == ["", "", "yes", ""] and rows[-1][0] == "A check."
    alone = judged(run(tmp_path / "clone", numbers={"batch.trend": said(*SURE)}))  # no sections
    assert list(alone)[:2] == ["clone", "embedded model, its world"]
    assert [each.word for each in alone["clone"]] == [UNTESTABLE, HOLDS]
    assert "no number `single.lead`" in alone["clone"][0].reason


def test_a_claim_on_one_benchmark_is_not_decided_by_the_other():
    keys = {"unkebench": "single.lead", "akew": "akew.single.lead"}
    claims = [Claim(key=of, claim="c", number=keys[of], sign="+", data=of) for of in keys]
    world = {"smollm2": {"single.lead": said(*SURE), "akew.single.lead": said(*AGAINST)}}
    assert [judge(claim, world).word for claim in claims] == [HOLDS, FAILS]
    for name, words in (("unkebench", [HOLDS, UNTESTABLE]), ("akew-mquake", [UNTESTABLE, HOLDS])):
        real = {f"smollm2-{name}": {"single.lead": said(*SURE)}}
        judged = [judge(claim, real) for claim in claims]
        assert [each.word for each in judged] == words
        assert {each.reason for each in judged} == {"", verdicts.OTHER_DATA}


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
        ("{claim: x, number: b.c, sign: '+', than: 1e999}", "field 'than.*finite number"),
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
    assert all(claim.paper for claim in claims) and sum(claim.ours for claim in claims) == 5
    assert all(claim.could_fail for claim in claims if claim.number)
    paper = read_yaml(ROOT / "params" / "paper.yaml", verdicts.PAPER)
    assert len(paper.published) >= 30
    assert {"Table 4", "Table 5"} <= {each.paper for each in paper.correspondence}


def test_shares_have_a_margin_of_three_hundredths_and_ours_are_counted_apart():
    share = said(0.01, -0.02, 0.02) | {"unit": ""}
    decided = {"key": "x", "claim": "x", "number": "a.b", "sign": "+"}
    claims = [Claim(**decided, ours=True), Claim(**decided)]
    claims.append(Claim(key="y", claim="y", untestable="z"))
    judged = [judge(claim, {"w": {"a.b": share}}) for claim in claims]
    assert [each.word for each in judged] == [FAILS, FAILS, UNTESTABLE]
    paper, ours = verdicts.counts(judged), verdicts.counts(judged, ours=True)
    assert (paper[FAILS], paper[UNTESTABLE], ours[FAILS], ours[UNTESTABLE]) == (1, 1, 1, 0)
    assert list(paper) == list(verdicts.WORDS)
    wide = judge(claims[0], {"w": {"a.b": said(0.01, -0.2, 0.2) | {"unit": ""}}})
    assert wide.word == NOT_SHOWN
