"""The page of a replay: its numbers against what is printed, names from outside, its file, and a look at it in a browser."""

import os
import re
import shlex
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from browser import NAMES, Browser, browser, find_browser
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from tiercache import ConfigError, cli
from tiercache.demo import FormulaRows
from tiercache.lab.formats import save_csv
from tiercache.lab.synthetic import zipf
from tiercache.report import measure, words
from tiercache.report.draw import even_ticks, power_ticks, spread
from tiercache.report.file import MARK, report_file
from tiercache.report.html import Html, tag
from tiercache.storage.pack import pack_rows
from tiercache.store import Store

FIGURES = {"curve-0", "served", "reads", "working-0", "working-1", "working-2"}
OUTSIDE = "a<img src=x onerror=alert(1)>&amp;'\"]]>.csv"
_VOID = {"meta", "link"}


class Parsed(HTMLParser):
    """A page: its elements by id as text, its tables by id as rows of cells, its figures, all of its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, str | None]] = []
        self.ids: dict[str, str] = {}
        self.tables: dict[str, list[list[str]]] = {}
        self.figures: dict[str, list[str]] = {}
        self.attributes: list[tuple[str, str, str]] = []
        self.text: dict[str, str] = {}
        self.feed(text)
        self.close()
        assert not self.open, "an element is not closed"

    def handle_starttag(self, name, attributes):
        given = dict(attributes)
        self.attributes += [(name, key, value or "") for key, value in attributes]
        if id_ := given.get("id"):
            assert id_ not in self.ids, f"{id_} twice"
            self.ids[id_] = ""
        if name == "figure":
            self.figures[id_.removeprefix("figure-")] = []
        if name == "svg":
            self.figures[self.inside("figure").removeprefix("figure-")].append(given["aria-label"])
            assert given["role"] == "img"
        if name == "table":
            self.tables[id_] = []
        if name == "tr":
            self.tables[self.inside("table")].append([])
        if name in ("td", "th"):
            self.tables[self.inside("table")][-1].append("")
        if name not in _VOID:
            self.open.append((name, id_))

    def handle_endtag(self, name):
        assert self.open.pop()[0] == name, "elements are not nested"

    def handle_data(self, data):
        if self.open:
            name = self.open[-1][0]
            self.text[name] = self.text.get(name, "") + data
            if name in ("td", "th"):
                self.tables[self.inside("table")][-1][-1] += data
            for _, id_ in self.open:
                if id_:
                    self.ids[id_] += data

    def inside(self, wanted):
        return next(id_ for name, id_ in reversed(self.open) if name == wanted)


class Made(NamedTuple):
    """A report, what its command printed, and the command."""

    path: Path
    printed: str
    command: list[str]

    @property
    def page(self) -> Parsed:
        return Parsed(self.path.read_text())


def invoke(*arguments: object, width: int = 200):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "console", Console(width=width))
        return CliRunner().invoke(cli.app, [str(each) for each in arguments])


def make(path: Path, *arguments: object) -> Made:
    command = ["replay", *map(str, arguments), "--report", str(path)]
    result = invoke(*command)
    assert result.exit_code == 0, result.output
    assert f"{path}: the report" in result.stdout.replace("\n", "")
    return Made(path, result.stdout, command)


TEXT = ("--limit", 3000)
OPTIONS: dict[str, tuple[object, ...]] = {
    "policies": (
        *(*TEXT, "--rows", 20_000, "--policy", "lru", "--policy", "gittins", "--policy", "s3fifo"),
        *("--capacity", "256KiB", "--capacity", "1MiB", "--capacity", "64KiB"),
    ),
    "tiers": (*TEXT, "--config", "two.toml", "--table", "b<i>", "--simulate"),
    "live": (*TEXT, "--config", "two.toml", "--table", "b<i>"),
    "one": (*TEXT, "--config", "one.toml"),
    "recording": ("--trace", "rows.trace", "--config", "two.toml", "--simulate"),
    "outside": ("--trace", OUTSIDE, "--capacity", "64KiB"),
}
KINDS = tuple(OPTIONS)


class Reports(dict[str, Made]):
    """A report of each kind, made when a test first asks for it."""

    def __init__(self, here: Path) -> None:
        super().__init__()
        self.here = here

    def __missing__(self, kind: str) -> Made:
        options = [self.here / each if str(each).endswith((".toml", ".trace", ".csv")) else each for each in OPTIONS[kind]]
        if kind == "recording":
            self._record()
        self[kind] = make(self.here / f"{kind}.html", *options)
        return self[kind]

    def _record(self) -> None:
        rng = np.random.default_rng(0)
        with Store.open(self.here / "two.toml") as store, store.record(self.here / "rows.trace"):
            for batch in range(200):
                store.fetch((rng.zipf(1.1, 100) - 1) % 20_000, table=("a", "b<i>")[batch % 2])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    here = tmp_path_factory.mktemp("reports")
    pack_rows(FormulaRows(20_000), here / "table")
    tables = '[[table]]\nname = "a"\npath = "table"\n[[table]]\nname = "b<i>"\npath = "table"\n'
    tiers = '[device]\ndevice = "cpu"\ncapacity = "64KiB"\n[host]\ncapacity = "256KiB"\npolicy = "lru"\n'
    (here / "two.toml").write_text(tables + tiers)
    (here / "one.toml").write_text('[[table]]\npath = "table"\n[host]\ncapacity = "256KiB"\n')
    save_csv(here / OUTSIDE, zipf(20_000, batches=50, size=200))
    return Reports(here)


@pytest.mark.parametrize("kind", KINDS)
def test_every_figure_is_there_twice_with_words_and_numbers(made: Reports, kind: str) -> None:
    page = made[kind].page
    wanted = FIGURES | ({"curve-1"} if kind in ("tiers", "live", "recording") else set())
    wanted |= {"latency"} if kind in ("live", "one") else set()
    assert set(page.figures) == wanted
    for name, labels in page.figures.items():
        assert len(labels) == 2
        assert labels[0] == labels[1] != ""
        assert len(page.tables[f"numbers-{name.split('-')[0] if name.startswith('working') else name}"]) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_has_the_printed_table(made: Reports, kind: str) -> None:
    table = made[kind].page.tables["numbers-results"]
    cells = [[cell for cell in row if cell] for row in table]
    printed = [line.strip() for line in made[kind].printed.splitlines() if "─" not in line]
    first = next(at for at, line in enumerate(printed) if line.split()[:2] == [table[0][0], "MiB"])
    shown = [line.split() for line in printed[first + 1 : first + len(table)]]
    assert [" ".join(row).split() for row in cells[1:]] == shown
    assert all(name in printed[first] for name in table[0])


def test_the_curve_goes_through_the_replays(made: Reports) -> None:
    """A short trace is simulated as a whole, so that the curve's numbers are the replays'."""
    page = made["policies"].page
    head, *body = page.tables["numbers-curve-0"]
    assert head == ["size", "rows", "lru", "gittins", "s3fifo", "Belady", "static", "unbounded"]
    by_rows = {row[1]: dict(zip(head, row, strict=True)) for row in body}
    for policy, mib, hits, static, belady, unbounded, *_ in page.tables["numbers-results"][1:]:
        (row,) = [each for slots, each in by_rows.items() if mib == f"{int(slots.replace(',', '')) * 264 / 2**20:,.1f}"
                  and each[policy].replace("\xa0", "") == hits]  # fmt: skip
        shown = [row[name].replace("\xa0", "") for name in ("static", "Belady", "unbounded")]
        assert shown == [static, belady, unbounded]
    assert "simulations of the whole trace" in page.ids["curves"]
    rates = np.array([[float(cell.split("\xa0")[0]) for cell in row[2:]] for row in body])
    assert (np.diff(rates[:, 3:], axis=0) >= -0.01).all(), "bounds rise with the size"
    assert (rates[:, :3] <= rates[:, 3:4] + 0.01).all(), "nobody beats Belady"


def test_curves_of_tiers_go_through_the_replay(made: Reports) -> None:
    for kind in ("tiers", "live", "recording", "one"):
        page = made[kind].page
        rows = page.tables["numbers-results"][1:]
        both, device = rows[-1][2], rows[0][2]
        host_curve = [row[2].replace("\xa0", "") for row in page.tables[f"numbers-curve-{len(rows) > 1:d}"]]
        assert both in host_curve
        assert device in [row[2].replace("\xa0", "") for row in page.tables["numbers-curve-0"]]


@pytest.mark.parametrize("kind", KINDS)
def test_accesses_are_divided_among_tiers_and_groups(made: Reports, kind: str) -> None:
    page = made[kind].page
    body = page.tables["numbers-served"][1:]
    groups = {"recording": ["a", "b<i>"], "outside": ["all rows"]}.get(kind, ["2-grams", "3-grams"])
    assert [row[0].split(": ")[-1] for row in body] == groups * (len(body) // len(groups))
    numbers = np.array([[int(cell.split()[0].replace(",", "")) for cell in row[1:]] for row in body])
    assert (numbers[:, 0] == numbers[:, 1:].sum(1)).all()
    assert (numbers >= 0).all()
    total = int(re.search(r"Share of ([\d,]+) accesses", made[kind].printed)[1].replace(",", ""))
    results = page.tables["numbers-results"][1:]
    for at in range(0, len(body), len(groups)):
        sums = numbers[at : at + len(groups)].sum(0)
        assert sums[0] == total
        hits = [f"{100 * number / total:.2f}%" for number in sums[1:-2]]
        shown = [row[2] for row in results]
        assert set(hits) <= set(shown)
        assert f"{sums[-1] + sums[-2]:,}" in {cell for row in results for cell in row}, "misses"


def test_only_the_first_uses_of_a_text_are_no_policys_fault(made: Reports) -> None:
    body = made["tiers"].page.tables["numbers-served"][1:]
    fresh = sum(int(row[-1].split()[0].replace(",", "")) for row in body)
    windows = made["tiers"].page.tables["numbers-working"]
    assert f"{fresh:,}" == windows[-1][4], "rows so far, at the end"
    assert sum(int(row[3].replace(",", "")) for row in windows[1:]) == fresh


def test_a_store_that_began_warm_is_not_divided(made: Reports, tmp_path: Path) -> None:
    here = made["one"].path.parent
    config = f'restore = "{tmp_path}/image"\n' + (here / "one.toml").read_text().replace('"table"', f'"{here}/table"')
    (tmp_path / "warm.toml").write_text(config)
    with Store.open(here / "one.toml") as store:
        store.fetch(range(900))
        store.save(tmp_path / "image")
    page = make(tmp_path / "warm.html", "--limit", 500, "--config", tmp_path / "warm.toml").page
    assert "did not begin empty" in page.ids["served"]
    assert "the bounds are those of tiers that do" in page.text["p"]
    assert "served" not in page.figures


@pytest.mark.parametrize("more", [["--simulate"], []], ids=["simulated", "live"])
def test_tiers_that_begin_with_a_hot_set_are_under_no_bound(made: Reports, tmp_path: Path, more: list[str]) -> None:
    here = made["one"].path.parent
    config = (here / "one.toml").read_text().replace('"table"', f'"{here}/table"').replace("256KiB", "4MiB")
    (tmp_path / "cold.toml").write_text(config)
    (tmp_path / "hot.toml").write_text(config + 'hot_set = "hot.npy"\n')
    (tmp_path / "fixed.toml").write_text(config + 'policy = "static"\nhot_set = "hot.npy"\n')
    np.save(tmp_path / "hot.npy", np.arange(10_000))
    false = ("no policy", "no size", "No policy", "nobody had asked", "Best possible")
    for name in ("hot", "cold", "fixed"):
        warm = name == "hot"
        report = make(tmp_path / "page.html", "--limit", 500, "--config", tmp_path / f"{name}.toml", *more)
        text = report.path.read_text()
        assert [each in text for each in false] == [not warm] * len(false)
        assert ("did not begin empty; the bounds" in report.printed) == warm
        assert (text.count("did not begin empty") == 3) == warm, "in the lede, beside the table, and instead of the bars"
        assert ("served" in report.page.figures) != warm
        hits, _, belady, unbounded, *_ = [float(cell) for cell in re.findall(r"([\d.]+)%", report.printed)]
        assert (hits > unbounded) == warm
        assert belady <= unbounded


def test_an_image_that_a_simulation_leaves_out_is_told(made: Reports, tmp_path: Path) -> None:
    here = made["one"].path.parent
    config = (here / "one.toml").read_text().replace('"table"', f'"{here}/table"')
    (tmp_path / "warm.toml").write_text('restore = "image"\n' + config)
    report = make(tmp_path / "page.html", "--limit", 500, "--config", tmp_path / "warm.toml", "--simulate")
    assert "What the config restores is not simulated." in report.printed
    assert "What the config restores is not simulated." in report.page.ids["about"]
    assert "did not begin empty" not in report.path.read_text()


def test_a_long_trace_is_sampled_and_says_how_far_off_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SAMPLED_ROWS", 40_000)
    options = ("--synthetic", "zipf", "--limit", 800, "--batch", 500, "--rows", 200_000)
    said = make(tmp_path / "p.html", *options, "--capacity", "4MiB", "--policy", "lru").page.ids["curves"]
    assert "a sample of 10.00\xa0% of all rows" in said
    assert float(re.search(r"off by at most ([\d.]+) points", said)[1]) < 2


def test_a_damaged_recording_is_told_on_the_page(made: Reports, tmp_path: Path) -> None:
    damaged = tmp_path / "rows.trace"
    damaged.write_bytes((made["recording"].path.parent / "rows.trace").read_bytes()[:-10])
    page = make(tmp_path / "p.html", "--trace", damaged, "--capacity", "64KiB").page
    assert "rows.trace: the file ends within a block's header" in page.ids["about"]
    assert "warning" not in made["recording"].page.ids["about"]


def test_a_hot_set_is_sampled_with_its_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SAMPLED_ROWS", 20_000)
    trace = zipf(20_000, batches=400, size=500)
    save_csv(tmp_path / "t.csv", trace)
    rows, counts = np.unique(trace.rows, return_counts=True)
    np.save(tmp_path / "hot.npy", rows[np.argsort(-counts, kind="stable")])
    pack_rows(FormulaRows(20_000), tmp_path / "table")
    host = '[host]\ncapacity = "1MiB"\npolicy = "static"\nhot_set = "hot.npy"\n'
    (tmp_path / "s.toml").write_text('[[table]]\npath = "table"\n' + host)
    page = make(tmp_path / "p.html", "--trace", tmp_path / "t.csv", "--config", tmp_path / "s.toml", "--simulate").page
    assert "a sample of 10.00\xa0% of all rows" in page.ids["curves"]
    assert float(re.search(r"off by at most ([\d.]+) points", page.ids["curves"])[1]) < 2


def test_the_command_may_be_typed_again(made: Reports) -> None:
    """Options come in the order of the help; each with its value."""
    for each in map(made.__getitem__, KINDS):
        name, command, *options = shlex.split(each.page.text["code"])
        assert [name, command] == ["tiercache", "replay"]
        assert sorted(options) == sorted(each.command[1:])


def test_names_from_outside_are_text(made: Reports) -> None:
    page = made["outside"].page
    assert page.text["h1"] == OUTSIDE
    assert page.text["title"].startswith(f"Replay of {OUTSIDE}")
    for each in map(made.__getitem__, KINDS):
        parsed = each.page
        names = {name for name, _, _ in parsed.attributes}
        assert not names & {"img", "i", "iframe", "a", "base", "object"}
        assert not [key for _, key, _ in parsed.attributes if key.startswith("on") or key in ("src", "style")]
        hrefs = {value for _, key, value in parsed.attributes if key == "href"}
        assert hrefs == {"data:,"}
        assert "http://" not in each.path.read_text()
        assert "https://" not in each.path.read_text()
    assert "b<i>" in {row[0] for row in made["recording"].page.tables["numbers-served"]}


def test_a_name_that_is_no_unicode_is_shown(tmp_path: Path) -> None:
    name = tmp_path / os.fsdecode(b"bad\xff\x01.csv")
    save_csv(name, zipf(100, batches=5, size=20))
    page = make(tmp_path / "p.html", "--trace", name, "--capacity", "8KiB").path.read_bytes().decode()
    assert "<h1>bad\\udcff\N{REPLACEMENT CHARACTER}.csv</h1>" in page


def test_what_is_html_is_escaped_once() -> None:
    assert tag("p", "<&\"'>", Html("<b></b>"), title='"<') == "<p title=\"&quot;&lt;\">&lt;&amp;&quot;&#x27;&gt;<b></b></p>"
    assert tag("meta", http_equiv="a") == '<meta http-equiv="a">'


def test_a_path_that_cannot_be_written_is_told_before_anything_is_read(tmp_path: Path) -> None:
    other = tmp_path / "mine.html"
    other.write_text("<!doctype html>\nmine")
    for path, message in (
        (other, "is there and is no report; allowed is a name for a new file, or an older report"),
        (tmp_path, "is no file"),
        (tmp_path / "nowhere" / "r.html", "cannot be written: No such file or directory"),
        (other / "r.html", "cannot be written: Not a directory"),
        (tmp_path / ("n" * 300), "cannot be written: File name too long"),
    ):
        result = invoke("replay", "--trace", "nowhere.csv", "--report", path)
        assert (result.exit_code, result.stdout) == (2, "")
        assert f"--report {str(path)!r}: {message}" in result.stderr
        assert result.stderr.count("\n") == 1
    assert other.read_text() == "<!doctype html>\nmine"
    assert [each.name for each in tmp_path.iterdir()] == ["mine.html"]


def test_an_older_report_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "r.html"
    (tmp_path / "link.html").symlink_to(path)
    options = ("replay", "--synthetic", "zipf", "--limit", 20, "--rows", 5000, "--capacity", "64KiB")
    assert invoke(*options, "--report", path).exit_code == 0
    os.chmod(path, 0o640)
    first = path.read_bytes()
    assert first.startswith(MARK)
    failed = invoke("replay", "--trace", "nowhere.csv", "--report", path)
    assert (failed.exit_code, path.read_bytes()) == (1, first)
    assert invoke(*options, "--seed", 3, "--report", tmp_path / "link.html").exit_code == 0
    assert path.read_bytes() != first
    assert (path.stat().st_mode & 0o777, (tmp_path / "link.html").is_symlink()) == (0o640, True)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["link.html", "r.html"]


def test_what_came_there_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "r.html"
    with report_file(path) as save:
        path.write_text("mine")
        with pytest.raises(ConfigError, match="is no report"):
            save("page")
    assert path.read_text() == "mine"
    assert [each.name for each in tmp_path.iterdir()] == ["r.html"]


@given(st.lists(st.floats(0, 300), min_size=1, max_size=12))
def test_labels_are_apart_and_in_order(wanted: list[float]) -> None:
    places = spread(wanted, 16, 0, 300)
    order = sorted(range(len(wanted)), key=lambda number: wanted[number])
    gaps = np.diff([places[number] for number in order])
    assert (gaps >= 15.8).all()
    assert min(places) >= 0
    assert max(places) <= 300.1
    if len(wanted) == 1:
        assert places[0] == pytest.approx(wanted[0], abs=0.1)


@given(st.floats(1e-3, 1e12), st.integers(3, 8))
def test_ticks_reach_the_largest_value_in_few_steps(most: float, wanted: int) -> None:
    ticks = even_ticks(most, str, wanted)
    assert ticks[0].at == 0
    assert ticks[-1].at >= most * (1 - 1e-6)
    assert ticks[-2].at < most
    assert len(ticks) <= wanted + 2


@given(st.floats(1, 1e9), st.floats(4, 1e6), st.integers(3, 8))
def test_ticks_of_powers_are_inside_and_few(first: float, factor: float, wanted: int) -> None:
    ticks = power_ticks(first, first * factor, 2, str, wanted)
    assert 1 <= len(ticks) <= wanted
    assert all(first * 0.999 <= tick.at <= first * factor * 1.001 for tick in ticks)


def test_numbers_are_said_to_three_digits() -> None:
    assert [words.size(each).replace("\xa0", " ") for each in (0, 999, 1024, 64 << 20, (64 << 20) - 200, 1_213_000_000)] == [
        *("0 B", "999 B", "1 KiB", "64 MiB", "64 MiB", "1.13 GiB")
    ]
    times = [words.time(each).replace("\xa0", " ") for each in (12, 999_600, 1_250_000, 61e9)]
    assert times == ["12 ns", "1 ms", "1.25 ms", "61 s"]
    assert [words.short(each).replace("\xa0", " ") for each in (0, 42, 4506, 5000, 23_300, 4_506_197)] == [
        *("0", "42", "4,506", "5 k", "23.3 k", "4.51 M")
    ]
    assert [words.points(each) for each in (0.034, -0.00001, -0.0312)] == ["+3.4", "0.0", "\N{MINUS SIGN}3.1"]
    assert words.listed(["a", "b", "c"]) == "a, b and c"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    executable = find_browser()
    if executable is None:
        pytest.skip(f"looking at a page needs a browser: none of {', '.join(NAMES)} is installed")
    with browser(executable, tmp_path_factory.mktemp("profile")) as started:
        yield started


_LOOK = """
(() => {
  const seen = (part) => part.getClientRects().length > 0;
  const box = (part) => { const r = part.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
  return [...document.querySelectorAll("figure")].map((figure) => {
    const drawings = [...figure.querySelectorAll("svg")].filter(seen);
    return {
      id: figure.id,
      drawings: drawings.map(box),
      texts: drawings.flatMap((svg) => [...svg.querySelectorAll("text")].map((t) => [t.textContent, ...box(t)])),
      marks: drawings.flatMap((svg) => [...svg.querySelectorAll("polyline, circle, rect:not([class=tip])")].map(box)),
    };
  });
})()
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("kind", KINDS)
def test_a_browser_shows_the_page(made: Reports, chromium: Browser, kind: str, width: int, scheme: str) -> None:
    path = made[kind].path
    chromium.show(path, width, scheme=scheme)
    told = [(method, params) for method, params in chromium.events if method in _COMPLAINTS]
    assert told == []
    asked = [params["request"]["url"] for method, params in chromium.events if method == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
    root = "document.documentElement"
    assert chromium.run(f"{root}.scrollWidth <= {root}.clientWidth"), "the page scrolls sideways"
    light = chromium.run("getComputedStyle(document.body).backgroundColor") == "rgb(252, 252, 250)"
    assert light == (scheme == "light")
    looked = chromium.run(_LOOK)
    assert {each["id"].removeprefix("figure-") for each in looked} == set(made[kind].page.figures)
    for figure in looked:
        ((left, top, right, bottom),) = figure["drawings"]
        assert right - left > 300, figure["id"]
        assert bottom - top > 40, figure["id"]
        assert left >= 0, figure["id"]
        assert right <= width, figure["id"]
        assert figure["marks"], f"{figure['id']} is empty"
        for name, *place in (*figure["texts"], *(("mark", *each) for each in figure["marks"])):
            inside = left - 1 <= place[0] and place[2] <= right + 1 and top - 1 <= place[1] and place[3] <= bottom + 1
            assert inside, f"{figure['id']}: {name!r} at {place} is outside of {left, top, right, bottom}"
        assert overlaps(figure["texts"]) == [], figure["id"]


_COMPLAINTS = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")


def overlaps(texts: list[tuple[str, float, float, float, float]]) -> list[tuple[str, str]]:
    """Labels that lie on one another; the boxes of neighbouring lines may touch."""
    return [
        (one[0], other[0])
        for at, one in enumerate(texts)
        for other in texts[at + 1 :]
        if min(one[3], other[3]) - max(one[1], other[1]) > 1 and min(one[4], other[4]) - max(one[2], other[2]) > 4
    ]


def test_a_browser_tells_what_is_under_the_pointer(made: Reports, chromium: Browser) -> None:
    chromium.show(made["policies"].path, 1280)
    chromium.run("document.querySelector('#figure-curve-0').scrollIntoView()")
    box = "document.querySelector('#figure-curve-0 svg.wide').getBoundingClientRect()"
    x, y = chromium.run(f"(r => [r.left + r.width / 2, r.top + r.height / 2])({box})")
    chromium.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    shown = chromium.run("document.querySelector('.tip-box').textContent.split('\\n')")
    head, *body = made["policies"].page.tables["numbers-curve-0"]
    row = next(row for row in body if row[0] == shown[0])
    rates = dict(line.split("  ") for line in shown[1:])
    assert set(rates) == set(head[2:])
    for name, exact in zip(head[2:], row[2:], strict=True):
        assert float(rates[name].split("\xa0")[0]) == pytest.approx(float(exact.split("\xa0")[0]), abs=0.06)
    left, right = chromium.run("(r => [r.left, r.right])(document.querySelector('.tip-box').getBoundingClientRect())")
    assert 0 <= left < right <= 1280


def test_printing_shows_the_exact_numbers(made: Reports, chromium: Browser) -> None:
    chromium.show(made["live"].path, 1280)
    opened = "[...document.querySelectorAll('details')].map(each => each.open)"
    assert not any(chromium.run(opened))
    assert len(chromium.call("Page.printToPDF")["data"]) > 10_000
    assert all(chromium.run(opened))
