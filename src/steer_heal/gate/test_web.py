"""The chat as a page: it shows what a chat in the terminal shows, to this machine alone, and loads nothing else."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from steer_heal.commands.chat.session import Session, answer, arms, as_markdown, prompt_of
from steer_heal.commands.chat.subject import of_run, opened
from steer_heal.commands.chat.web import Page, served
from steer_heal.gate.browser import CHROMIUM, Browser, browsing
from steer_heal.gate.test_chat import FIRST, PLAIN, SECOND, said, silent
from steer_heal.gate.test_input import refused
from steer_heal.terminal import MODULE

pytestmark = [pytest.mark.run, pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio")]

HOSTILE = 'Is <b>this</b> &lt; that?  ${value} {{value}} $$x$$ <img src="x" onerror="document.title = 1"></p>'
COLUMNS = """[...document.querySelectorAll(".arm")].map(
  arm => [arm.querySelector("h2").textContent, [...arm.querySelectorAll("p")].map(p => p.textContent)])"""
SAY = """new Promise(done => {
  const box = document.querySelector("#message textarea, #message input");
  box.value = %r;
  box.dispatchEvent(new Event("input", {bubbles: true}));
  setTimeout(() => { document.querySelector("#send").click(); done(); }, 300);
})"""
DIAL = """(() => {
  const box = document.querySelector("#%s input[type=number]");
  box.value = %s;
  for (const event of ["input", "change", "blur"]) box.dispatchEvent(new Event(event, {bubbles: true}));
})()"""
KEEP = """(() => {
  URL.createObjectURL = given => { window.kept = given; return "#"; };
  HTMLAnchorElement.prototype.click = function () { window.named = this.download; };
  document.querySelector("#save").click();
})()"""


def test_without_gradio_one_line_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "--web needs the package gradio: pip install 'steer_heal[web]'" in refused(
        ["chat", "nothing-here", "--web"], capsys
    )


def test_ctrl_c_ends_the_page_without_a_word(tmp_path):
    """The wait hears of the signal also where a library has taken it over, as polars does."""
    pytest.importorskip("gradio", reason="gradio is not here: pip install 'steer_heal[web]'")
    words = [sys.executable, "-u", "-m", MODULE, "chat", "random:tiny", "--web"]
    with (tmp_path / "said").open("w") as said_there:
        running = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=said_there, text=True)
    line = running.stdout.readline()
    running.send_signal(signal.SIGINT)
    rest, _ = running.communicate(timeout=60)
    said = (tmp_path / "said").read_text()
    assert line.startswith("the chat is at http://127.0.0.1:") and rest == "\n" and "Traceback" not in said
    assert running.returncode == 0, (running.returncode, said)


@pytest.fixture(scope="module")
def of_two_rounds(whole):
    pytest.importorskip("gradio", reason="gradio is not here: pip install 'steer_heal[web]'")
    return of_run(whole, None)


@pytest.fixture
def session(of_two_rounds):
    return Session(of_two_rounds, max_new_tokens=8)


def columns_of(session: Session) -> list:
    return [[arm.name, list(session.before(arm.name))] for arm in arms(session)]


def dials_of(session: Session) -> tuple:
    return session.gate, session.base, session.persona, session.dose


def test_the_page_lets_the_same_arms_answer_as_the_terminal(session):
    page = Page(session)
    *_, (left, state, *columns) = page.said(f" {FIRST}\n", None, 0.5, True, True, 20.0)
    expected = said(replace(session, gate=0.5, persona=True, dose=20.0), FIRST)
    assert left == "" and state.said == expected.said and len(state.turns[0].answers) == len(columns) == 4
    assert page.saved(state) == as_markdown(expected)
    fresh, *columns = page.new(state, 0.5, True, False, None)
    assert (
        fresh.said == state.said and not fresh.turns and [c["visible"] for c in columns] == [True, True, False, False]
    )
    *_, (_, again, *_) = page.said("  ", fresh, *dials_of(fresh))
    assert again == fresh


def listening(port: int) -> list[str]:
    """The addresses at which this machine listens on a port, in the kernel's hexadecimal."""
    rows = [row.split() for table in ("tcp", "tcp6") for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]]
    return [row[1].partition(":")[0] for row in rows if row[3] == "0A" and int(row[1].partition(":")[2], 16) == port]


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="no list of sockets here")
def test_the_page_is_served_on_the_loopback_address_alone(session):
    import httpx

    with served(session) as address:
        url = httpx.URL(address)
        assert url.host == "127.0.0.1" and listening(url.port) == ["0100007F"]
        answered = httpx.get(url)
        assert answered.status_code == 200 and "'self'" in answered.headers["content-security-policy"]
        assert httpx.get(url, headers={"host": "elsewhere.example"}).status_code == 400
        config = httpx.get(f"{address}config").json()
        assert config["analytics_enabled"] is False and config["run_history"] is False
    assert listening(url.port) == []


@contextmanager
def shown(session: Session, folder: Path) -> Iterator[Browser]:
    """A browser with the page open, until the block ends. It then has asked nobody else, and has not complained."""
    with served(session) as address, browsing(folder) as browser:
        browser.open(address)
        browser.until(COLUMNS, columns_of(session))
        yield browser
        assert [one for one in browser.requested if not one.startswith((address, "data:", "blob:"))] == []
        assert browser.complaints == []


in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")


@in_a_browser
def test_a_browser_shows_every_arms_own_conversation_in_columns(session, tmp_path):
    """As they are in a chat without a page. Another gate is another conversation; New forgets, Save keeps all."""
    one = answer(session, HOSTILE, silent)  # before the page, which has the same model and random numbers
    two = answer(one, SECOND, silent)
    dialled = replace(two, gate=0.5, dose=20.0, persona=True)
    fresh = replace(dialled, chat=2)
    three = answer(fresh, FIRST, silent)
    with shown(session, tmp_path) as page:
        page.run(SAY % HOSTILE)
        page.until(COLUMNS, columns_of(one))
        page.run(SAY % SECOND)
        page.until(COLUMNS, columns_of(two))
        tops = 'new Set([...document.querySelectorAll(".arm")].map(arm => arm.getBoundingClientRect().top)).size'
        assert page.run(tops) == 1 and page.run("document.documentElement.scrollWidth") <= 1400
        assert page.run('document.querySelectorAll(".arm img, .arm b").length') == 0
        page.run(DIAL % ("gate", 0.5))
        page.until(COLUMNS, columns_of(replace(two, gate=0.5)))
        page.run(DIAL % ("dose", 20))
        page.run('document.querySelector("#persona input").click()')
        page.until(COLUMNS, columns_of(dialled))
        page.run('document.querySelector("#new").click()')
        page.until(COLUMNS, columns_of(fresh))
        page.run(SAY % FIRST)
        page.until(COLUMNS, columns_of(three))
        assert len(columns_of(three)) == 4
        page.run(KEEP)
        page.until("window.named", "chat.md")
        assert page.run("window.kept.text()") == as_markdown(three)


@in_a_browser
def test_a_browser_shows_what_does_not_fit_and_keeps_the_message(session, tmp_path, monkeypatch):
    longest = max(len(prompt_of(session, arm, FIRST)) for arm in arms(session))
    monkeypatch.setattr(session.subject.student.lm.model.config, "max_position_embeddings", longest + 7)
    with shown(session, tmp_path) as page:
        page.run(SAY % FIRST)
        page.until(
            f'document.body.innerText.includes("the model reads {longest + 7}: an answer of 8 does not fit")', True
        )
        page.until('document.querySelector("#message textarea, #message input").value', FIRST)
        assert page.run(COLUMNS) == columns_of(session)


@in_a_browser
def test_a_model_alone_has_one_column_and_no_dials(of_two_rounds, tmp_path):
    session = Session(opened("random:tiny", None, PLAIN), max_new_tokens=4)
    one = said(session, FIRST)
    with shown(session, tmp_path) as page:
        assert page.run(COLUMNS) == [["model", []]]
        assert page.run('document.querySelector("#gate, #base") === null')
        page.run(SAY % FIRST)
        page.until(COLUMNS, columns_of(one))
