"""The page in a real browser, used as a person uses it: mouse, keyboard, and eyes."""

from __future__ import annotations

import shlex

import httpx
import pytest

from opensora.cli.main import invoke
from tests.serve.conftest import PATIENCE, TOKEN, Paced, listening, serving
from tests.support.chromium import CHROMIUM, NAMES, chromium

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason=f"none of {', '.join(NAMES)} is on this machine"
)

EVIL = "<img src=x onerror=\"owned = 'image'\"><script>owned = 'script'</script> it's a square"
GREETED = "document.title !== 'opensora'"
CARDS = "[...document.querySelectorAll('.card')]"
BIG = "document.querySelector('.card b')?.textContent"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def page(browser):
    page = browser.open()
    page.look(1280)
    yield page
    page.close()


def ask(page, prompt, **fields):
    """Fill the form and press the button."""
    page.write("#prompt", prompt)
    for name, value in fields.items():
        page.write(f"[name={name}]", str(value))
    page.click(".go")


def wait_for_playing(page, place=1):
    """Until the video of a card has a picture and its time goes on; what nobody sees is paused."""
    video = f"document.querySelector('.card:nth-child({place}) video')"
    page.wait(f"{video}?.readyState > 2 && {video}.videoWidth > 0")
    page.run(f"{video}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
    time = page.run(f"{video}.currentTime")
    page.wait(f"!{video}.paused && {video}.currentTime !== {time}")


def test_a_video_is_asked_for_and_plays_and_its_command_draws_the_same_bytes(
    start, page, tmp_path, capsys
):
    _, address = start()
    page.go(address)
    page.wait(GREETED)
    ask(page, EVIL, steps=4, seed=11, guidance_scale=2.5)
    wait_for_playing(page)
    assert EVIL in page.text()
    assert "seed 11" in page.text()
    assert page.run("typeof owned") == "undefined"
    assert page.run("document.querySelectorAll('#gallery img, #gallery script').length") == 0
    page.click(".deeds button:nth-child(2)")
    command = page.run("document.querySelector('.card code').innerText")
    link = page.run("document.querySelector('.deeds a').href")
    assert page.problems() == []
    assert page.requests()
    assert all(url.startswith(f"{address}/") for url in page.requests())

    words = shlex.split(command)
    assert (words[0], words[-1]) == ("opensora", EVIL)
    output = ["--output", str(tmp_path / "same"), "--device", "cpu"]
    assert invoke([*words[1:2], *output, *words[2:]]) == 0
    (same,) = (tmp_path / "same").glob("*.mp4")
    assert same.read_bytes() == httpx.get(link, timeout=PATIENCE).content


def test_progress_moves_step_by_step_and_cancel_frees_the_worker(page, tmp_path, paced):
    with (
        serving(tmp_path / "out", paced, started=False) as service,
        listening(service) as address,
    ):
        page.go(address)
        page.wait(GREETED)
        ask(page, "the first", steps=9)
        page.wait(f"{BIG} === 'step 0 of 9'")
        for step in (1, 2):
            paced.steps.release()
            page.wait(f"{BIG} === 'step {step} of 9'")
            assert page.run("document.querySelector('.card progress').value") == step
        ask(page, "the second", steps=9)
        page.wait(f"{CARDS}.length === 2 && {BIG} === 'waits'")
        assert "next in line" in page.text()
        page.click(".card:nth-child(2) .deeds button:nth-child(3)")  # the newest is the first
        page.wait(f"{CARDS}.length === 1 && {CARDS}[0].innerText.includes('the second')")
        paced.steps.release()  # the step that ran when it was cancelled
        page.wait(f"{BIG} === 'step 0 of 9'")
        assert paced.began == [*(("the first", step) for step in range(3)), ("the second", 0)]
        paced.free = True
        paced.steps.release(100)
        wait_for_playing(page)
        page.click(".deeds button:nth-child(3)")
        page.wait(f"{CARDS}.length === 0 && !document.querySelector('#empty').hidden")
        assert service.store.jobs() == []
        assert page.problems() == []


def test_what_the_server_refuses_is_told_where_it_was_asked(page, tmp_path, paced):
    with (
        serving(tmp_path / "out", paced, started=False, queue=1) as service,
        listening(service) as address,
    ):
        page.go(address)
        page.wait(GREETED)
        told = "document.querySelector('#refusal').textContent"
        ask(page, "a square", size="15x17")
        page.wait(f"{told}.includes('a width of 15 do not fit the model')")
        assert page.run(f"{CARDS}.length") == 0
        page.write("[name=size]", "16x16")
        for count in (1, 2):
            page.click(".go")
            page.wait(f"{CARDS}.length === {count} && !document.querySelector('.go').disabled")
            assert page.run(told) == ""
            page.wait(f"{CARDS}.at(-1).querySelector('b').textContent.startsWith('step')")
        page.click(".go")
        page.wait(f"{told} === '1 jobs wait already; ask again later'")
        assert page.problems(answers=False) == []


def test_a_server_that_goes_and_comes_back_is_waited_for(page, tmp_path, paced):
    told = "document.querySelector('#refusal').textContent"
    with (
        serving(tmp_path / "out", paced, started=False) as service,
        listening(service) as address,
    ):
        page.go(address)
        page.wait(GREETED)
        ask(page, "a square", steps=3)
        page.wait(f"{BIG} === 'step 0 of 3'")
    page.wait(f"{told} === 'the server does not answer'")
    page.click(".go")
    page.wait("!document.querySelector('.go').disabled")
    assert "a square" in page.run(f"{CARDS}[0].innerText")
    port = int(address.rpartition(":")[2])
    with (
        serving(tmp_path / "out", Paced(free=True), started=False) as again,
        listening(again, port),
    ):
        wait_for_playing(page)
        assert page.run(told) == ""
        assert page.problems(answers=False) == []


def test_a_token_is_asked_for_once_and_opens_the_videos_too(page, tmp_path):
    with (
        serving(tmp_path / "out", Paced(free=True), started=False, token=TOKEN) as service,
        listening(service) as address,
    ):
        page.go(address)
        page.wait("!document.querySelector('#key').hidden")
        page.write("#token", "a-token-of-somebody-else")
        page.click("#key button")
        page.wait("document.querySelector('#refusal').textContent.includes('Bearer TOKEN')")
        page.write("#token", TOKEN)
        page.click("#key button")
        page.wait(f"{GREETED} && document.querySelector('#key').hidden")
        ask(page, "a square", steps=2)
        wait_for_playing(page)
        page.go(f"{address}/")
        wait_for_playing(page)
        assert page.problems(answers=False) == []
        assert TOKEN not in " ".join(page.requests())


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_window_in_either_scheme(page, width, tmp_path):
    with (
        serving(tmp_path / "out", Paced(free=True), started=False) as service,
        listening(service) as address,
    ):
        page.look(width)
        page.go(address)
        page.wait(GREETED)
        ask(page, "a square " + "without_an_end" * 30, steps=2, negative_prompt="x" * 300)
        wait_for_playing(page)
        page.click(".deeds button:nth-child(2)")
        papers = []
        for dark in (False, True):
            page.look(width, dark=dark)
            assert page.run("document.documentElement.scrollWidth <= innerWidth")
            beyond = page.run(
                "[...document.querySelectorAll('body *')].filter((node) => "
                "node.getBoundingClientRect().right > innerWidth + 1).map((node) => node.outerHTML)"
            )
            assert beyond == []
            papers.append(page.run("getComputedStyle(document.body).backgroundColor"))
        assert papers[0] != papers[1]
