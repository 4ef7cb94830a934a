"""The findings as a reader meets them: in a real browser, from the disk."""

import pytest
from support import browser, logged_runs
from support.findings import CASES, FLAT, STEPS, history

from trl_a3po.report import write_report


pytestmark = [pytest.mark.slow, pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium is installed")]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    page = browser.Page(tmp_path_factory.mktemp("browser"))
    yield page
    trouble = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
    page.run("new Promise((done) => setTimeout(done, 50))")
    found = [event for event in page.events if event["method"] in trouble]
    page.close()
    assert found == []


def show(page, directory, **runs):
    for name, metrics in runs.items():
        logged_runs.write_state(directory / name, history(**metrics), STEPS)
    page.open(write_report([directory / name for name in runs], directory / "report.html"))


def texts(page, selector):
    return page.run(f"[...document.querySelectorAll({selector!r})].map((node) => node.textContent)")


def test_a_report_opens_with_them(page, tmp_path):
    show(page, tmp_path, mine=CASES["learning rate at 0"][0])
    assert texts(page, "h2")[0] == "Findings"
    assert texts(page, ".finding h3") == ["learning rate at 0"]
    [seen] = texts(page, ".finding li")
    assert seen.startswith("Since step 31: the learning rate is 1e-09")
    assert "lr_scheduler_type" in texts(page, ".finding code")


def test_a_healthy_run_is_said_to_be_one(page, tmp_path):
    show(page, tmp_path, mine={})
    assert texts(page, ".finding") == []
    assert texts(page, "#findings .note") == ["None. This run looks healthy, as far as the log tells."]


def test_two_runs_are_compared_finding_by_finding(page, tmp_path):
    show(page, tmp_path, mine=CASES["clip share high"][0], theirs=CASES["tool calls fail"][0])
    assert texts(page, ".finding h3") == ["clip share high", "tool calls fail"]
    first, second, third, fourth = texts(page, ".finding li")
    assert first.startswith("mine: Since step 1: the ratio of 30 %")
    assert (second, third) == ("theirs: not found.", "mine: not found.")
    assert fourth.startswith("theirs: Since step 1: 50 % of the tool calls failed")


@pytest.mark.parametrize(("rule", "title"), [("learning rate at 0", "learning_rate "), ("reward flat", "Reward mean")])
def test_a_finding_leads_to_its_chart(rule, title, page, tmp_path):
    # One is drawn from the start, the other among the other metrics.
    show(page, tmp_path, mine=CASES[rule][0])
    page.run("document.querySelector('.finding a').click()")
    assert texts(page, "figure.found h3") == [title]
    top, bottom = page.run(
        "(({ top, bottom }) => [top, bottom])(document.querySelector('figure.found').getBoundingClientRect())"
    )
    assert 0 <= top < bottom <= page.run("window.innerHeight")


def test_long_lines_are_smoothed_and_the_raw_ones_stay(page, tmp_path):
    show(page, tmp_path, mine=FLAT)
    lines = "document.querySelector('.chart').querySelectorAll('polyline')"
    assert page.run(f"{lines}.length") == 2
    raw, smooth = (
        page.run(f"{lines}[{i}].getAttribute('points').split(' ').map((point) => Number(point.split(',')[1]))")
        for i in (0, 1)
    )
    assert len(raw) == len(smooth) == STEPS
    assert max(smooth) - min(smooth) < 0.8 * (max(raw) - min(raw))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_text_has_contrast(scheme, page, tmp_path):
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    show(page, tmp_path, mine=FLAT)
    ink, card = page.run(
        "['color', 'backgroundColor'].map((name) => getComputedStyle(document.querySelector('.finding'))[name]"
        ".match(/\\d+/g).map(Number))"
    )
    light, dark = sorted((sum(ink), sum(card)), reverse=True)
    assert light - dark > 500
    assert (sum(card) > sum(ink)) == (scheme == "light")


def test_hostile_names_stay_text(page, tmp_path):
    metrics = {}
    for text in logged_runs.HOSTILE:
        metrics |= {f"rewards/{text}/mean": 0.0, f"rewards/{text}/std": 0.0}
    show(page, tmp_path, mine={**metrics, **FLAT})
    assert texts(page, ".finding h3") == ["a reward function that gives nothing"]
    page.run("document.querySelector('.finding a').click()")
    assert page.run("typeof globalThis.broken") == "undefined"
    assert page.run("document.querySelectorAll('.finding img, .finding script').length") == 0
